"""Python loops over the places of a mask, such as the experts that some token chose.

Such a loop is unrolled for every place, so that the graph serves other inputs too. Where its body can't run at a place
that the example did not choose, the model itself can't go there: the place is left out of the next attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch

__all__ = ["DeadPlaceError", "Loops", "Place"]

Place = tuple[str, int]  # the line of the loop, and the position of the place


class DeadPlaceError(Exception):
    """The body of an unrolled loop fails at a place that the example did not choose."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.place = place


class Loops:
    """Where the unrolled loops of one capture are."""

    def __init__(self, dead: frozenset[Place]) -> None:
        self.dead = dead
        self._at: tuple[Place, torch.Tensor, torch.Tensor] | None = None

    def over(
        self, items: tuple[torch.Tensor, ...], every: torch.Tensor, chosen: torch.Tensor, source: str
    ) -> tuple[torch.Tensor, ...]:
        """``items``, one for each row of ``every``, for a loop that the example takes for the rows of ``chosen``."""
        return _Items(items, self, every, chosen, source)

    def enter(self, place: Place | None, every: torch.Tensor, chosen: torch.Tensor) -> None:
        """The loop goes on with ``place``, or has ended."""
        self._at = None if place is None else (place, every, chosen)

    def dead_place(self) -> Place | None:
        """Where a loop is right now, if the example did not choose the place."""
        if self._at is None:
            return None
        place, every, chosen = self._at
        row = every[place[1]].tolist()
        return None if row in chosen.tolist() else place


class _Items(tuple[torch.Tensor, ...]):
    """A tuple that tells where a loop over it is, and leaves dead places out."""

    loops: Loops
    every: torch.Tensor
    chosen: torch.Tensor
    source: str

    def __new__(
        cls, items: tuple[torch.Tensor, ...], loops: Loops, every: torch.Tensor, chosen: torch.Tensor, source: str
    ) -> Self:
        self = super().__new__(cls, items)
        self.loops, self.every, self.chosen, self.source = loops, every, chosen, source
        return self

    def __iter__(self) -> Iterator[torch.Tensor]:
        for k, item in enumerate(super().__iter__()):
            if (self.source, k) not in self.loops.dead:
                self.loops.enter((self.source, k), self.every, self.chosen)
                yield item
        self.loops.enter(None, self.every, self.chosen)
