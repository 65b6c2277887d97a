"""Exact selection: the k highest scores, and whole numbers that add up.

Everything that ranks weights goes through here, so that two rules hold everywhere: exactly k entries are chosen, and
among equal scores the lowest index wins. A comparison with a threshold alone has neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["allocate", "select_each", "select_global", "top_mask"]


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` highest of ``scores``; among equals the lowest index is taken.

    scores: (n,) of any float dtype; NaN ranks below everything. Returns a BoolTensor (n,) with exactly
    ``min(max(k, 0), n)`` entries set.

    >>> import torch
    >>> top_mask(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist()
    [False, True, True, False, False]
    """
    n = scores.numel()
    if k <= 0:
        return torch.zeros(n, dtype=torch.bool, device=scores.device)
    if k >= n:
        return torch.ones(n, dtype=torch.bool, device=scores.device)
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    scores = torch.where(scores.isnan(), -math.inf, scores)
    # Quickselect is linear on the CPU. On GPUs kthvalue is refused under torch.use_deterministic_algorithms, and a
    # radix sort is fast.
    on_cpu = scores.device.type == "cpu"
    threshold = scores.kthvalue(n - k + 1).values if on_cpu else scores.sort().values[n - k]
    chosen = scores > threshold
    missing = k - int(chosen.count_nonzero())
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[:missing]] = True
    return chosen


def select_global(scores: Sequence[Tensor], candidates: Sequence[Tensor], k: int) -> list[Tensor]:
    """Choose the ``k`` best candidates of all tensors together.

    scores[i]: (c_i,), one score per set entry of candidates[i] in row-major order. candidates[i]: BoolTensor of the
    tensor's shape. Returns BoolTensors of the shapes of the candidates.
    """
    home = scores[0].device
    chosen = top_mask(torch.cat([score.to(home) for score in scores]), k)
    parts = chosen.split([score.numel() for score in scores])
    return [_place(part, where) for part, where in zip(parts, candidates, strict=True)]


def select_each(scores: Sequence[Tensor], candidates: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Choose the best ``counts[i]`` candidates of every tensor by itself; shapes as in :func:`select_global`."""
    return [
        _place(top_mask(score, count), where) for score, where, count in zip(scores, candidates, counts, strict=True)
    ]


def _place(part: Tensor, where: Tensor) -> Tensor:
    return torch.zeros_like(where).masked_scatter_(where, part.to(where.device))


def allocate(total: int, shares: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``shares`` that add up to ``total``, none above its capacity.

    What does not fit below a capacity goes to the others in proportion; rounding is by largest remainder, and the
    lowest index wins ties. If all capacities together are below ``total``, they are what is returned. A place with
    share 0 is used only when the others are full.

    >>> allocate(10, [1.0, 1.0, 2.0], [100, 100, 100])
    [3, 2, 5]
    >>> allocate(10, [1.0, 1.0, 2.0], [100, 1, 4])
    [5, 1, 4]
    """
    total = min(total, sum(capacities))
    exact = _fill(total, shares, capacities)
    counts = [math.floor(value) for value in exact]
    while (missing := total - sum(counts)) > 0:
        open_places = [i for i, cap in enumerate(capacities) if counts[i] < cap]
        open_places.sort(key=lambda i: (shares[i] <= 0, counts[i] - exact[i], i))
        for i in open_places[:missing]:
            counts[i] += 1
    return counts


def _fill(total: int, shares: Sequence[float], capacities: Sequence[int]) -> list[Fraction]:
    """Water-filling: scale the shares to ``total``, cap what overflows, solve again for the rest.

    In fractions, not floats: a remainder that is off by one ulp would break ties differently from one layout to the
    next.
    """
    left = Fraction(total)
    weights = [Fraction(share) for share in shares]
    exact = [Fraction(0)] * len(weights)
    free = [i for i, weight in enumerate(weights) if weight > 0]
    while free:
        scale = left / sum(weights[i] for i in free)
        full = {i for i in free if weights[i] * scale >= capacities[i]}
        for i in full or free:
            exact[i] = Fraction(capacities[i]) if full else weights[i] * scale
        if not full:
            break
        left -= sum(capacities[i] for i in full)
        free = [i for i in free if i not in full]
    return exact
