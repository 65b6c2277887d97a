"""Guards: what a forward took for granted of sizes and data.

A capture holds one way through the model's Python code. Each decision that depended on a size is a node of the graph,
so that inputs for which the code would have gone another way are refused instead of computed wrongly; the module then
has another graph made for them (see :mod:`.variants`). Guards are ordinary functions: they run under
``torch.compile(fullgraph=True)``, in copies and in loaded modules.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import has_side_effect

from chase_fx.errors import OtherPathError, OtherSizeError
from chase_fx.graphs.expected import EXPECTED

__all__ = ["COMPARE", "GUARDS", "agree", "check", "check_data", "check_number"]

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def check(left: Any, comparison: str, right: Any, holds: bool, where: str) -> None:
    """Refuse sizes for which the model's Python code would take another path than it took in the capture."""
    found = COMPARE[comparison](left, right)
    if found if holds else not found:  # in this form torch.compile can decide it for symbolic sizes
        return
    raise OtherSizeError(_other(left, comparison, right, holds, where), where)


def _other(left: Any, comparison: str, right: Any, holds: bool, where: str) -> str:
    return (
        f"the model decides by a size at {where}: {left} {comparison} {right} was {holds} when the graph was captured "
        f"and is {not holds} now, so the model would run other code than the graph has; trace again with inputs of "
        "these sizes, or if the data decides them, name the function in whole="
    )


def check_number(left: Any, comparison: str, right: Any, holds: bool, where: str) -> None:
    """:func:`check` of a number that was read from data: what a compiler can't know is asserted when it runs."""
    found = COMPARE[comparison](left, right)
    if torch.compiler.is_compiling():
        torch._check(found if holds else torch.sym_not(found))
    elif found is not holds:
        raise OtherPathError(_other(left, comparison, right, holds, where), where)


def agree(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether two tensors have the same shape and the same values, as a tensor: () of bool."""
    if a.shape != b.shape:
        return a.new_zeros((), dtype=torch.bool)
    return ((a == b) | (a.isnan() & b.isnan())).all()


def check_data(found: torch.Tensor, expected: bool | float, where: str) -> None:
    """Refuse data for which the model's Python code would take another path than it took in the capture.

    Args:
        found: a tensor of one number.
        expected: what ``bool``, ``int`` or ``float``, the type of ``expected``, made of it in the capture.
        where: the line that decides.
    """
    if torch.compiler.is_compiling():  # a value that decides would end the compiled graph, an assertion is part of it
        number = found.reshape(())
        kind = type(expected)
        seen = number != 0 if kind is bool else number.long() if kind is int else number.double()
        torch._assert_async(seen == expected, f"the model decides by data at {where}, and otherwise now")
        return
    if found.is_meta:
        return
    value = type(expected)(found.item())
    if value == expected or (math.isnan(value) and math.isnan(expected)):
        return
    raise OtherPathError(
        f"the model decides by data at {where}: it read {expected!r} when the graph was captured and reads {value!r} "
        "now, so the model might run other code than the graph has; trace again with such inputs, or name the function "
        "that decides in whole=",
        where,
    )


# The graph keeps these nodes although nobody reads their value; so do torch.fx's own passes.
GUARDS = EXPECTED | {has_side_effect(check), has_side_effect(check_data), has_side_effect(check_number)}
