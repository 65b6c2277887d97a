"""A recipe declares a method as a combination of the pieces; an update carries one out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from chase_fx.sparse.distribution import Distribution, erk, random_mask
from chase_fx.sparse.drop import Drop
from chase_fx.sparse.grow import Grow
from chase_fx.sparse.masks import SparseWeights
from chase_fx.sparse.schedule import Fixed, Schedule, Targets

__all__ = ["Counts", "DropAndGrow", "Recipe", "Update"]


@dataclass(frozen=True)
class Counts:
    """Targets of one update in weights: prune to, drop to, end with, in this order; never above the capacity."""

    prune: int
    drop: int
    end: int

    @classmethod
    def of(cls, targets: Targets, size: int, capacity: int) -> Counts:
        """The densities ``targets`` in weights. size: masked weights at the start. capacity: places left.

        >>> Counts.of(Targets(0.5, drop=0.25), 100, 40)
        Counts(prune=100, drop=20, end=40)
        """
        wanted = max(1, round(targets.grow * size))
        end = min(wanted, capacity)
        # Where the channels left hold fewer weights than wanted, the share dropped refers to what they hold.
        drop = round(targets.drop * size * end / wanted)
        end += round(targets.fill * (capacity - end))
        return cls(size if targets.prune is None else round(targets.prune * size), drop, end)


class Update(Protocol):
    """Changes masks towards the counts."""

    def __call__(self, weights: SparseWeights, counts: Counts, refill: bool, generator: torch.Generator) -> int:
        """Change the masks in place; the number of active weights that they are meant to have now."""

    def start(self, shapes: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
        """Adjust the numbers of the initial masks to what the update can keep."""

    def draw(self, shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
        """An initial mask of ``shape`` with ``count`` entries set."""


@dataclass(frozen=True)
class DropAndGrow:
    """Drop, then grow among the inactive; without ``grow``, removed channels take their weights along.

    What would have to grow again at once, for want of other places, is not dropped: it would only lose its value. So a
    layer without empty places stays as it is, and one with few explores these.
    """

    drop: Drop = field(default_factory=Drop)
    grow: Grow | None = None

    def __call__(self, weights: SparseWeights, counts: Counts, refill: bool, generator: torch.Generator) -> int:
        """Change the masks in place; the number of active weights that they are meant to have now."""
        grow = self.grow or (Grow() if refill else None)
        end = counts.end if grow else min(counts.end, weights.nnz)
        Drop(scope="global")(weights, max(counts.prune, 0), generator)
        keep = min(counts.drop, end)
        if grow and keep < end:
            self.drop(weights, end, generator)
            room = [int(free.count_nonzero()) for free in weights.inactive()]
            lost = self.drop(weights, keep, generator, room)
        else:
            lost = self.drop(weights, keep, generator)
        # Zero what was dropped before anything grows, so that a weight grown back at once starts from nothing as well.
        weights.apply()
        if grow:
            grow(weights, end, lost, generator)
        return end

    def start(self, shapes: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
        """Any numbers will do."""
        del shapes
        return list(counts)

    def draw(self, shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
        """Places at random."""
        return random_mask(shape, count, generator)


@dataclass(frozen=True)
class Recipe:
    """One method: what it starts from, when it updates, and how.

    Attributes:
        name: of the method; a state dict belongs to one name.
        paper: where it is from.
        density: of the initial masks.
        distribution: of the initial masks over layers.
        schedule: when updates are due and what they leave.
        update: how the masks change.
        at_start: an update when the trainer is built, where the weights have gradients already.
    """

    name: str
    paper: str
    density: float
    schedule: Schedule = field(default_factory=Fixed)
    update: Update = field(default_factory=DropAndGrow)
    distribution: Distribution = erk
    at_start: Targets | None = None
