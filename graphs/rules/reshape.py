"""Views: the same elements in row-major order under other sizes.

Dims are matched in blocks by the common refinement of the cumulative sizes. A block of several input dims is a product;
a block with several output dims is factored. What is a product twice is refined to the common factors (see ``axes``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from chase_fx.graphs.axes import Axis, Prod, atoms_of
from chase_fx.graphs.rules.base import TOLD, LabelledOp, Labels, factors_of
from chase_fx.graphs.rules.blocks import blocks

__all__ = ["as_complex", "as_real", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "reshape", "reshape_labels"]


def reshape(op: LabelledOp) -> Labels:
    """``view``, ``reshape``, ``flatten``, ``unflatten``, ``_unsafe_view``."""
    x = next(op.op.inputs())
    before = op[x]
    after = _told(op, _with_ones(op, before, reshape_labels(op, before, op.out.shape)))
    if _depends_on_space(op, before, after):
        for axis in before:
            op.freeze(axis, "a view mixes it with space, in a way that the size of the input decides")
    return after


def _told(op: LabelledOp, labels: Labels) -> Labels:
    """Dims of size 1 that are so by the code or by the channels are told from space that is of size 1."""
    if not any(axis.size == 1 for axis in labels):
        return labels
    told = [read is not None and True not in read for read in op.read_from()]
    return tuple(op.fixed(1, TOLD) if axis.size == 1 and t else axis for axis, t in zip(labels, told, strict=True))


def _with_ones(op: LabelledOp, before: Labels, after: Labels) -> Labels:
    """Dims of channels that a view put together with a batch or space of size 1 have it as a factor.

    It leaves no trace in their sizes, and may be larger in another call. It goes to a dim of size 1 at its place, if
    there is one; else to the dim beside it whose size was read from it, or may have been.
    """
    ones = {d for d, axis in enumerate(before) if axis.size == 1 and op.is_space(axis)}
    if 0 in op.out.shape:
        return after
    open_ = [read is None or True in read for read in op.read_from()]
    labels = [axis if may_grow else _without_ones(axis) for axis, may_grow in zip(after, open_, strict=True)]
    last = end = -1
    for dims, ends in (*blocks([axis.size for axis in before], op.out.shape), ([len(before)], [len(after)])):
        if len(ends) == 1 and len(dims) > 1 and not ones.isdisjoint(range(dims[0], dims[-1])):
            labels[ends[0]] = Prod(before[d] for d in range(dims[0], dims[-1] + 1))
        if len(ends) == 1 and ends[0] < len(after):
            own = sum(op.is_space(before[d]) for d in range(last + 1, dims[-1] + 1) if d in dims or d in ones)
            if op.spaces_read(ends[0]) > own:  # a part of the space beside it, which is one in the example
                labels[ends[0]] = Prod((op.fixed(1), labels[ends[0]], op.fixed(1)))
        taken = sum(open_[end + 1 : ends[0]])
        for d in sorted(ones.intersection(range(last + 1, dims[0])))[taken:]:
            sides = [e for e in (end, ends[0]) if 0 <= e < len(after) and open_[e]]
            for e in sorted(sides, key=lambda e: not op.reads(e, before[d]))[:1]:
                labels[e] = Prod((labels[e], before[d]) if e == end else (before[d], labels[e]))
        last, end = dims[-1], ends[-1]
    return tuple(new if any(atoms_of(new)) else old for new, old in zip(labels, after, strict=True))


def _without_ones(axis: Axis) -> Axis:
    if not isinstance(axis, Prod):
        return axis
    factors = [_without_ones(factor) for factor in axis.factors if factor.size != 1]
    return axis if [*map(id, factors)] == [*map(id, axis.factors)] else Prod(factors)


def _depends_on_space(op: LabelledOp, before: Labels, after: Labels) -> bool:
    """Whether a view tears channels apart in a way that depends on the size of the image, the sequence or the batch.

    The labels hold for the example's sizes. ``(N, H*W, C)`` viewed as ``(N, C, H, W)``, without a transpose, takes
    other channels together at each resolution. Then a number is the size of what begins or ends with space, a size
    that was read from space that of a piece of channels; or, where space was of size 1, it moves across the channels.
    """
    read = op.read_from()
    live_in, live_out = ([d for d, axis in enumerate(labels) if any(atoms_of(axis))] for labels in (before, after))
    if not live_in or not live_out:
        return False
    parts = [part for axis in before for part in _parts(op, axis)]
    sizes = [math.prod(axis.size for axis in part) for part in parts]
    for dims, ends in blocks(sizes, op.out.shape):
        if len(dims) == 1 or len(ends) == 1 or not set(ends) & set(live_out) or _cut_in_space(op, parts, dims, ends):
            continue
        edges = ((dims[0], ends[0]), (dims[-1], ends[-1]))
        sides = [(dim, end) for dim, end in edges if all(map(op.is_space, parts[dim]))]
        covering = [end for _, end in sides]
        # A number that the space is a multiple of cuts it between channels: where it is none, the graph has a guard.
        if any(
            found is not None and True not in found and sizes[dim] % op.out.shape[end]
            for found, dim, end in ((read[end], dim, end) for dim, end in sides)
        ):
            return True
        if covering and any(read[d] == {True} for d in ends if d in live_out and d not in covering):
            return True
    return _moves_ones(op, before, (live_in[0], live_in[-1] + 1), (live_out[0], live_out[-1] + 1))


def _moves_ones(op: LabelledOp, before: Labels, live_in: tuple[int, int], live_out: tuple[int, int]) -> bool:
    """Whether space of size 1, which shows in no block, moves from before the channels to behind them.

    ``live_in`` and ``live_out`` are where the channels begin and end in what goes in and in the view.
    """
    read = op.read_from()
    lead = [axis for axis in before[: live_in[0]] if axis.size == 1 and op.is_space(axis)]
    ones = [size == 1 and found == {True} for size, found in zip(op.out.shape, read, strict=True)]
    behind = [d for d in range(live_out[1], len(ones)) if ones[d]]
    if any(op.reads(d, axis) for d in behind for axis in lead):
        return True
    from_nowhere = not any(map(op.is_space, before[live_in[1] :]))
    return bool(behind) and from_nowhere and len(lead) > sum(ones[: live_out[0]])


def _parts(op: LabelledOp, axis: Axis) -> Iterator[list[Axis]]:
    """What an earlier view made a dim of, channels and space apart: taken apart again, it may tear them too."""
    factors = [factor for factor in factors_of(axis) if factor.size != 1]
    if not any(map(op.is_space, factors)):
        yield [axis]
        return
    for _, found in itertools.groupby(factors, op.is_space):
        yield [*found]


def _cut_in_space(op: LabelledOp, before: Sequence[Sequence[Axis]], dims: list[int], ends: list[int]) -> bool:
    """Whether the first or the last size holds all channels of a block whole, so that only space is cut.

    ``(N, C, H)`` viewed as ``(N * C * n, k)`` cuts H alone, for whatever number n is.
    """
    live = [i for i, d in enumerate(dims) if any(map(any, map(atoms_of, before[d])))]
    if not live:
        return False
    first, last = ([axis for d in part for axis in before[d]] for part in (dims[: live[-1] + 1], dims[live[0] :]))
    return op.is_multiple(ends[0], first) or op.is_multiple(ends[-1], last)


def reshape_labels(op: LabelledOp, labels: Labels, shape: Sequence[int]) -> Labels:
    """The labels of ``shape`` when its elements are those of ``labels`` in row-major order."""
    if 0 in shape:
        return _reshape_empty(op, labels, shape)
    out: dict[int, Axis] = {}
    for dims, ends in blocks([axis.size for axis in labels], shape):
        block: Axis = labels[dims[0]] if len(dims) == 1 else Prod(labels[d] for d in dims)
        for d in ends[:-1]:
            out[d], block = op.split(block, shape[d], block.size // shape[d])
        out[ends[-1]] = block
    return tuple(out.get(d) or op.fixed(1, "size 1") for d in range(len(shape)))


def _reshape_empty(op: LabelledOp, labels: Labels, shape: Sequence[int]) -> Labels:
    """A view of no elements (tokens of an expert that nobody chose): the other dims are matched as if it had one."""
    full = tuple(op.fixed(1, "empty") if axis.size == 0 else axis for axis in labels)
    wanted = [n or 1 for n in shape]
    if math.prod(axis.size for axis in full) != math.prod(wanted):
        return tuple(op.fixed(n, "empty") for n in shape)
    found = reshape_labels(op, full, wanted)
    return tuple(op.fixed(0, "empty") if n == 0 else axis for n, axis in zip(shape, found, strict=True))


def channel_shuffle(op: LabelledOp) -> Labels:
    """x: (N, G*C, *s) -> (N, C*G, *s)."""
    x, groups = op.arg(0, "self"), int(op.arg(1, "groups"))
    labels = op[x]
    group, inner = op.split(labels[1], groups, labels[1].size // groups)
    op.facts.notes["groups"] = group
    return (labels[0], Prod((inner, group)), *labels[2:])


def pixel_shuffle(op: LabelledOp) -> Labels:
    """x: (..., C*r*r, H, W) -> (..., C, H*r, W*r): the r*r copies become pixels, so they stay."""
    x, r = op.arg(0, "self"), int(op.arg(1, "upscale_factor"))
    labels = op[x]
    channels, copies = op.split(labels[-3], labels[-3].size // (r * r), r * r)
    op.freeze(copies, "they become pixels")
    for axis in labels[-2:]:
        op.freeze(axis, "not a channel dim")
    return (*labels[:-3], channels, *(op.fixed(n) for n in op.out.shape[-2:]))


def pixel_unshuffle(op: LabelledOp) -> Labels:
    """x: (..., C, H*r, W*r) -> (..., C*r*r, H, W)."""
    x, r = op.arg(0, "self"), int(op.arg(1, "downscale_factor"))
    labels = op[x]
    for axis in labels[-2:]:
        op.freeze(axis, "not a channel dim")
    return (*labels[:-3], Prod((labels[-3], op.fixed(r * r, "pixels"))), *(op.fixed(n) for n in op.out.shape[-2:]))


def as_real(op: LabelledOp) -> Labels:
    """``view_as_real``: a complex number becomes two indices of a new last dim."""
    return (*op[op.arg(0, "self")], op.fixed(2, "real and imaginary"))


def as_complex(op: LabelledOp) -> Labels:
    """``view_as_complex``: the last dim, of size 2, becomes a complex number."""
    labels = op[op.arg(0, "self")]
    op.freeze(labels[-1], "real and imaginary")
    return labels[:-1]
