"""Operators that put the indices of a dim in another order."""

from __future__ import annotations

import numpy as np

from chase_fx.graphs.axes import Axis, Cat, Fixed, resolve
from chase_fx.graphs.rules.base import LabelledOp, Labels

__all__ = ["flip", "roll", "turn"]


def flip(op: LabelledOp) -> Labels:
    """``flip(x, dims)``: index i becomes n-1-i."""
    labels = list(op[op.arg(0, "self")])
    for d in op.arg(1, "dims"):
        labels[int(d)] = _flipped(op, labels[int(d)])
    return tuple(labels)


def turn(op: LabelledOp) -> Labels:
    """``rot90(x, k, (a, b))``: a quarter turn flips ``b`` and lets the two dims change places."""
    labels = list(op[op.arg(0, "self")])
    a, b = op.arg(2, "dims", (0, 1))
    for _ in range(int(op.arg(1, "k", 1)) % 4):
        labels[a], labels[b] = _flipped(op, labels[b]), labels[a]
    return tuple(labels)


def _flipped(op: LabelledOp, axis: Axis) -> Axis:
    return axis if isinstance(resolve(axis), Fixed) else op.pick(axis, np.arange(axis.size)[::-1])


def roll(op: LabelledOp) -> Labels:
    """``roll(x, shifts, dims)``: the end of a dim is put in front of its beginning."""
    x, shifts, dims = op.arg(0, "self"), op.arg(1, "shifts"), op.arg(2, "dims", ())
    labels = list(op[x])
    if not dims or op.op.own_sizes or op.op.call != "roll":
        for axis in labels:
            op.freeze(axis, "rolled")
        return tuple(labels)
    for shift, d in zip(shifts, dims, strict=True):
        axis = labels[int(d)]
        if not isinstance(resolve(axis), Fixed):
            cut = axis.size - int(shift) % axis.size
            labels[int(d)] = Cat((op.take(axis, cut, axis.size), op.take(axis, 0, cut)))
    return tuple(labels)
