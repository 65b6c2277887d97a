"""No search for garbage while long-lived objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage inside the block.

    A copy, a capture or an analysis allocates thousands of objects and drops few. That sets off one search after the
    other, each over everything that the process has imported, for nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
