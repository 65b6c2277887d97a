"""Drop: which active weights go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from chase_fx.sparse.masks import SparseWeights
from chase_fx.sparse.score import WeightScore, magnitude
from chase_fx.sparse.select import allocate, select_each, select_global

__all__ = ["Drop", "Scope"]

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Drop:
    """Keep the best active weights.

    ``scope="global"`` ranks the weights of all layers together; ``"layer"`` takes the same share from each layer.

    >>> from torch import nn
    >>> weight = nn.Parameter(torch.tensor([[0.1, -3.0], [2.0, 0.5]]))
    >>> weights = SparseWeights({"w": weight}, torch.optim.SGD([weight]))
    >>> Drop()(weights, 2, torch.Generator())
    [2]
    >>> weights.masks[0].tolist()
    [[False, True], [True, False]]
    """

    score: WeightScore = magnitude
    scope: Scope = "global"

    def __call__(
        self, weights: SparseWeights, keep: int, generator: torch.Generator, limits: Sequence[int] | None = None
    ) -> list[int]:
        """Drop down to ``keep`` active weights in all, in place; the number dropped per layer.

        limits: per layer how many may go at most, for the layer scope; together, for the global one.
        """
        before = weights.counts()
        if limits is not None and self.scope == "global":
            keep = max(keep, sum(before) - sum(limits))
        if keep >= sum(before):
            return [0] * len(before)
        scores = self.score(weights, weights.masks, generator)
        if self.scope == "global":
            kept = select_global(scores, weights.masks, keep)
        else:
            lost = allocate(sum(before) - keep, [float(count) for count in before], before)
            lost = [min(less, most) for less, most in zip(lost, limits or before, strict=True)]
            kept = select_each(scores, weights.masks, [count - less for count, less in zip(before, lost, strict=True)])
        for mask, new in zip(weights.masks, kept, strict=True):
            mask.copy_(new)
        return [b - a for b, a in zip(before, weights.counts(), strict=True)]
