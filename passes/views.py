"""Views at other sizes: whether what shrinks is found at the same place as in the capture.

A view keeps the order of elements. So a factor of a dim is the same before and after it where as many elements are to
the right of it; and a dim holds no more than its label says where its ends are those of its first and last factor. In
the capture both are so. Where the sizes of a call may tell otherwise, a guard asks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch.fx import Node

from chase_fx.graphs.axes import Axis
from chase_fx.graphs.rules.blocks import blocks
from chase_fx.passes.factors import Live, dim_size, lives, sequence, size_of
from chase_fx.passes.numbers import demand_equal, demand_multiple, has_its_size, keep_size
from chase_fx.passes.quantities import Size, product
from chase_fx.passes.sites import CallSite

__all__ = ["check_view"]

Factors = list[Live | None]


def check_view(site: CallSite, tensor: Node, given: Sequence[Any]) -> None:
    """Guard a view of ``tensor`` to the dense sizes ``given``: numbers, of which one may be -1, or products."""
    before, after = site.label(tensor), site.out
    if not site.counts.any_live(before) or 0 in (*(a.size for a in before), *(a.size for a in after)):
        return
    view = _View(site, tensor, given)
    if not view.check():
        for d in range(len(before)):
            keep_size(site, tensor, d)
        for size, axis in zip(view.sizes_after, after, strict=True):
            has_its_size(site, size, axis.size)


class _View:
    """One view: the sizes and the factors of all dims before and after."""

    def __init__(self, site: CallSite, tensor: Node, given: Sequence[Any]) -> None:
        self.site, self.tensor = site, tensor
        self.before, self.after = site.label(tensor), site.out
        self.sizes = [dim_size(site, tensor, d) for d in range(len(self.before))]
        self._given = [None if n == -1 else n if isinstance(n, Size) else size_of(site, n) for n in given]
        self.factors = [sequence(site.counts, axis) for axis in self.before]
        self.factors_after = [sequence(site.counts, axis) for axis in self.after]

    @property
    def sizes_after(self) -> list[Size]:
        """The sizes of the dims after the view, the inferred one from the others."""
        rest = product(self.sizes) / product(n for n in self._given if n is not None)
        return [rest if n is None else n for n in self._given]

    def check(self) -> bool:
        """Whether guards were found that hold in the capture."""
        for d, factors in enumerate(self.factors):
            if not all(f.certain for f in lives(factors)):
                self._keep(d)
        return all(
            self._same(dims, ends)
            if _live_keys(self.factors, dims) == _live_keys(self.factors_after, ends)
            else self._whole(dims, ends)
            for dims, ends in blocks([a.size for a in self.before], [a.size for a in self.after])
        )

    def _keep(self, dim: int) -> None:
        """A dim before the view has the size that it had in the capture."""
        keep_size(self.site, self.tensor, dim)
        self.sizes[dim] = Size() * self.before[dim].size

    def _right(self, dim: int) -> Size:
        return product(self.sizes[dim + 1 :])

    def _right_after(self, dim: int) -> Size:
        return product(self.sizes_after[dim + 1 :])

    def _whole(self, dims: list[int], ends: list[int]) -> bool:
        """Factors are put together in another way, or unknown: the sizes in the block are those of the capture."""
        for d in dims:
            if self.sizes[d].powers:
                self._keep(d)
        for end in ends:
            has_its_size(self.site, self.sizes_after[end], self.after[end].size)
        return demand_equal(self.site, self._right(dims[-1]), self._right_after(ends[-1])) and demand_equal(
            self.site, self._right(dims[0] - 1), self._right_after(ends[0] - 1)
        )

    def _same(self, dims: list[int], ends: list[int]) -> bool:
        """The same factors in the same order."""
        places: list[Size] = []
        for d in dims:
            found = self._inside(self.before[d], self.factors[d], self.sizes[d])
            if found is None:
                return self._whole(dims, ends)
            places += [place * self._right(d) for place in found]
        rest = iter(places)
        return all(self._holds(end, [next(rest) for _ in lives(self.factors_after[end])]) for end in ends)

    def _inside(self, axis: Axis, factors: Factors, size: Size) -> list[Size] | None:
        """How many indices of a dim are to the right of each of its live factors."""
        known = self.site.places.get(id(axis))
        if known is not None:
            return list(known[1])
        if not lives(factors):
            return []
        if factors.count(None) > 1:
            return None
        gap = factors.index(None) if None in factors else 0
        found: list[Size] = []
        for k, factor in enumerate(factors):
            if factor is not None and k < gap:
                found.append(size / math.prod(f.size for f in lives(factors[: k + 1])))
            elif factor is not None:
                found.append(Size() * math.prod(f.size for f in lives(factors[k + 1 :])))
        return found

    def _holds(self, end: int, places: list[Size]) -> bool:
        """A dim after the view has its live factors at these places, and nothing else where its label has nothing."""
        factors, found = self.factors_after[end], lives(self.factors_after[end])
        if not found:
            return True
        right = self._right_after(end)
        left = self.sizes_after[end] * right
        site, first = self.site, places[0] * found[0].size
        good = demand_multiple(site, left, first) if factors[0] is None else demand_equal(site, left, first)
        k = 0
        for a, b in pairwise(factors):
            if a is not None and b is not None:
                good = good and demand_equal(site, places[k], places[k + 1] * b.size)
            k += a is not None
        last = demand_multiple if factors[-1] is None else demand_equal
        good = good and last(site, places[-1], right)
        if good and factors.count(None) > 1:
            with site.graph.inserting_before(site.node):
                inside = tuple((place / right).noted(site.graph, site.counts.grow) for place in places)
            site.places[id(self.after[end])] = self.after[end], inside
        return good


def _live_keys(factors: Sequence[Factors], dims: Sequence[int]) -> list[Any]:
    return [factor.key for d in dims for factor in lives(factors[d])]
