"""Operators that move elements without changing them: permutations, slices, concatenation, padding, copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chase_fx.graphs.axes import Axis, Cat, Fixed, Prod, resolve
from chase_fx.graphs.rules.base import LabelledOp, Labels, Refusal
from chase_fx.graphs.tables import TABLE
from chase_fx.graphs.tape import Slot

__all__ = [
    "block_diagonal",
    "concat",
    "diagonal",
    "diagonal_embedding",
    "expand",
    "fold",
    "identity",
    "narrow",
    "pad",
    "permute",
    "repeat",
    "repeat_interleave",
    "restride",
    "select",
    "slice_",
    "split",
    "squeeze",
    "stack",
    "swap_last",
    "transpose",
    "triangle",
    "unbind",
    "unfold",
    "unsqueeze",
]


def identity(op: LabelledOp) -> Labels:
    """The same dims in the same order (contiguous, detach, alias)."""
    x, *rest = op.op.inputs()
    return op[x] if op.op.call != TABLE else _table(op, x, *rest)


def _table(op: LabelledOp, made: Slot, buffer: Slot) -> Labels:
    """It is made whole, then cut like the buffer along the dims that the inputs leave as they are there."""
    for axis in op[made]:
        op.freeze(axis, "a table that the sizes of the inputs decide")
    same = [len(buffer.shape) == len(made.shape) and buffer.shape[d] == n for d, n in enumerate(made.shape)]
    return tuple(op[buffer][d] if same[d] else op.fixed(n) for d, n in enumerate(made.shape))


def permute(op: LabelledOp) -> Labels:
    """``permute(x, dims)``: out dim d is x dim dims[d]."""
    labels = op[op.arg(0, "self")]
    return tuple(labels[d] for d in op.arg(1, "dims"))


def transpose(op: LabelledOp) -> Labels:
    """``transpose(x, a, b)``."""
    labels = list(op[op.arg(0, "self")])
    if labels:
        a, b = int(op.arg(1, "dim0")) % len(labels), int(op.arg(2, "dim1")) % len(labels)
        labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


def swap_last(op: LabelledOp) -> Labels:
    """``t(x)``: the dims of a matrix the other way round."""
    return tuple(reversed(op[op.arg(0, "self")]))


def squeeze(op: LabelledOp) -> Labels:
    """Dims of size 1 go, all of them or the named ones."""
    x = op.arg(0, "self")
    dims: Any = op.arg(1, "dim")
    n = len(x.shape)
    if dims is None:
        gone = {d for d in range(n) if x.shape[d] == 1}
    else:
        named = dims if isinstance(dims, (list, tuple)) else [dims]
        gone = {int(d) % n for d in named if n and x.shape[int(d) % n] == 1}
    return tuple(axis for d, axis in enumerate(op[x]) if d not in gone)


def unsqueeze(op: LabelledOp) -> Labels:
    """A dim of size 1 at ``dim``."""
    labels = list(op[op.arg(0, "self")])
    labels.insert(int(op.arg(1, "dim")) % (len(labels) + 1), op.fixed(1, "size 1"))
    return tuple(labels)


def expand(op: LabelledOp) -> Labels:
    """``expand(x, sizes)``: a repeated dim of size 1 holds copies of which any number may be kept."""
    x = next(op.op.inputs())
    labels, sizes = op[x], op.named("size", ())
    new = len(op.out.shape) - len(labels)
    out: list[Axis] = []
    for d, size in enumerate(op.out.shape):
        if d >= new and x.shape[d - new] == size:
            named = size == 1 and d < len(sizes) and sizes[d] == 1  # by a number that may be larger in another call
            out.append(op.fixed(1) if named else labels[d - new])
            if op.op.call in _TAKES_SIZES and size != 1:
                _agree(op, labels[d - new], len(op.out.shape) - d)
        else:
            out.append(_copies(op, x, size, d))
    return tuple(out)


# The calls that name the expanded sizes; any other takes them from another operand.
_NAMES_SIZES = frozenset({"expand", "broadcast_to", "repeat", "tile"})
# Those that take all of them from their operands, which have to fit whether or not their values are read.
_TAKES_SIZES = frozenset({"broadcast_tensors", "expand_as"})
# In a dim that no operand has, it copies heads of the keys as often as the queries have more of them.
_ATTENTION = "scaled_dot_product_attention"


def _copies(op: LabelledOp, x: Slot, size: int, dim: int) -> Axis:
    if op.op.call == "meshgrid":
        return _across(op, x, size, dim)
    if op.op.call in _NAMES_SIZES and op.read_from()[dim] == {True}:
        return op.fixed(size)  # one for each sample or place: sizes that are read from here are read from space
    copies = op.fresh(size, dim, weak=True)
    if op.op.call in _NAMES_SIZES:
        return copies
    if op.op.call == _ATTENTION and len(x.shape) > max(len(slot.shape) for slot in op.op.operands):
        return copies
    back = len(op.out.shape) - dim
    for other in op.op.operands:
        if other is not x and len(other.shape) >= back and other.shape[-back] == size:
            op.tie(copies, op[other][-back])
            return copies
    return op.fixed(size, "broadcast to a size that no operand tells")


def _agree(op: LabelledOp, axis: Axis, back: int) -> None:
    """Tie the operands' dims that are ``back`` from the right, but for those that are broadcast."""
    for other in op.op.operands:
        if len(other.shape) >= back and other.shape[-back] == axis.size:
            op.tie(axis, op[other][-back])


