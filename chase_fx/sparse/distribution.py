"""How many weights each layer starts with: uniform, ERK and ERK+, in exact counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chase_fx.errors import ArgumentError
from chase_fx.sparse.select import allocate

__all__ = ["DISTRIBUTIONS", "Distribution", "dense_count", "erk", "erk_plus", "random_mask", "resolve", "uniform"]

Shape = Sequence[int]
Distribution = Callable[[Sequence[Shape], int], list[int]]
"""From the weights' shapes and the total number of active weights to the number in each layer."""


def uniform(shapes: Sequence[Shape], total: int) -> list[int]:
    """Every layer gets the same density.

    >>> uniform([(4, 2), (8, 4)], 10)
    [2, 8]
    """
    sizes = [math.prod(shape) for shape in shapes]
    return allocate(total, [float(size) for size in sizes], sizes)


def erk(shapes: Sequence[Shape], total: int) -> list[int]:
    """Erdős-Rényi-Kernel: density in proportion to ``sum(shape) / prod(shape)``, kernel dims included.

    A layer whose density would pass 1 is dense, and the scale is solved again for the rest (Evci et al., "Rigging the
    Lottery", arXiv 1911.11134, section 3).

    >>> erk([(8, 1, 3, 3), (16, 8, 3, 3), (10, 16)], 200)
    [42, 85, 73]
    """
    # density_l * size_l = eps * sum(shape_l): counts in proportion to the sums, capped at the sizes.
    return allocate(total, [float(sum(shape)) for shape in shapes], [math.prod(shape) for shape in shapes])


def erk_plus(shapes: Sequence[Shape], total: int) -> list[int]:
    """ERK with a dense last layer, the total unchanged (Liu et al., arXiv 2202.02643).

    >>> erk_plus([(8, 1, 3, 3), (16, 8, 3, 3), (10, 16)], 250)
    [30, 60, 160]
    """
    last = min(math.prod(shapes[-1]), total)
    return [*erk(shapes[:-1], total - last), last] if len(shapes) > 1 else [last]


def dense_count(sizes: Sequence[int], density: float) -> int:
    """The number of active weights at ``density``: rounded to the nearest, at least one."""
    return max(1, round(density * sum(sizes)))


def random_mask(shape: Shape, count: int, generator: torch.Generator) -> Tensor:
    """A mask with exactly ``count`` entries set at random places; (shape) -> BoolTensor (shape) on the CPU.

    A permutation rather than one coin per entry: independent coins would miss the count.
    """
    size = math.prod(shape)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:count]] = True
    return mask.view(tuple(shape))


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "erk": erk, "erk+": erk_plus}


def resolve(distribution: str | Distribution) -> Distribution:
    """A distribution by name, or the function itself."""
    if callable(distribution):
        return distribution
    if distribution not in DISTRIBUTIONS:
        known = sorted(DISTRIBUTIONS)
        msg = f"unknown distribution {distribution!r}: expected one of {known} or a function of (shapes, total)"
        raise ArgumentError(msg)
    return DISTRIBUTIONS[distribution]
