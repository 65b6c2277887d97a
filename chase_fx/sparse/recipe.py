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
    """Drop, then grow among the inactive; without ``grow``, removed channels take their weights along."""

    drop: Drop = field(default_factory=Drop)
    grow: Grow | None = None

    def __call__(self, weights: SparseWeights, counts: Counts, refill: bool, generator: torch.Generator) -> int:
        """Change the masks in place; the number of active weights that they are meant to have now."""
        grow = self.grow or (Grow() if refill else None)
        end = counts.end if grow else min(counts.end, weights.nnz)
        Drop(scope="global")(weights, max(counts.prune, 0), generator)
        lost = self.drop(weights, min(counts.drop, end), generator)
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
