"""Operators that pick by index: the dim that is indexed is frozen, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chase_fx.graphs.axes import Axis, atoms_of
from chase_fx.graphs.rules.base import LabelledOp, Labels, Refusal
from chase_fx.graphs.rules.dims import align
from chase_fx.graphs.tape import Slot

__all__ = [
    "embedding",
    "embedding_bag",
    "flat",
    "gather",
    "in_order",
    "index",
    "index_add",
    "index_fill",
    "index_put",
    "index_select",
    "members",
    "packed",
    "places",
    "scatter",
    "scatter_diagonal",
    "scatter_slice",
]


def embedding(op: LabelledOp) -> Labels:
    """``embedding(w, indices)``: w (V, C), indices (...) -> (..., C); any row may be asked for."""
    w, indices = op.arg(0, "weight"), op.arg(1, "indices")
    op.freeze(op[w][0], "rows are looked up by index")
    op.produce(op[w][1])
    return (*op[indices], op[w][1])


def embedding_bag(op: LabelledOp) -> Sequence[Labels]:
    """``_embedding_bag(w, indices, offsets, ...)``: rows of w (V, C) summed or averaged in bags -> (B, C)."""
    w = op.arg(0, "weight")
    op.freeze(op[w][0], "rows are looked up by index")
    op.produce(op[w][1])
    outs: list[Labels] = [(op.fixed(op.out.shape[0], "bags"), op[w][1])]
    return outs + [tuple(op.fixed(n, "bookkeeping") for n in out.shape) for out in op.op.outs[1:]]


def index_select(op: LabelledOp) -> Labels:
    """``index_select(x, dim, index)``: a constant index picks channels, any other freezes them."""
    x, dim, picked = op.arg(0, "self"), int(op.arg(1, "dim")), op.arg(2, "index")
    labels = list(op[x])
    d = dim % len(labels)
    if _picks(op, x, d, picked, labels):
        return tuple(labels)
    op.freeze(labels[d], "looked up by index")
    labels[d] = op[picked][0] if op[picked] else op.fixed(1, "size 1")
    return tuple(labels)


def gather(op: LabelledOp) -> Labels:
    """``gather(x, dim, index)``: the shape is that of the index; the gathered dim is frozen."""
    x, dim, picked = op.arg(0, "self"), int(op.arg(1, "dim")), op.arg(2, "index")
    if not op[x]:
        return op[picked]
    d = dim % len(x.shape)
    out: list[Axis] = []
    op.freeze(op[x][d], "looked up by index")
    for k, (a, b) in enumerate(zip(op[x], op[picked], strict=True)):
        if k != d:
            if a.size == b.size:
                op.tie(a, b)
            else:
                op.freeze(a, "partly looked up")
        out.append(b)
    return tuple(out)


def index(op: LabelledOp) -> Labels | Refusal:
    """``x[i, :, j]`` with index tensors: indexed dims are frozen; results of the indices broadcast.

    A single constant index of one dim picks channels: out index i is x index index[i].

    Masks (bool) have as many dims as they index and give a dim of unknown length.
    """
    x, indices = op.arg(0, "self"), op.arg(1, "indices")
    labels = list(op[x])
    given = [d for d, slot in enumerate(indices) if slot is not None]
    if len(given) == 1 and _picks(op, x, given[0], indices[given[0]], labels):
        return tuple(labels)
    d = 0
    kept: list[tuple[int, Axis]] = []
    indexed: list[int] = []
    broadcast: list[Axis] = []
    masked = False
    for slot in indices:
        if slot is None:
            kept.append((d, labels[d]))
            d += 1
            continue
        width = len(slot.shape) if slot.dtype.is_signed is False and str(slot.dtype) == "torch.bool" else 1
        masked = masked or str(slot.dtype) == "torch.bool"
        for k in range(d, d + width):
            op.freeze(labels[k], "looked up by index")
            indexed.append(k)
        for axis in op[slot]:
            if masked:
                op.freeze(axis, "a mask")
        broadcast = align(op, broadcast, list(op[slot]))
        d += width
    kept += [(k, labels[k]) for k in range(d, len(labels))]
    if masked:
        inserted = 1 if op.name.endswith("put") or op.name.endswith("put_") else len(op.out.shape) - len(kept)
        sizes = (1,) * inserted if "put" in op.name else _middle(op, kept, indexed, inserted)
        broadcast = [op.fixed(n, "looked up") for n in sizes]
    adjacent = not indexed or indexed[-1] - indexed[0] + 1 == len(indexed)
    at = sum(1 for k, _ in kept if adjacent and indexed and k < indexed[0])
    axes = [axis for _, axis in kept]
    return (*axes[:at], *broadcast, *axes[at:])


def _picks(op: LabelledOp, x: Slot, dim: int, index: Slot, labels: list[Axis]) -> bool:
    """Whether ``index`` is one of channels that is the same in every call; then ``labels`` of x become the result's.

    A table of which rows are read several times is looked up, not put in order.
    """
    if len(index.shape) != 1 or not any(atoms_of(labels[dim])):
        return False
    places = op.told_index()
    if places is None or (x.kind == "parameter" and len(np.unique(places)) < len(places)):
        return False
    for axis in op[index]:
        op.freeze(axis, "an index of channels")
    labels[dim] = op.facts.notes["picked"] = op.pick(labels[dim], places % labels[dim].size)
    return True


def _middle(op: LabelledOp, kept: Sequence[tuple[int, Axis]], indexed: list[int], inserted: int) -> Sequence[int]:
    adjacent = not indexed or indexed[-1] - indexed[0] + 1 == len(indexed)
    at = sum(1 for k, _ in kept if adjacent and indexed and k < indexed[0])
    return op.out.shape[at : at + inserted]


def scatter(op: LabelledOp) -> Labels:
    """``scatter(x, dim, index, src)``, ``scatter_add``, ``scatter_reduce``: the written dim is frozen."""
    x, dim = op.arg(0, "self"), int(op.arg(1, "dim"))
    if not op[x]:
        return op[x]
    d = dim % len(x.shape)
    op.freeze(op[x][d], "written by index")
    for slot in op.op.inputs():
        if slot is x or len(slot.shape) != len(x.shape):
            continue
        for k, (a, b) in enumerate(zip(op[x], op[slot], strict=True)):
            if k == d:
                op.freeze(b, "written by index")
            elif a.size == b.size:
                op.tie(a, b)
            else:
                op.freeze(a, "partly written")
                op.freeze(b, "partly written")
    return op[x]


def index_add(op: LabelledOp) -> Labels:
    """``index_add(x, dim, index, source)``, ``index_copy``, ``index_reduce``: the written dim is frozen.

    A constant index says which channels are written: index i of the source goes with index index[i] of x.
    """
    x, dim, source = op.arg(0, "self"), int(op.arg(1, "dim")), op.arg(3, "source")
    d = dim % len(x.shape)
    labels = list(op[x])
    if _picks(op, x, d, op.arg(2, "index"), labels):
        for a, b in zip(labels, op[source], strict=True):
            op.tie(a, b)
        return op[x]
    for k, (a, b) in enumerate(zip(op[x], op[source], strict=True)):
        if k == d:
            op.freeze(a, "written by index")
            op.freeze(b, "written by index")
        else:
            op.tie(a, b)
    for axis in op[op.arg(2, "index")]:
        op.freeze(axis, "an index")
    return op[x]


def index_put(op: LabelledOp) -> Labels | Refusal:
    """``x[i, :, j] = values``: indexed dims are frozen, the others are those of the values; see :func:`index`."""
    x, values = op.arg(0, "self"), op.arg(2, "values")
    found = index(op)
    if isinstance(found, Refusal):
        return found
    for back in range(1, min(len(found), len(values.shape)) + 1):
        if found[-back].size == values.shape[-back]:
            op.tie(found[-back], op[values][-back])
    return op[x]


def places(op: LabelledOp) -> Sequence[Labels]:
    """``nonzero``, ``unique``, ``histc``...: which places or values there are depends on all of them."""
    return op.all_fixed("its places are data")


def in_order(op: LabelledOp) -> Labels | Refusal:
    """``masked_scatter(x, mask, source)``: places that are set take the elements of the source one after the other.

    x: (*s, *C), mask: the same for all of C, source: (n, *C) -> (*s, *C)
    """
    x, mask, source = op.arg(0, "self"), op.arg(1, "mask"), op.arg(2, "source")
    rows = 0  # how many dims, from the end, are written as a whole
    while rows < len(x.shape) and rows < len(source.shape) and x.shape[-1 - rows] == source.shape[-1 - rows]:
        if rows < len(mask.shape) and mask.shape[-1 - rows] != 1 and (mask.stride is None or mask.stride[-1 - rows]):
            break
        rows += 1
    for slot in (x, mask, source):
        for axis in op[slot][: max(len(slot.shape) - rows, 0)]:
            op.freeze(axis, "the elements of the source are written in their order")
    for back in range(1, rows + 1):
        op.tie(op[x][-back], op[source][-back])
        if back <= len(mask.shape) and mask.shape[-back] != 1:
            op.tie(op[x][-back], op[mask][-back])
    return op[x]


def flat(op: LabelledOp) -> Sequence[Labels]:
    """``take``, ``put``, ``as_strided_scatter``: elements are counted over all dims."""
    return op.all_fixed("it is addressed by its number of elements")


def scatter_diagonal(op: LabelledOp) -> Labels:
    """``diagonal_scatter(x, src, offset, dim1, dim2)``: the two dims are matched by place, the others pass."""
    x, src = op.arg(0, "self"), op.arg(1, "src")
    n = len(x.shape)
    written = {int(op.arg(3, "dim1", 0)) % n, int(op.arg(4, "dim2", 1)) % n}
    for axis in (*(op[x][d] for d in written), op[src][-1]):
        op.freeze(axis, "a diagonal is written")
    for a, b in zip((axis for d, axis in enumerate(op[x]) if d not in written), op[src][:-1], strict=True):
        op.tie(a, b)
    return op[x]


def members(op: LabelledOp) -> Labels:
    """``isin(elements, test_elements)``: each element by itself, compared with all of the others."""
    elements, tests = op.named("elements", op.named("element")), op.named("test_elements", op.named("test_element"))
    if not isinstance(elements, Slot):
        return tuple(op.all_fixed("compared with a number")[0])
    if isinstance(tests, Slot):
        for axis in op[tests]:
            op.freeze(axis, "all of it is compared with")
    return op[elements]


def index_fill(op: LabelledOp) -> Labels:
    """``index_fill(x, dim, index, value)``: the written dim is frozen unless the index is constant, the others pass."""
    x = op.arg(0, "self")
    labels = op[x]
    if labels:
        d = int(op.arg(1, "dim")) % len(labels)
        if not _picks(op, x, d, op.arg(2, "index"), list(labels)):
            op.freeze(labels[d], "written by index")
    return labels


def scatter_slice(op: LabelledOp) -> Labels:
    """``slice_scatter(x, src, dim, ...)``, ``select_scatter``: a part of ``dim`` is written, so it is frozen."""
    x, src = op.arg(0, "self"), op.arg(1, "src")
    d = int(op.arg(2, "dim", 0)) % len(x.shape)
    op.freeze(op[x][d], "a part of it is written")
    rest = [axis for k, axis in enumerate(op[x]) if k != d or len(src.shape) == len(x.shape)]
    for a, b in zip(rest, op[src], strict=True):
        if a.size == b.size:
            op.tie(a, b)
        else:
            op.freeze(b, "it is a part")
    return op[x]


def packed(op: LabelledOp) -> Sequence[Labels]:
    """``_pack_padded_sequence(x, lengths, batch_first)``: x (T, N, *C) -> real steps (S, *C) and counts."""
    x = op.arg(0, "input")
    for axis in op[x][:2]:
        op.freeze(axis, "sequences are cut to their lengths")
    steps, counts = op.op.outs
    return [(op.fixed(steps.shape[0], "steps"), *op[x][2:]), (op.fixed(counts.shape[0], "counts"),)]
