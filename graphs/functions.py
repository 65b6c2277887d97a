"""Custom autograd functions as targets of a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["caller_of"]


@functools.cache
def caller_of(cls: Any) -> Callable[..., Any]:
    """A plain function that applies an autograd function, for ``cls.apply`` is bound to the class and has no name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"apply_{cls.__name__}"
    call.applies = cls  # type: ignore[attr-defined]  # by which it is found again when a graph is unpickled
    return call
