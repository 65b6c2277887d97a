"""Operators that make tensors: constants can shrink with what they meet, the rest is fixed."""

from __future__ import annotations

from collections.abc import Sequence

from chase_fx.graphs.rules.base import LabelledOp, Labels

__all__ = ["constant", "fixed", "sequence"]

# Calls of which the rewrite can take the kept places; what torch makes inside of another call is out of its reach.
_SEQUENCES = frozenset({"arange", "linspace", "logspace", "eye"})


def constant(op: LabelledOp) -> Sequence[Labels]:
    """``zeros``, ``ones``, ``full``, ``empty``: the same value everywhere, so any indices may go."""
    return [tuple(op.fresh(n, d, weak=True) for d, n in enumerate(out.shape)) for out in op.op.outs]


def sequence(op: LabelledOp) -> Sequence[Labels]:
    """``arange``, ``linspace``, ``eye``: the value at a place is told by the place, so any places may go.

    The slim graph makes all of them and takes those that are kept.
    """
    if op.op.call not in _SEQUENCES or "out" in op.op.kwargs:
        return op.all_fixed("made by its size")
    size = op.out.shape
    if len(set(size)) > 1:
        return op.all_fixed("rows and columns are matched by place")
    axis = op.fresh(size[0], 0, weak=True)  # the rows and columns of an identity are the same units
    return [(axis,) * len(size)]


def fixed(op: LabelledOp) -> Sequence[Labels]:
    """``rand``, ``randperm``: a smaller draw would be another draw."""
    return op.all_fixed("made by its size")
