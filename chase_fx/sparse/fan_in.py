"""Structured updates with a constant fan-in: every active neuron of a layer has the same number of weights (SRigL).

A neuron is an index of dim 0 of a weight; w_OF stands for a weight seen as (neurons, fan-in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chase_fx.sparse.distribution import random_mask
from chase_fx.sparse.masks import SparseWeights
from chase_fx.sparse.recipe import Counts
from chase_fx.sparse.score import gradient, magnitude
from chase_fx.sparse.select import allocate, top_mask

__all__ = ["ConstantFanIn"]


@dataclass(frozen=True)
class ConstantFanIn:
    """Drop by magnitude and grow by gradient within each layer, under a constant fan-in, ablating weak neurons.

    A weight is salient if it survives the layer's drop or is among the layer's largest gradients. A neuron with fewer
    salient weights than ``max(1, gamma * fan_in)`` is ablated: it gets no weights this time, and the others share its
    part. It comes back when an update finds its gradients salient (Lasby et al., "SRigL", arXiv 2305.02299, section 3).

    Neurons are ablated only as far as the others can hold the layer's part. The number of weights is a multiple of the
    neurons in every layer, so the budget is the largest such number not above the nominal one. Layers get their parts
    of the nominal budget by ERK over what channel removal has left of them.
    """

    gamma: float = 0.3

    def __call__(self, weights: SparseWeights, counts: Counts, refill: bool, generator: torch.Generator) -> int:
        """Change the masks in place; the number of active weights that they have now."""
        del refill  # growth is by gradient anyway
        shares = [
            float(sum(weights.alive.counts(name, weight.shape)))
            for name, weight in zip(weights.names, weights.parameters, strict=True)
        ]
        parts = allocate(counts.end, shares, weights.capacities())
        inactive = weights.inactive()
        sizes = magnitude(weights, weights.masks, generator)
        slopes = gradient(weights, inactive, generator)
        share = 1 - min(1.0, counts.drop / max(1, counts.end))
        for i, (mask, free) in enumerate(zip(weights.masks, inactive, strict=True)):
            mask.copy_(self._layer(mask, free, sizes[i], slopes[i], part=parts[i], share=share))
        weights.apply()
        return weights.nnz

    def _layer(self, mask: Tensor, free: Tensor, sizes: Tensor, slopes: Tensor, *, part: int, share: float) -> Tensor:
        """The new mask of one layer; mask, free: (O, ...) active and inactive places; sizes, slopes: their scores."""
        active = mask.flatten(1)
        available = (mask | free).flatten(1)
        usable = available.any(1)
        rows, widest = int(usable.count_nonzero()), int(available.sum(1).max())
        if not rows or not part:
            return torch.zeros_like(mask)
        replaced = round(share * sizes.numel())
        kept = torch.zeros_like(mask).masked_scatter_(mask, top_mask(sizes, sizes.numel() - replaced)).flatten(1)
        wanted = torch.zeros_like(mask).masked_scatter_(free, top_mask(slopes, replaced)).flatten(1)
        salient = (kept | wanted).sum(1)
        fan_in = sizes.numel() / max(1, int(active.any(1).count_nonzero()))
        enough = int(((salient >= max(1.0, self.gamma * fan_in)) & usable).count_nonzero())
        # Never fewer neurons than can hold the layer's part, nor more than one weight each would use up.
        count = min(max(enough, -(-part // widest)), rows, part)
        neurons = top_mask(torch.where(usable, salient.double(), -math.inf), count)
        width = min(part // count, widest)
        # Kept weights by magnitude first, then the largest gradients; stable sorts let the lowest index win ties.
        empty = torch.full_like(mask, -math.inf, dtype=sizes.dtype)
        size_OF = empty.masked_scatter(mask, sizes).flatten(1).where(kept, -math.inf)  # noqa: N806 - shape suffix
        slope_OF = empty.masked_scatter(free, slopes).flatten(1)  # noqa: N806 - shape suffix
        slope_OF = slope_OF.where(~available | free.flatten(1), -1.0)  # noqa: N806 - dropped weights come last
        order = slope_OF.where(available, -math.inf).sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, size_OF.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        chosen = torch.zeros_like(active).scatter_(1, order[:, :width], value=True)
        return (chosen & neurons.unsqueeze(1)).view_as(mask)

    def start(self, shapes: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
        """Round every layer down to a multiple of its neurons, at least one weight each."""
        return [shape[0] * max(1, count // shape[0]) for shape, count in zip(shapes, counts, strict=True)]

    def draw(self, shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
        """The same number of places in each neuron, at random."""
        rows = [random_mask(shape[1:], count // shape[0], generator) for _ in range(shape[0])]
        return torch.stack(rows)
