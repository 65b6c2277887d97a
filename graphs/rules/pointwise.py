"""Operators that act on each element: sizes agree or are 1, so channels of all operands are the same channels."""

from __future__ import annotations

from chase_fx.graphs.rules.base import LabelledOp, Labels

__all__ = ["broadcast", "crossed", "cumulative", "gated", "like", "unary"]


def broadcast(op: LabelledOp) -> list[Labels]:
    """Operands are aligned at their last dims; a dim of size 1 is repeated and ties nothing.

    xs[i]: (..., C or 1) -> out: (..., C)
    """
    outs: list[Labels] = []
    for out in op.op.outs:
        labels = []
        for d, size in enumerate(out.shape):
            back = len(out.shape) - d
            label = None
            for slot in op.op.inputs():
                if len(slot.shape) < back or slot.shape[-back] != size:
                    continue
                axis = op[slot][-back]
                if label is None or (size == 1 and not op.is_space(label)):  # of parameters, it is 1 in every call
                    label = axis
                else:
                    op.tie(label, axis)
            labels.append(op.fixed(size, "size 1") if label is None else label)
        outs.append(tuple(labels))
    return outs


def crossed(op: LabelledOp) -> list[Labels]:
    """``linalg_cross(x, y, dim)``: the three indices of ``dim`` are mixed, the other dims are broadcast."""
    for slot in op.op.inputs():
        op.freeze(op[slot][int(op.arg(2, "dim", -1))], "the three indices of a cross product")
    return broadcast(op)


def unary(op: LabelledOp) -> list[Labels]:
    """Every output has the axes of the first operand (clone, dropout with its mask, casts); a number has none."""
    first = next(op.op.inputs(), None)
    outs = op.op.outs
    if first is None:
        return [tuple(op.fixed(n) for n in out.shape) for out in outs]
    return [op[first] if out.shape == first.shape else tuple(op.fixed(n) for n in out.shape) for out in outs]


def like(op: LabelledOp) -> Labels:
    """``zeros_like`` and ``ones_like``: constants of the operand's axes."""
    return op[op.arg(0, "self")]


def cumulative(op: LabelledOp) -> list[Labels]:
    """``cumsum(x, dim)``: each index depends on the ones before it, so ``dim`` is frozen."""
    slot = op.arg(0, "self")
    dim = int(op.arg(1, "dim", 0)) % max(len(slot.shape), 1)
    labels = op[slot]
    if labels:
        op.freeze(labels[dim], "a running reduction depends on every index")
    return [labels for _ in op.op.outs]


def gated(op: LabelledOp) -> Labels:
    """``glu(x, dim)``: the first half times the sigmoid of the second, so both halves keep the same channels.

    x: (N, 2*C, *s) -> out: (N, C, *s) for dim = 1
    """
    x = op.arg(0, "self")
    labels = list(op[x])
    dim = int(op.arg(1, "dim", -1)) % len(labels)
    half = x.shape[dim] // 2
    first, second = op.take(labels[dim], 0, half), op.take(labels[dim], half, 2 * half)
    op.tie(first, second)
    labels[dim] = first
    return tuple(labels)
