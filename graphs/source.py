"""Lines of the user's code: where an operation was called, where an exception came from."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import torch

__all__ = ["is_model_code", "line_of_error", "source_line"]

_HERE = Path(__file__).parent
_TORCH_DIR = f"{Path(torch.__file__).parent}{os.sep}"
_OWN_DIRS = tuple(f"{(_HERE / os.pardir / d).resolve()}{os.sep}" for d in ("graphs", "passes"))
_SKIPPED_DIRS = (_TORCH_DIR, *_OWN_DIRS, f"{_HERE}{os.sep}")


def is_model_code(filename: str) -> bool:
    """Whether a file is neither torch's nor ours."""
    return not filename.startswith(_SKIPPED_DIRS)


def source_line() -> str:
    """``file.py:line`` of the innermost frame that is neither torch's nor ours."""
    frame: types.FrameType | None = sys._getframe(1)
    fallback = ""
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_SKIPPED_DIRS):
            short = filename.rpartition("site-packages" + os.sep)[2] or filename
            return f"{short}:{frame.f_lineno}"
        if not fallback and filename.startswith(_TORCH_DIR) and f"nn{os.sep}modules" in filename:
            fallback = filename
        frame = frame.f_back
    return fallback


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
