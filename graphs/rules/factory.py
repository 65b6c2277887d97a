"""Operators that make tensors: constants can shrink with what they meet, the rest is fixed."""

from __future__ import annotations

from collections.abc import Sequence

from chase_fx.graphs.rules.base import LabelledOp, Labels

__all__ = ["constant", "fixed"]


def constant(op: LabelledOp) -> Sequence[Labels]:
    """``zeros``, ``ones``, ``full``, ``empty``: the same value everywhere, so any indices may go."""
    return [tuple(op.fresh(n, d, weak=True) for d, n in enumerate(out.shape)) for out in op.op.outs]


def fixed(op: LabelledOp) -> Sequence[Labels]:
    """``arange``, ``eye``, ``rand``: values differ by place, or a smaller draw would be another draw."""
    return op.all_fixed("made by its size")
