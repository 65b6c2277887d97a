"""Dense and kept sizes of labelled dims, and the conversion of size arguments between the two.

All integers in the graph keep their dense meaning: a size that is read from a shrunken dim is scaled back up right
there, arithmetic runs on dense numbers, and a number becomes a kept size only where it is used as one. So no channel
size is ever computed from another live size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch.fx import Graph, Node

from chase_fx.graphs.axes import (
    Atom,
    Axis,
    BoolArray,
    Cat,
    Fixed,
    Picked,
    Prod,
    atoms_of,
    fixed_of,
    keep_mask,
    kept_count,
    resolve,
)
from chase_fx.graphs.rules.base import Labels

__all__ = ["Counts", "factors_of"]


def factors_of(axis: Axis) -> Iterator[Axis]:
    """What an axis was multiplied from, left to right: also what is of size 1, for it may be larger in another call."""
    if isinstance(axis, Atom):
        yield from [axis] if axis.ref is None else factors_of(axis.ref)
    elif isinstance(axis, Prod):
        for factor in axis.factors:
            yield from factors_of(factor)
    elif not (isinstance(axis, Fixed) and axis.size == 1 and axis.cause.op == "size 1"):
        yield axis


class Counts:
    """Kept sizes under one plan.

    Attributes:
        told: axes that have their size in every call, although they stay whole: the graph has a guard for it.
    """

    def __init__(self, masks: Mapping[Atom, BoolArray]) -> None:
        self._masks = masks
        self._kept = {atom: int(mask.sum()) for atom, mask in masks.items()}
        self.told: set[Axis] = set()

    def kept(self, axis: Axis) -> int:
        """How many indices stay."""
        return kept_count(axis, self._kept)

    def live(self, axis: Axis) -> bool:
        """Whether the plan removes any index."""
        return self.kept(axis) != axis.size

    def any_live(self, labels: Labels) -> bool:
        """Whether the plan shrinks any dim."""
        return any(map(self.live, labels))

    def before(self, axis: Axis, index: int) -> int:
        """How many indices below ``index`` stay: where dense index ``index`` is found after pruning."""
        return self.between(axis, 0, index)

    def between(self, axis: Axis, start: int, stop: int) -> int:
        """How many indices in ``start:stop`` stay."""
        mask = keep_mask(axis, self._masks)
        return stop - start if mask is None else int(mask[start:stop].sum())

    def scales(self, axis: Axis, index: int) -> bool:
        """Whether ``index`` lies between rows of a dim of batch x channels, so that its place follows the batch."""
        axis = resolve(axis)
        if not isinstance(axis, Prod) or not isinstance(axis.factors[0], Fixed):
            return False
        dense, kept, _ = self._scale(axis)
        return index % dense == 0 and self.before(axis, index) == index // dense * kept

    def row(self, axis: Axis) -> int:
        """What a dense size of ``axis`` is a multiple of, whatever else goes in."""
        return self._scale(axis)[0]

    def parts(self, axis: Axis | None) -> tuple[int, int]:
        """How many indices there are, and how many stay, in one place of what may differ from call to call."""
        live = [] if axis is None else [f for f in factors_of(axis) if self.live(f)]
        return math.prod(f.size for f in live), math.prod(map(self.kept, live))

    def _scale(self, axis: Axis) -> tuple[int, int, int]:
        """(dense, kept, offset): what a dense size is divided by, multiplied with, and shifted by.

        Factors that stay whole (batch, space) may differ from call to call, also where they were 1 in the capture and
        left no trace, so a size is scaled by its live part. *Parts* of a concatenation that stay whole are shifted
        instead.
        """
        factors = list(factors_of(axis))
        if len(factors) == 1 and self.live(axis):
            only = resolve(axis)
            if isinstance(only, (Cat, Picked)) and (
                any(True for _ in fixed_of(only)) or not all(map(self.live, atoms_of(only)))
            ):
                return 1, 1, self.kept(axis) - axis.size
        return (*self.parts(axis), 0)

    def shrink(self, graph: Graph, value: Any, axis: Axis) -> Any:
        """A dense size argument as a kept one. Nodes are inserted at the graph's insertion point."""
        if not self.live(axis):
            return value
        if isinstance(value, Node):
            dense, kept, offset = self._scale(axis)
            if offset:
                return graph.call_function(operator.add, (value, offset))
            return graph.call_function(operator.mul, (graph.call_function(operator.floordiv, (value, dense)), kept))
        return self.kept(axis) if value == axis.size else value

    def grow(self, graph: Graph, read: Node, labels: Labels) -> Any:
        """The dense value of a size (one label) or an element count (all of them) read from a shrunken tensor."""
        scales = [self._scale(axis) for axis in labels]
        if len(labels) == 1 and scales[0][2]:
            return graph.call_function(operator.sub, (read, scales[0][2]))
        parts = [
            (axis.size, self.kept(axis)) if offset else (dense, kept)
            for axis, (dense, kept, offset) in zip(labels, scales, strict=True)
        ]
        dense, kept = math.prod(p[0] for p in parts), math.prod(p[1] for p in parts)
        if dense == kept:
            return read
        return graph.call_function(operator.mul, (graph.call_function(operator.floordiv, (read, kept)), dense))
