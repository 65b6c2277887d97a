"""Scores of single weights: what drop keeps and growth prefers is what scores high.

A score is a function ``(weights, where, generator) -> list of 1-D tensors`` with one entry per place set in
``where[i]``, in row-major order. Scoring candidates only keeps an update cheap, and keeps the random draws the same
whether removed channels are masked or cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chase_fx.sparse.masks import SparseWeights

__all__ = ["MagnitudePlusGradient", "WeightScore", "gradient", "magnitude", "random", "saliency"]

WeightScore = Callable[[SparseWeights, Sequence[Tensor], torch.Generator], list[Tensor]]


def magnitude(weights: SparseWeights, where: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """``|w|``."""
    del generator
    return [value.abs_() for value in weights.pick(weights.parameters, where)]


def gradient(weights: SparseWeights, where: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """``|dL/dw|`` of the last backward pass, also at places that are not active (Evci et al., arXiv 1911.11134).

    What is not finite counts as 0: a GradScaler lets single steps overflow, and they shall decide nothing.
    """
    del generator
    return [value.abs_().nan_to_num_(0, 0, 0) for value in weights.pick(weights.gradients(), where)]


def saliency(weights: SparseWeights, where: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """``|w * dL/dw|``: the first-order effect of removing the weight (Lee et al., arXiv 1810.02340)."""
    del generator
    values = weights.pick(weights.parameters, where)
    slopes = weights.pick(weights.gradients(), where)
    return [value.mul_(slope).abs_().nan_to_num_(0, 0, 0) for value, slope in zip(values, slopes, strict=True)]


def random(weights: SparseWeights, where: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Uniform in [0, 1), drawn on the CPU so that the same seed gives the same masks on every device."""
    del weights
    return [torch.rand(int(mask.count_nonzero()), generator=generator).to(mask.device) for mask in where]


@dataclass(frozen=True)
class MagnitudePlusGradient:
    """``|w| + rate * |dL/dw|`` (Yuan et al., "MEST", arXiv 2110.14032)."""

    rate: float = 0.01

    def __call__(self, weights: SparseWeights, where: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """One score per candidate."""
        sizes = magnitude(weights, where, generator)
        slopes = gradient(weights, where, generator)
        return [size.add_(slope, alpha=self.rate) for size, slope in zip(sizes, slopes, strict=True)]
