"""Grow: which inactive weights come back, at value zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chase_fx.sparse.drop import Scope
from chase_fx.sparse.masks import SparseWeights
from chase_fx.sparse.score import WeightScore, gradient
from chase_fx.sparse.select import select_each, select_global

__all__ = ["Grow"]


@dataclass(frozen=True)
class Grow:
    """Activate the best inactive places among the channels that are left.

    ``scope="layer"`` first gives every layer its quota back (what it lost in this update), as far as it has room; the
    rest, and all of it for ``scope="global"``, goes to the best places of all layers together.

    The weights grown must be zero already, and their optimizer slots too: :meth:`SparseWeights.apply` sees to both.

    >>> from torch import nn
    >>> weight = nn.Parameter(torch.zeros(2, 2)); weight.grad = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    >>> weights = SparseWeights({"w": weight}, torch.optim.SGD([weight]))
    >>> _ = weights.masks[0].zero_()
    >>> Grow()(weights, 2, [0], torch.Generator())
    >>> weights.masks[0].tolist()
    [[False, True], [True, False]]
    """

    score: WeightScore = gradient
    scope: Scope = "global"

    def __call__(self, weights: SparseWeights, total: int, quotas: Sequence[int], generator: torch.Generator) -> None:
        """Grow up to ``total`` active weights in all, in place. quotas: per layer, used by the layer scope."""
        missing = total - weights.nnz
        if missing <= 0:
            return
        if self.scope == "layer" and 0 < sum(quotas) <= missing:
            where = weights.inactive()
            self._set(weights, select_each(self.score(weights, where, generator), where, quotas))
            missing = total - weights.nnz
        if missing > 0:
            where = weights.inactive()
            self._set(weights, select_global(self.score(weights, where, generator), where, missing))

    @staticmethod
    def _set(weights: SparseWeights, grown: Sequence[torch.Tensor]) -> None:
        for mask, new in zip(weights.masks, grown, strict=True):
            mask.logical_or_(new)