def _across(op: LabelledOp, x: Slot, size: int, dim: int) -> Axis:
    """A dim of a ``meshgrid`` that runs over another operand: in the order given, or with the first two exchanged."""
    vectors = list(op.op.operands)
    for order in (vectors, [*vectors[1::-1], *vectors[2:]]):
        own = [d for d, n in enumerate(x.shape) if n != 1]
        same = all(order[d].shape and resolve(op[order[d]][0]) is resolve(op[x][d]) for d in own)
        if same and order[dim].shape == (size,):
            return op[order[dim]][0]
    return op.fixed(size, "a grid over a size that no operand tells")


def restride(op: LabelledOp) -> Labels | Refusal:
    """``as_strided(x, size, stride, offset)``: dims that keep size and stride pass, windows run over the others.

    x: (B, S, C) with strides (s, c, 1) -> (B, N, W, C) with strides (s, n*c, c, 1): W rows from each n-th on
    """
    x = op.arg(0, "self")
    size, stride, offset = op.arg(1, "size"), op.arg(2, "stride"), op.arg(3, "storage_offset")
    sized = [found for found in zip(x.shape, x.stride or (), strict=False) if found[0] != 1]
    if x.stride is None or len(set(sized)) < len(sized):
        return Refusal("as_strided addresses memory, not axes")
    if offset is not None:
        return Refusal("as_strided addresses memory by an offset")
    left = dict(enumerate(zip(x.shape, x.stride, strict=True)))
    out: list[Axis] = []
    for n, s in zip(size, stride, strict=True):
        same = next((d for d, found in left.items() if found == (n, s)), None)
        if n != 1 and same is not None:
            del left[same]
            out.append(op[x][same])
        else:
            out.append(op.fixed(n, "windows"))
    for d in left:
        op.freeze(op[x][d], "windows run over it")
    return tuple(out)


def concat(op: LabelledOp) -> Labels:
    """Channels of ``cat(xs, dim)`` are those of its inputs laid end to end.

    xs[i]: (N, C_i, *s) -> out: (N, sum(C_i), *s) for dim = 1
    """
    xs = [x for x in op.arg(0, "tensors") if not (len(x.shape) == 1 and x.shape[0] == 0)]
    if not xs:
        return (op.fixed(0, "empty"),)
    dim = int(op.arg(1, "dim", 0)) % len(op.out.shape)
    for x in xs[1:]:
        for d, (a, b) in enumerate(zip(op[xs[0]], op[x], strict=True)):
            if d != dim:
                op.tie(a, b)
    joined: Axis = Cat(op[x][dim] for x in xs) if len(xs) > 1 else op[xs[0]][dim]
    return tuple(joined if d == dim else axis for d, axis in enumerate(op[xs[0]]))


def block_diagonal(op: LabelledOp) -> Labels:
    """``block_diag(xs)``: rows are those of the inputs laid end to end, columns likewise, zeros outside of the blocks.

    xs[i]: (R_i, C_i), or (C_i,) for one row, or a number -> out: (sum(R_i), sum(C_i))
    """
    blocks = [(*[op.fixed(1, "size 1")] * (2 - len(x.shape)), *op[x]) for x in op.arg(0, "tensors")]
    return Cat(rows for rows, _ in blocks), Cat(columns for _, columns in blocks)


