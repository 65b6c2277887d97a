"""A forward's result as an argument of the graph: containers and objects are built again at every call.

What is made of live numbers without keeping them (a text) holds for the example's sizes, so these are guarded.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.arguments import Arguments
from chase_fx.graphs.live import is_live, read_text
from chase_fx.graphs.opaque import Rebuild, is_code, strip
from chase_fx.graphs.trees import holds_tensor

__all__ = ["result_to_fx"]


def result_to_fx(arguments: Arguments, value: Any) -> Any:
    """``value`` as an FX argument.

    Raises:
        CaptureError: it is used up when somebody reads it, so no graph can give it.
    """
    if isinstance(value, Iterator):
        raise CaptureError(
            f"the forward returns a {type(value).__name__}, whose elements are computed after it; return a list of them"
        )
    if isinstance(value, str):
        read_text(value)
    if isinstance(value, dict):
        items = {k: result_to_fx(arguments, v) for k, v in value.items()}
        return items if type(value) is dict else _mapping(arguments, value, items)
    if isinstance(value, (set, frozenset)):
        if any(map(holds_tensor, value)):
            raise CaptureError("the forward returns a set of tensors, which have no order in it; return a list of them")
        return _construct(arguments, type(value), ([result_to_fx(arguments, v) for v in value],), {})
    if type(value) is collections.deque:
        elements = [result_to_fx(arguments, v) for v in value]
        return _construct(arguments, collections.deque, (elements, value.maxlen), {})
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        elements = [result_to_fx(arguments, v) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*elements)
        return elements if isinstance(value, list) else tuple(elements)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return _construct(arguments, type(value), (), {k: result_to_fx(arguments, v) for k, v in given.items()})
    if isinstance(value, torch.Tensor) or is_live(value) or not hasattr(value, "__dict__"):
        return arguments.to_fx(value)
    return _object(arguments, value)


def _object(arguments: Arguments, value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value
    if is_code(value):  # a function, a class or a module is nobody's result
        return None
    template, holes = strip(value)
    name = f"_chase_rebuild_{len(arguments.rebuilds)}"
    arguments.rebuilds[name] = Rebuild(template)
    # The module is not there yet for FX to check: it is added to the root when the capture is complete.
    node = arguments.graph.create_node("call_module", name, tuple(map(arguments.to_fx, holes)), {})
    node.meta["source"] = ""
    return node


def _mapping(arguments: Arguments, value: Any, items: dict[Any, Any]) -> Any:
    if dataclasses.is_dataclass(value):  # the outputs of transformers are both
        return _construct(arguments, type(value), (), items)
    try:
        same = list(type(value)(dict(value))) == list(value)
    except Exception:  # noqa: BLE001  (a class says in its own way what it is made of)
        same = False
    return _construct(arguments, type(value), (items,), {}) if same else _object(arguments, value)


def _construct(arguments: Arguments, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    node = arguments.graph.call_function(cls, args, kwargs)
    node.meta["source"] = ""
    return node
