"""What an autograd function, which stays one call, and a gradient inside of the forward do with sizes that they read.

Nobody sees their arithmetic, and in a slim graph a function reads slim sizes, where the model has dense ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from chase_fx.graphs.reach import codes_in
from chase_fx.graphs.tape import TapedOp

__all__ = ["mark_gradients", "mark_own_sizes"]

_SIZES = frozenset({"shape", "size", "numel", "nelement"})
_OF_DERIVATIVES = frozenset({0.0, 0.5, 1.0, 1.5, 2.0, 3.0})  # of roots, squares and cubes


def mark_own_sizes(cls: Any, args: tuple[Any, ...], ops: Iterable[TapedOp]) -> None:
    """Mark the calls inside an autograd function: no size of theirs is replaced.

    Those that compute with a number that may be made of sizes (``1 / fan_in``) keep their channels. Numbers that the
    function is given, or that stand in its code, are not made of sizes.
    """
    codes = list(codes_in(inspect.unwrap(cls.forward).__code__))
    reads = not _SIZES.isdisjoint(name for code in codes for name in code.co_names)
    known = {v for values in (args, *(code.co_consts for code in codes)) for v in values if _is_number(v)}
    for op in ops:
        op.own_sizes = True
        if reads and any(v not in known and -v not in known for v in _scalars(op)):
            op.whole = op.whole or "inside an autograd function, scaled by a number that may be a size"


def mark_gradients(ops: Sequence[TapedOp], start: int) -> None:
    """Mark the calls from ``start`` on, which torch made for a gradient inside of the forward.

    The gradient of a mean is divided by how many there are, which is no size that could be replaced. Numbers that the
    forward computed with are none, and neither is what a power leaves.
    """
    known = {v for op in ops[:start] for v in _scalars(op)}
    known |= _OF_DERIVATIVES | {v - 1 for v in known}
    counted = False  # and with it what is computed from there on
    for op in ops[start:]:
        counted = counted or any(v not in known and -v not in known for v in _scalars(op))
        if counted:
            op.whole = op.whole or "in a gradient that the forward takes, scaled by a number that may be a size"


def _scalars(op: TapedOp) -> list[float]:
    if torch.Tag.pointwise not in op.op.tags:
        return []
    return [v for v in (*op.args, *op.kwargs.values()) if _is_number(v)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