def stack(op: LabelledOp) -> Labels:
    """``stack(xs, dim)``: a new dim whose indices are chosen by position."""
    xs = op.arg(0, "tensors")
    dim = int(op.arg(1, "dim", 0)) % len(op.out.shape)
    for x in xs[1:]:
        for a, b in zip(op[xs[0]], op[x], strict=True):
            op.tie(a, b)
    labels = list(op[xs[0]])
    labels.insert(dim, op.fixed(len(xs), "stacked"))
    return tuple(labels)


def slice_(op: LabelledOp) -> Labels:
    """``slice(x, dim, start, end, step)``; a step is a view of rows of ``step`` of which one index is taken."""
    x = op.arg(0, "self")
    n = len(x.shape)
    dim = int(op.arg(1, "dim", 0)) % n
    size = x.shape[dim]
    step = int(op.arg(4, "step", 1))
    start, stop, _ = slice(op.arg(2, "start"), op.arg(3, "end"), step).indices(size)
    labels = list(op[x])
    axis = labels[dim]
    stop = max(start, stop)
    if step == 1:
        labels[dim] = op.take(axis, start, stop)
    else:
        labels[dim] = _strided(op, axis, start, stop, step)
    return tuple(labels)


def narrow(op: LabelledOp) -> Labels:
    """``narrow_copy(x, dim, start, length)``."""
    labels = list(op[op.arg(0, "self")])
    dim, start = int(op.arg(1, "dim")), int(op.arg(2, "start"))
    start %= max(labels[dim].size, 1)
    labels[dim] = op.take(labels[dim], start, start + int(op.arg(3, "length")))
    return tuple(labels)


