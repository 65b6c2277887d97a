"""Guards of what a forward was given besides sizes and data: a graph holds for these values and kinds alone.

Like those of sizes, they are ordinary functions that run in copies, in loaded modules and in compiled ones.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import has_side_effect

from chase_fx.errors import ArgumentError, OtherSizeError
from chase_fx.graphs.described import NotDescribedError, described, kind_of
from chase_fx.graphs.live import plain

__all__ = [
    "EXPECTED",
    "Left",
    "expect",
    "expect_described",
    "expect_kind",
    "expect_left_out",
    "expect_order",
    "expect_tensor",
    "numbers_of",
]


class Left(enum.Enum):
    """The default of an input whose own can't be written into code."""

    OUT = "left out"


def expect(value: Any, expected: Any, name: str) -> None:
    """Refuse a plain value that differs from the one the graph was captured with; ``True`` is not ``1`` here."""
    if value is not expected and not _same(value, expected):
        raise ArgumentError(_other(name, repr(expected), repr(value)))


def _same(value: Any, expected: Any) -> bool:
    kind = type(expected)
    listed = isinstance(expected, list)  # FX has lists of its own
    if not listed and type(plain(value)) is not kind:
        return False
    if listed or kind is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(expected) and all(map(_same, value, expected))
    if kind is slice or kind is range:
        return all(_same(getattr(value, part), getattr(expected, part)) for part in ("start", "stop", "step"))
    if kind is complex:
        return _same(value.real, expected.real) and _same(value.imag, expected.imag)
    if kind is float and math.isnan(expected):
        return math.isnan(value)
    if kind is float and not expected and math.copysign(1, value) != math.copysign(1, expected):
        return False
    return bool(value == expected)


def expect_kind(value: Any, kind: str, name: str) -> None:
    """Refuse a container of another class."""
    if kind_of(value) != kind:
        raise ArgumentError(_other(name, f"a {kind}", f"a {kind_of(value)}"))


def expect_tensor(value: Any, numbers: str, name: str) -> None:
    """Refuse what is no tensor where the forward was captured with one, and a tensor of other kinds of numbers.

    The precision of numbers is up to the module: it may be moved to another one.
    """
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(_other(name, "a tensor", repr(value)))
    found = numbers_of(value)
    if found != numbers:
        raise OtherSizeError(_other(name, f"a tensor of {numbers} numbers", f"one of {found} numbers"), name)


def numbers_of(tensor: torch.Tensor) -> str:
    """What kind of numbers there are in a tensor."""
    if tensor.dtype == torch.bool:
        return "bool"
    if tensor.dtype.is_floating_point:
        return "floating"
    return "complex" if tensor.dtype.is_complex else "whole"


def expect_order(value: dict[str, Any], names: tuple[str, ...], name: str) -> None:
    """Refuse other keyword arguments; a forward may go through them in their order, so in another one too."""
    found = tuple(value)
    if found == names:
        return
    if sorted(found) == sorted(names):
        raise OtherSizeError(_other(name, f"given in the order {names}", f"the order {found}"), name)
    raise ArgumentError(_other(name, repr(names), repr(found)))


def expect_described(value: Any, text: str, name: str, left_out: bool) -> None:
    """Refuse a value of any class that is made of something else than the one the graph was captured with."""
    if value is Left.OUT and left_out:
        return
    try:
        found = described(value)
    except NotDescribedError:
        found = f"a {kind_of(value)}"
    if found != text:
        kind = text.partition(" ")[0]
        expected = f"a {kind}" if kind != kind_of(value) else f"a {kind} made of something else"
        raise ArgumentError(
            _other(name, expected, f"a {kind_of(value)}") + ", or pass what changes as a tensor (torch.from_numpy...)"
        )


def expect_left_out(value: Any, name: str) -> None:
    """Refuse any value where the forward was captured without one, and its default holds tensors."""
    if value is not Left.OUT:
        raise ArgumentError(_other(name, "left out", f"a {kind_of(value)}"))


def _other(name: str, expected: str, found: str) -> str:
    return f"argument '{name}' was {expected} when the graph was captured, found {found}; trace again"


EXPECTED: frozenset[Callable[..., Any]] = frozenset(
    {
        has_side_effect(expect),
        has_side_effect(expect_described),
        has_side_effect(expect_kind),
        has_side_effect(expect_left_out),
        has_side_effect(expect_order),
        has_side_effect(expect_tensor),
    }
)
