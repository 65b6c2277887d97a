"""Operators that pick by index: the dim that is indexed is frozen, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

from chase_fx.graphs.axes import Axis
from chase_fx.graphs.rules.base import LabelledOp, Labels, Refusal

__all__ = ["embedding", "gather", "index", "index_select", "masked_fill"]


def embedding(op: LabelledOp) -> Labels:
    """``embedding(w, indices)``: w (V, C), indices (...) -> (..., C); any row may be asked for."""
    w, indices = op.arg(0, "weight"), op.arg(1, "indices")
    op.freeze(op[w][0], "rows are looked up by index")
    op.produce(op[w][1])
    return (*op[indices], op[w][1])


def index_select(op: LabelledOp) -> Labels:
    """``index_select(x, dim, index)``."""
    x, dim, picked = op.arg(0, "self"), int(op.arg(1, "dim")), op.arg(2, "index")
    labels = list(op[x])
    d = dim % len(labels)
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

    Masks (bool) have as many dims as they index and give a dim of unknown length.
    """
    x, indices = op.arg(0, "self"), op.arg(1, "indices")
    labels = list(op[x])
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
        broadcast = _align(op, broadcast, list(op[slot]))
        d += width
    kept += [(k, labels[k]) for k in range(d, len(labels))]
    inserted = len(op.out.shape) - len(kept)
    if masked or inserted != len(broadcast):
        broadcast = [op.fixed(n, "looked up") for n in _middle(op, kept, indexed, inserted)]
    adjacent = not indexed or indexed[-1] - indexed[0] + 1 == len(indexed)
    at = sum(1 for k, _ in kept if adjacent and indexed and k < indexed[0])
    axes = [axis for _, axis in kept]
    return (*axes[:at], *broadcast, *axes[at:])


def _align(op: LabelledOp, a: list[Axis], b: list[Axis]) -> list[Axis]:
    if len(a) < len(b):
        a, b = b, a
    out = list(a)
    for k in range(1, len(b) + 1):
        x, y = a[-k], b[-k]
        if x.size == y.size:
            op.tie(x, y)
        elif x.size == 1:
            out[-k] = y
    return out


def _middle(op: LabelledOp, kept: Sequence[tuple[int, Axis]], indexed: list[int], inserted: int) -> Sequence[int]:
    adjacent = not indexed or indexed[-1] - indexed[0] + 1 == len(indexed)
    at = sum(1 for k, _ in kept if adjacent and indexed and k < indexed[0])
    return op.out.shape[at : at + inserted]


def masked_fill(op: LabelledOp) -> Labels:
    """``masked_fill(x, mask, value)``: the mask broadcasts to x."""
    x = op.arg(0, "self")
    for slot in op.op.inputs():
        for back in range(1, min(len(slot.shape), len(x.shape)) + 1):
            if slot is not x and slot.shape[-back] == x.shape[-back]:
                op.tie(op[x][-back], op[slot][-back])
    return op[x]
