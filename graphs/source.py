"""Lines of the user's code: where an operation was called, where an exception came from."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import types
from pathlib import Path

import torch

__all__ = ["is_model_code", "line_of_error", "source_line", "source_place"]

_HERE = Path(__file__).parent
_TORCH_DIR = f"{Path(torch.__file__).parent}{os.sep}"
_OWN_DIRS = tuple(f"{(_HERE / os.pardir / d).resolve()}{os.sep}" for d in ("graphs", "passes"))
_SKIPPED_DIRS = (_TORCH_DIR, *_OWN_DIRS, f"{_HERE}{os.sep}")


@functools.lru_cache(maxsize=4096)
def is_model_code(filename: str) -> bool:
    """Whether a file is neither torch's nor ours."""
    return not filename.startswith(_SKIPPED_DIRS)


def source_line() -> str:
    """``file.py:line`` of the innermost frame that is neither torch's nor ours."""
    return _innermost()[0]


def source_place() -> tuple[str, str]:
    """:func:`source_line`, and that with the part of the line, for one line may do several things."""
    line, frame = _innermost()
    if frame is None:
        return line, line
    # The number of the instruction would not do: it changes once the interpreter has specialised a call.
    position = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), ())
    return line, f"{line} {position}"


def _innermost() -> tuple[str, types.FrameType | None]:
    frame: types.FrameType | None = sys._getframe(1)
    fallback = ""
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_model_code(filename):
            short = filename.rpartition("site-packages" + os.sep)[2] or filename
            return f"{short}:{frame.f_lineno}", frame
        if not fallback and filename.startswith(_TORCH_DIR) and f"nn{os.sep}modules" in filename:
            fallback = filename
        frame = frame.f_back
    return fallback, None


def line_of_error(error: BaseException) -> str:
    """``file.py:line`` of the innermost line of the user's code that the exception passed through, or nothing."""
    found = ""
    tb = error.__traceback__
    while tb is not None:
        filename = tb.tb_frame.f_code.co_filename
        if not filename.startswith(_SKIPPED_DIRS):
            found = f"{filename}:{tb.tb_lineno}"
        tb = tb.tb_next
    return found