def _strided(op: LabelledOp, axis: Axis, start: int, stop: int, step: int) -> Axis:
    count = op.out.shape[int(op.arg(1, "dim", 0))]
    if isinstance(resolve(axis), Fixed):
        return op.fixed(count, "a strided slice of a fixed dim")
    if axis.size % step == 0 and stop > axis.size - step and start < step:
        rows, _ = op.split(axis, axis.size // step, step)
        op.freeze(op.split(axis, axis.size // step, step)[1], "a strided slice takes it by its place")
        return rows
    op.freeze(axis, "a strided slice that is no view of rows")
    return op.fixed(count, "a strided slice that is no view of rows")


def select(op: LabelledOp) -> Labels:
    """``select(x, dim, index)``: the index is named in the code, so it stays."""
    x = op.arg(0, "self")
    labels = list(op[x])
    dim, index = int(op.arg(1, "dim")) % len(labels), int(op.arg(2, "index"))
    axis = labels.pop(dim)
    index %= axis.size
    op.freeze(op.take(axis, index, index + 1), "selected by its index")
    return tuple(labels)


def unbind(op: LabelledOp) -> Sequence[Labels]:
    """``unbind(x, dim)``: every index is named in the code."""
    x = op.arg(0, "self")
    labels = list(op[x])
    axis = labels.pop(int(op.arg(1, "dim", 0)) % len(labels))
    op.freeze(axis, "unbound into single tensors")
    return [tuple(labels) for _ in op.op.outs]


def split(op: LabelledOp) -> Sequence[Labels]:
    """``split``, ``chunk``, ``tensor_split``: consecutive slices, whose sizes the outputs tell."""
    x = op.arg(0, "self")
    dim = int(op.arg(2, "dim", 0)) % len(x.shape)
    labels = op[x]
    outs, start = [], 0
    for out in op.op.outs:
        piece = op.take(labels[dim], start, start + out.shape[dim])
        outs.append(tuple(piece if d == dim else axis for d, axis in enumerate(labels)))
        start += out.shape[dim]
    return outs


def pad(op: LabelledOp) -> Labels:
    """``constant_pad_nd(x, pad, value)``: padding on both ends of a live dim can shrink too."""
    x, amounts = op.arg(0, "self"), list(op.arg(1, "pad"))
    labels = list(op[x])
    for k in range(len(amounts) // 2):
        d = len(labels) - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        if before == 0 and after == 0:
            continue
        if before < 0 or after < 0 or isinstance(resolve(labels[d]), Fixed):
            op.freeze(labels[d], "cropped")
            labels[d] = op.fixed(op.out.shape[d], "padded")
            continue
        parts = (_padding(op, before, d), labels[d], _padding(op, after, d))
        labels[d] = Cat(p for p in parts if p.size)
    return tuple(labels)


def _padding(op: LabelledOp, size: int, dim: int) -> Axis:
    return op.fresh(size, dim, weak=True) if size else op.fixed(0, "no padding")


def repeat(op: LabelledOp) -> Labels:
    """``repeat(x, repeats)``: out index (r, i) is x index i."""
    x = op.arg(0, "self")
    repeats = op.arg(1, "repeats")
    labels = [op.fixed(1, "size 1")] * (len(repeats) - len(x.shape)) + list(op[x])
    out: list[Axis] = []
    for d, (axis, n) in enumerate(zip(labels, repeats, strict=True)):
        if axis.size == 1 and op.read_from()[d] == {True}:
            out.append(op.fixed(int(n)))
        elif n == 1:
            out.append(axis)
        elif n == 0:
            out.append(op.fixed(0, "empty"))
        else:
            copies = op.fresh(int(n), d, weak=True)
            out.append(copies if axis.size == 1 else Prod((copies, axis)))
    return tuple(out)


def repeat_interleave(op: LabelledOp) -> Labels | Refusal:
    """``repeat_interleave(x, n, dim)``: out index (i, r) is x index i."""
    x, n = op.arg(0, "self"), op.arg(1, "repeats")
    dim = op.arg(2, "dim")
    if not isinstance(n, int) or dim is None:
        return Refusal("the number of repeats is data")
    d = int(dim) % len(x.shape)
    labels = list(op[x])
    copies = op.fresh(n, d, weak=True)
    labels[d] = copies if labels[d].size == 1 else Prod((labels[d], copies))
    return tuple(labels)


def diagonal(op: LabelledOp) -> Labels:
    """``diagonal(x, offset, dim1, dim2)``: the two dims are matched by place, so both are frozen."""
    x = op.arg(0, "self")
    n = len(x.shape)
    a, b = int(op.arg(2, "dim1", 0)) % n, int(op.arg(3, "dim2", 1)) % n
    labels = op[x]
    op.freeze(labels[a], "a diagonal runs through it")
    op.freeze(labels[b], "a diagonal runs through it")
    rest = tuple(axis for d, axis in enumerate(labels) if d not in (a, b))
    return (*rest, op.fixed(op.out.shape[-1], "a diagonal"))


def diagonal_embedding(op: LabelledOp) -> Labels:
    """``diag_embed(x, offset, dim1, dim2)``: (..., C) -> (..., C, C) with x on the diagonal: rows go with columns."""
    x = op.arg(0, "self")
    n = len(x.shape) + 1
    dims = (int(op.arg(2, "dim1", -2)) % n, int(op.arg(3, "dim2", -1)) % n)
    labels = list(op[x])
    axis = labels.pop()
    if int(op.arg(1, "offset", 0)) != 0:
        op.freeze(axis, "a diagonal beside the middle")
        axis = op.fixed(op.out.shape[dims[0]], "a diagonal beside the middle")
    for d in sorted(dims):
        labels.insert(d, axis)
    return tuple(labels)


def triangle(op: LabelledOp) -> Labels:
    """``tril``, ``triu``: rows and columns are matched by place, so the last two dims are frozen."""
    labels = op[op.arg(0, "self")]
    for axis in labels[-2:]:
        op.freeze(axis, "a triangle is cut out of it")
    return labels


def fold(op: LabelledOp) -> Labels:
    """``unfold_backward(windows, sizes, dim, size, step)``: windows are added where they were taken from."""
    x, d = op.arg(0, "grad_in"), int(op.arg(2, "dim"))
    labels = list(op[x][:-1])
    d %= len(labels)
    for axis in (labels[d], op[x][-1]):
        op.freeze(axis, "windows run over it")
    labels[d] = op.fixed(op.out.shape[d], "windows")
    return tuple(labels)


def unfold(op: LabelledOp) -> Labels:
    """``unfold(x, dim, size, step)``: windows over ``dim``, which is frozen."""
    x = op.arg(0, "self")
    d = int(op.arg(1, "dimension")) % len(x.shape)
    labels = list(op[x])
    op.freeze(labels[d], "windows run over it")
    labels[d] = op.fixed(op.out.shape[d], "windows")
    return (*labels, op.fixed(op.out.shape[-1], "a window"))
