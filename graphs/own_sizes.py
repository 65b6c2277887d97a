"""What an autograd function, which stays one call, does with the sizes that it reads.

Nobody sees its arithmetic, and in a slim graph it reads slim sizes, where the model has dense ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from chase_fx.graphs.reach import codes_in
from chase_fx.graphs.tape import TapedOp

__all__ = ["mark_own_sizes"]

_SIZES = frozenset({"shape", "size", "numel", "nelement"})


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
        if reads and torch.Tag.pointwise in op.op.tags:
            numbers = [v for v in (*op.args, *op.kwargs.values()) if _is_number(v)]
            if any(v not in known and -v not in known for v in numbers):
                op.whole = op.whole or "inside an autograd function, scaled by a number that may be a size"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
