"""The tensors that ``unbind``, ``split`` or ``chunk`` give, of which there are as many as a size says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

__all__ = ["Counted"]


class Counted(tuple[Any, ...]):
    """A tuple that reports when somebody depends on its length; taking ``parts[0]`` does not.

    Unpacking, loops and ``*parts`` all ask for an iterator, since this is no plain tuple.
    """

    _report: Callable[[], None]

    def __new__(cls, items: tuple[Any, ...], report: Callable[[], None]) -> Self:
        """``items``; ``report`` is called each time that their number matters."""
        self = super().__new__(cls, items)
        self._report = report
        return self

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int) or index < 0:
            self._report()
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self._report()
        yield from super().__iter__()

    def __len__(self) -> int:
        self._report()
        return super().__len__()

    def __add__(self, other: Any) -> Any:
        return (*self, *other) if isinstance(other, tuple) else NotImplemented

    def __reversed__(self) -> Iterator[Any]:
        yield from reversed(list(self))
