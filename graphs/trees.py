"""Tensors inside nested Python values: tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

SEQUENCES = (tuple, list, collections.deque)

__all__ = ["SEQUENCES", "attributes_of", "holds_tensor", "map_tensors", "named_tensors", "only_tensors", "tensors_in"]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside ``value``, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, SEQUENCES):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name, None))


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor inside ``value`` with its path, such as ``hidden_states.3``; a lone one is ``output``."""
    if isinstance(value, torch.Tensor):
        yield path or "output", value
        return
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, SEQUENCES):
        items = list(enumerate(value))
    elif hasattr(value, "__dataclass_fields__"):
        items = [(f, getattr(value, f)) for f in value.__dataclass_fields__]
    for key, item in items:
        yield from named_tensors(item, f"{path}.{key}" if path else str(key))


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor inside ``value``."""
    return next(tensors_in(value), None) is not None


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``fn`` applied to the tensors in it, one by one."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, fn) for v in value))
    if isinstance(value, tuple):
        return type(value)(map_tensors(v, fn) for v in value)
    if type(value) is list:
        return [map_tensors(v, fn) for v in value]
    if type(value) is dict:
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if isinstance(value, (*SEQUENCES, dict)) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return _map_object(value, fn)
    return value


def _map_object(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same for a container of another class, which may have its items as attributes too."""
    new = copy.copy(value)
    items: Iterable[tuple[Any, Any]] = ()
    kind: Any = next((kind for kind in (dict, list, collections.deque) if isinstance(value, kind)), None)
    if kind is not None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
    made = {key: map_tensors(item, fn) for key, item in items}
    for key, item in made.items():
        kind.__setitem__(new, key, item)
    for name, item in attributes_of(value):
        same = name in made and value[name] is item
        object.__setattr__(new, name, made[name] if same else map_tensors(item, fn))
    return new


def attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds under names, besides its items."""
    names = dict.fromkeys(getattr(value, "__dict__", ()))
    if dataclasses.is_dataclass(value):
        names |= dict.fromkeys(f.name for f in dataclasses.fields(value))
    for name in names:
        if hasattr(value, name):
            yield name, getattr(value, name)


def only_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor, or tuples and lists of tensors."""
    if isinstance(value, (tuple, list)):
        return all(map(only_tensors, value))
    return isinstance(value, torch.Tensor)
