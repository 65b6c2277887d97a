"""A forward's result as an argument of the graph: containers and objects are built again at every call.

What is made of live numbers without keeping them (a text) holds for the example's sizes, so these are guarded.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.arguments import Arguments
from chase_fx.graphs.binding import has_plain_keys, is_literal
from chase_fx.graphs.described import NotDescribedError, described, importable
from chase_fx.graphs.draws import DrawnArray
from chase_fx.graphs.live import is_live, plain, read_text
from chase_fx.graphs.opaque import Rebuild, has_parts, is_code, strip
from chase_fx.graphs.trees import SEQUENCES, attributes_of, holds_tensor, is_container

__all__ = ["result_to_fx"]


def result_to_fx(arguments: Arguments, value: Any) -> Any:
    """``value`` as an FX argument.

    Raises:
        CaptureError: it is used up when somebody reads it, or has tensors in it that can't be reached; no graph can
            give that.
    """
    if isinstance(value, Iterator):
        raise CaptureError(
            f"the forward returns a {type(value).__name__}, whose elements are computed after it; return a list of them"
        )
    if isinstance(value, str):
        read_text(value)
    if not is_live(value):
        value = plain(value)  # captures have floats of their own
    if isinstance(value, (set, frozenset)) and any(map(holds_tensor, value)):
        raise CaptureError("the forward returns a set of tensors, which have no order in it; return a list of them")
    if isinstance(value, torch.Tensor) or is_live(value) or isinstance(value, (DrawnArray, range, slice)):
        return arguments.to_fx(value)
    if id(value) in arguments.containers:
        return arguments.containers[id(value)].node
    if type(value) in (tuple, list):
        return type(value)(result_to_fx(arguments, v) for v in value)
    if type(value) is dict and has_plain_keys(value):
        return {key: result_to_fx(arguments, v) for key, v in value.items()}
    if is_container(value) or isinstance(value, (set, frozenset)):
        return _container(arguments, value)
    return arguments.to_fx(value) if is_literal(value) else _object(arguments, value)


def _container(arguments: Arguments, value: Any) -> Any:
    """Its class makes it again, if it is known to make the same of what is in it."""
    cls: Any = type(value)
    for args, kwargs in _contents(value):
        if _makes_again(value, args, kwargs):
            fx_args = tuple(result_to_fx(arguments, arg) for arg in args)
            if cls.__bases__ == (tuple,) and hasattr(cls, "_fields"):
                return cls(*fx_args)
            return _construct(arguments, cls, fx_args, {k: result_to_fx(arguments, v) for k, v in kwargs.items()})
    return _object(arguments, value)


def _contents(value: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments by which a class may make a container."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        yield (), {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield tuple(value), {}
    elif isinstance(value, collections.deque):
        yield (list(value), value.maxlen), {}
    elif isinstance(value, dict):
        yield (dict(value) if has_plain_keys(value) else [*value.items()],), {}
    elif isinstance(value, (*SEQUENCES, set, frozenset)):
        yield (list(value),), {}


def _makes_again(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        again = type(value)(*args, **kwargs)
    except Exception:  # noqa: BLE001  (a class says in its own way what it is made of)
        return False
    return bool(_parts(again) == _parts(value))


def _parts(value: Any) -> Any:
    """What a container holds, each by its identity."""
    items: Any = ()
    if isinstance(value, dict):
        items = [(id(key), id(item)) for key, item in value.items()]
    elif isinstance(value, (*SEQUENCES, set, frozenset)):
        items = [id(item) for item in value]
    return sorted(items) if isinstance(value, (set, frozenset)) else items, {n: id(v) for n, v in attributes_of(value)}


def _object(arguments: Arguments, value: Any) -> Any:
    if is_code(value) and not importable(value):  # a function or a module is nobody's result
        return None
    if not has_parts(value):
        _refuse_tensors(value)
    template, holes = strip(value)
    name = f"_chase_rebuild_{len(arguments.rebuilds)}"
    arguments.rebuilds[name] = Rebuild(template)
    # The module is not there yet for FX to check: it is added to the root when the capture is complete.
    node = arguments.graph.create_node("call_module", name, tuple(map(arguments.to_fx, holes)), {})
    node.meta["source"] = ""
    return node


def _refuse_tensors(value: Any) -> None:
    try:
        described(value)
    except NotDescribedError as e:
        raise CaptureError(
            f"the forward returns a {type(value).__name__}, which a graph can't build again; return what is in it as "
            "tensors, numbers, or tuples, lists, dicts or dataclasses of them"
        ) from e


def _construct(arguments: Arguments, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    node = arguments.graph.call_function(cls, args, kwargs)
    node.meta["source"] = ""
    return node
