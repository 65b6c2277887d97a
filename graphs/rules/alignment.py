"""What numbers in the code of a view take for granted.

``x.view(-1, 400)`` of (N, 16, 5, 5) puts the channels of one sample into a row. Of (N, 16, 10, 10) it makes four rows
of four channels each, without an error, and which channels meet which weights then depends on how many were removed.
So where a number stands for space next to channels, it has to be that size in every call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from chase_fx.graphs.axes import Axis, Prod, atoms_of, resolve
from chase_fx.graphs.rules.base import Alignment, LabelledOp
from chase_fx.graphs.rules.blocks import blocks
from chase_fx.graphs.tape import Slot

__all__ = ["alignments"]


def alignments(op: LabelledOp, x: Slot) -> Iterator[Alignment]:
    """What has to hold for each block of channels of ``x`` to begin and to end where it does in the example."""
    before, shape = op[x], op.out.shape
    if len(op.op.sizes) != len(shape) or 0 in shape:
        return
    pairs = [([-1], [-1]), *blocks([axis.size for axis in before], shape), ([len(before)], [len(shape)])]
    for k, (dims, ends) in enumerate(pairs[1:-1], 1):
        channels = tuple(before[d] for d in dims if any(atoms_of(before[d])))
        if not channels:
            continue
        places = [(dims[0], ends[0]), (dims[-1] + 1, ends[-1] + 1)]
        if any(op.op.sizes[e] is None for e in range(pairs[k - 1][1][-1] + 1, pairs[k + 1][1][0])):
            # Space beside the block that is of size 1 in the example goes into the inferred size at others.
            places = [(pairs[k - 1][0][-1] + 1, pairs[k - 1][1][-1] + 1), (pairs[k + 1][0][0], pairs[k + 1][1][0])]
        for place in places:
            met = _met(op, before, *place)
            if met:
                yield Alignment(x, tuple(met), math.prod(before[d].size for d in met), channels)


def _met(op: LabelledOp, before: Sequence[Axis], i: int, j: int) -> list[int]:
    """Dims of space that numbers stand for, where dims from ``i`` on are to be those from ``j`` on after the view.

    As many elements are before that place as are after it, so the side of it where all sizes are given tells.
    """
    found = list[int]()
    for dims, ends in ((range(i, len(before)), range(j, len(op.out.shape))), (range(i), range(j))):
        read = [op.op.sizes[e] for e in ends]
        if None in read:
            continue
        met = _left(op, before, dims, [pair for size in read if size is not None for pair in size.origins])
        if not met:
            return []
        found = found or met
    return found


def _left(op: LabelledOp, before: Sequence[Axis], dims: range, origins: Sequence[tuple[Slot, int]]) -> list[int]:
    """Those of ``dims`` that are space and whose sizes no size is read from; none where others are read."""
    left = [d for d in dims if op.is_space(before[d])]
    if any(d not in left and _holds_space(op, before[d]) for d in dims):
        return []
    for slot, d in origins:
        axis = resolve(op[slot][d])
        if not op.is_space(axis):
            continue
        same = next((k for k in left if resolve(before[k]) is axis), None)
        if same is None:
            return []
        left.remove(same)
    return left


def _holds_space(op: LabelledOp, axis: Axis) -> bool:
    """Whether an earlier view made one dim of space and channels."""
    axis = resolve(axis)
    return isinstance(axis, Prod) and any(map(op.is_space, axis.factors))
