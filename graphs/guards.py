"""Guards: what a forward took for granted of its inputs' sizes and other plain values.

A capture holds one way through the model's Python code. Each decision that depended on a size is a node of the graph,
so that inputs for which the code would have gone another way are refused instead of computed wrongly. Guards are
ordinary functions: they run under ``torch.compile(fullgraph=True)``, in copies and in loaded modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx.node import has_side_effect

from chase_fx.errors import ArgumentError, OtherPathError

__all__ = ["GUARDS", "check", "expect"]

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def expect(value: Any, expected: Any, name: str) -> None:
    """Refuse a non-tensor argument that differs from the one the graph was captured with."""
    if value is expected:
        return
    if expected is None or value != expected:
        raise ArgumentError(
            f"argument '{name}' was {expected!r} when the graph was captured, found {value!r}; trace again"
        )


def check(left: Any, comparison: str, right: Any, holds: bool, where: str) -> None:
    """Refuse sizes for which the model's Python code would take another path than it took in the capture."""
    found = _COMPARE[comparison](left, right)
    if found if holds else not found:  # in this form torch.compile can decide it for symbolic sizes
        return
    raise OtherPathError(
        f"the model decides by a size at {where}: {left} {comparison} {right} was {holds} when the graph was captured "
        f"and is {not holds} now, so the model would run other code than the graph has; trace again with inputs of "
        "these sizes, or if the data decides them, name the function in whole=",
        where,
    )


# The graph keeps these nodes although nobody reads their value; so do torch.fx's own passes.
GUARDS = frozenset({has_side_effect(expect), has_side_effect(check)})
