"""Tensors inside nested Python values: tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

SEQUENCES = (tuple, list, collections.deque)
_MEMBERS = (types.MemberDescriptorType, types.GetSetDescriptorType)

__all__ = [
    "SEQUENCES",
    "attributes_of",
    "holds_tensor",
    "is_container",
    "map_object",
    "map_tensors",
    "map_tuple",
    "named_tensors",
    "only_tensors",
    "tensors_in",
]


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
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    for key, item in items:
        yield from named_tensors(item, f"{path}.{key}" if path else str(key))


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor inside ``value``."""
    return next(tensors_in(value), None) is not None


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``fn`` applied to the tensors in it, one by one."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple):
        return map_tuple(value, lambda v: map_tensors(v, fn))
    if type(value) is list:
        return [map_tensors(v, fn) for v in value]
    if type(value) is dict:
        return {k: map_tensors(v, fn) for k, v in value.items()}
    return map_object(value, lambda v: map_tensors(v, fn)) if is_container(value) else value


def is_container(value: Any) -> bool:
    """Whether a value is taken apart where it is an input: a tuple, list, deque, dict or dataclass of any class."""
    return isinstance(value, (*SEQUENCES, dict)) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def map_object(value: Any, fn: Callable[[Any], Any], begun: Callable[[Any], None] | None = None) -> Any:
    """A copy of an object with ``fn`` applied to its items and to what it has under names, which may be items too.

    ``begun`` is told the copy before that, for something inside may refer to it.
    """
    new = copy.copy(value)
    if begun is not None:
        begun(new)
    items: Iterable[tuple[Any, Any]] = ()
    kind: Any = next((kind for kind in (dict, list, collections.deque) if isinstance(value, kind)), None)
    if kind is not None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
    made = {key: fn(item) for key, item in items}
    for key, item in made.items():
        kind.__setitem__(new, key, item)
    for name, item in attributes_of(value):
        mapped = made[name] if name in made and value[name] is item else fn(item)
        if mapped is item:  # the copy has it, maybe where nobody can write to
            continue
        if name in getattr(value, "__dict__", ()):
            new.__dict__[name] = mapped
        else:
            object.__setattr__(new, name, mapped)
    return new


def map_tuple(value: Any, fn: Callable[[Any], Any]) -> Any:
    """A tuple of the class of ``value`` with ``fn`` applied to its items and its attributes."""
    cls, items = type(value), [fn(item) for item in value]
    if cls is tuple:
        return tuple(items)
    if cls.__bases__ == (tuple,) and hasattr(cls, "_fields"):
        return cls(*items)
    constructor: Any = cls.__new__
    if constructor is not tuple.__new__ and not isinstance(constructor, types.FunctionType):  # of C, as a torch.Size
        return cls(items)
    new = tuple.__new__(cls, items)  # its constructor may take anything
    for name, item in getattr(value, "__dict__", {}).items():
        new.__dict__[name] = fn(item)
    return new


def attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds under names, besides its items: also in slots, or in C as a deque its length."""
    names = dict.fromkeys(getattr(value, "__dict__", ()))
    if dataclasses.is_dataclass(value):
        names |= dict.fromkeys(f.name for f in dataclasses.fields(value))
    for cls in type(value).__mro__:
        names |= dict.fromkeys(k for k, v in vars(cls).items() if isinstance(v, _MEMBERS) and not k.startswith("__"))
    for name in names:
        if hasattr(value, name):
            yield name, getattr(value, name)


def only_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor, or tuples and lists of tensors."""
    if isinstance(value, (tuple, list)):
        return all(map(only_tensors, value))
    return isinstance(value, torch.Tensor)
