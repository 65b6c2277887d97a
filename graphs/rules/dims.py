"""Dim arguments of reductions."""

from __future__ import annotations

from collections.abc import Sequence

from chase_fx.graphs.axes import Axis
from chase_fx.graphs.rules.base import LabelledOp, Labels
from chase_fx.graphs.tape import Slot

__all__ = ["align", "reduced_dims", "reduced_labels"]


def reduced_dims(slot: Slot, dims: int | Sequence[int] | None) -> list[int]:
    """A ``dim`` argument as non-negative dims of ``slot``; none given means all of them."""
    n = len(slot.shape)
    if isinstance(dims, int):
        return [int(dims) % n]
    return [int(d) % n for d in dims] if dims else list(range(n))


def reduced_labels(op: LabelledOp, slot: Slot, dims: Sequence[int]) -> Labels:
    """The labels of ``slot`` without ``dims``, or with size 1 there if the operator was called with ``keepdim``."""
    keepdim = len(op.out.shape) == len(slot.shape)
    labels = []
    for d, axis in enumerate(op[slot]):
        if d not in dims:
            labels.append(axis)
        elif keepdim:
            labels.append(op.fixed(1, "size 1"))
    return tuple(labels)


def align(op: LabelledOp, a: list[Axis], b: list[Axis]) -> list[Axis]:
    """Dims of two operands that are broadcast to each other."""
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
