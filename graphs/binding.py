"""What the graph has for the values that a forward is given.

A tensor is a node. Containers are taken apart: lists, tuples, dicts, dataclasses, and what their subclasses have as
attributes. Everything else is part of the capture, so the graph has a guard for it.
"""

from __future__ import annotations

import enum
import math
import operator
from typing import Any

import torch
from torch.fx import Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.arguments import NO_DEFAULT, Arguments
from chase_fx.graphs.changed import given_container
from chase_fx.graphs.described import HoldsTensorError, NotDescribedError, described, importable, kind_of
from chase_fx.graphs.expected import (
    Left,
    expect,
    expect_described,
    expect_kind,
    expect_left_out,
    expect_order,
    expect_tensor,
    numbers_of,
)
from chase_fx.graphs.trees import SEQUENCES, attributes_of, is_container

__all__ = ["bind_default", "bind_input", "check_unchanged", "default_of", "has_plain_keys", "is_literal"]

# What code can be written with, and ``==`` compares.
_LITERAL = frozenset(
    {type(None), bool, int, str, bytes, range, type(...), torch.dtype, torch.layout, torch.memory_format, torch.device}
)  # fmt: skip


def is_literal(value: Any) -> bool:
    """Whether ``value`` is written into code as it is."""
    if type(value) in _LITERAL:
        return True
    if type(value) is complex:
        return math.isfinite(value.real) and math.isfinite(value.imag)
    if type(value) is slice:
        return all(map(is_literal, (value.start, value.stop, value.step)))
    if isinstance(value, enum.Enum):
        return importable(type(value)) and value.name in type(value).__members__
    return type(value) is float


def default_of(default: Any) -> Any:
    """The default of a placeholder for a parameter of the forward with ``default``."""
    return default if default is NO_DEFAULT or _is_written(default) else Left.OUT


def _is_written(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_written, value))
    if type(value) is dict:
        return all(is_literal(key) and _is_written(item) for key, item in value.items())
    return is_literal(value)


def bind_default(arguments: Arguments, value: Any, node: Node, path: str) -> None:
    """The forward runs with its own default: as with a value that is given, but what has no code can't be given."""
    if _is_written(value):
        bind_input(arguments, value, node, path)
        return
    try:
        _hold(arguments, value, node, path, left_out=True)
    except CaptureError:
        arguments.call(expect_left_out, (node, path), plain=True)


def bind_input(arguments: Arguments, value: Any, node: Node, path: str) -> None:
    """Tie the tensors inside ``value`` to ``node``; for the rest of it the graph gets guards.

    Raises:
        CaptureError: there is something in it that a graph can neither take apart nor compare.
    """
    if isinstance(value, torch.Tensor):
        arguments.call(expect_tensor, (node, numbers_of(value), path), plain=True)
        arguments.tie_input(value, node, path)
        return
    if isinstance(value, (*SEQUENCES, dict)):
        path = _bind_count(arguments, value, node, path)
        _bind_items(arguments, value, node, path)
    elif is_container(value):
        arguments.call(expect_kind, (node, kind_of(value), path), plain=True)
    else:
        _bind_leaf(arguments, value, node, path)
        return
    arguments.containers[id(value)] = given_container(value, node, path)
    for name, item in attributes_of(value):
        bind_input(arguments, item, arguments.call(getattr, (node, name), plain=True), f"{path}.{name}")


def _bind_count(arguments: Arguments, value: Any, node: Node, path: str) -> str:
    """The graph has a node for each item, and would ignore others; a forward may go through a dict in its order."""
    name = path.lstrip("*")
    if path.startswith("**"):
        arguments.call(expect_order, (node, tuple(value), name), plain=True)
        return name
    if name == path:
        arguments.call(expect_kind, (node, kind_of(value), name), plain=True)
    count: Any = list if isinstance(value, dict) else len
    found, known = arguments.call(count, (node,), plain=True), count(value)
    if _is_written(known):
        arguments.call(expect, (found, known, f"{count.__name__}({name})"), plain=True)
    else:
        _hold(arguments, known, found, f"list({name})", left_out=False)
    return name


def has_plain_keys(value: dict[Any, Any]) -> bool:
    """Whether a dict is subscribed in code by its keys: others may have no code, or be equal to one of another type."""
    return all(type(key) in (str, int) for key in value)


def _bind_items(arguments: Arguments, value: Any, node: Node, path: str) -> None:
    keys: Any = value if isinstance(value, dict) else range(len(value))
    items = value.values() if isinstance(value, dict) else value
    by_place = isinstance(value, dict) and not has_plain_keys(value)
    if by_place:
        found = arguments.graph.call_method("values", (node,))
        found.meta["source"] = ""
        node = arguments.call(list, (found,), plain=True)
    for place, (key, item) in enumerate(zip(keys, items, strict=True)):
        inner = arguments.call(operator.getitem, (node, place if by_place else key), plain=True)
        bind_input(arguments, item, inner, f"{path}[{key!r}]")


def _bind_leaf(arguments: Arguments, value: Any, node: Node, path: str) -> None:
    if type(value) is torch.device:  # of the model's own the graph reads it from an input
        arguments.call(expect, (node, value, path))
    elif is_literal(value):
        arguments.call(expect, (node, value, path), plain=True)
    else:
        _hold(arguments, value, node, path, left_out=False)


def _hold(arguments: Arguments, value: Any, node: Node, path: str, *, left_out: bool) -> None:
    try:
        text = described(value)
    except HoldsTensorError:
        raise CaptureError(
            f"argument '{path}' is a {type(value).__name__} that holds tensors, which is no input that a graph can "
            "take; pass them as tensors, or in tuples, lists, dicts or dataclasses, and layers as part of the model"
        ) from None
    except NotDescribedError as e:
        raise CaptureError(
            f"argument '{path}' is a {type(value).__name__}, which a graph can neither take nor compare with what "
            f"another call is given ({e}); pass tensors, numbers, or tuples, lists, dicts or dataclasses of them"
        ) from e
    arguments.held[path] = value, text
    arguments.call(expect_described, (node, text, path, left_out), plain=True)


def check_unchanged(arguments: Arguments) -> None:
    """Refuse a forward that changes the objects that it was given, as a graph would not.

    Raises:
        CaptureError: one of them was changed.
    """
    for path, (value, text) in arguments.held.items():
        try:
            same = described(value) == text
        except NotDescribedError:
            same = False
        if not same:
            raise CaptureError(
                f"the forward changes its argument '{path}', a {type(value).__name__}, which a graph would not do; "
                "let it change a copy, and return what comes of it"
            )
