"""Tensors inside nested Python values: tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["holds_tensor", "map_tensors", "named_tensors", "only_tensors", "tensors_in"]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside ``value``, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
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
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif hasattr(value, "__dataclass_fields__"):
        items = [(f, getattr(value, f)) for f in value.__dataclass_fields__]
    for key, item in items:
        yield from named_tensors(item, f"{path}.{key}" if path else str(key))


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor inside ``value``."""
    return next(tensors_in(value), None) is not None


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``fn`` applied to the tensors in it, through tuples and lists."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, fn) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, fn) for v in value)
    return value


def only_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor, or tuples and lists of tensors."""
    if isinstance(value, (tuple, list)):
        return all(map(only_tensors, value))
    return isinstance(value, torch.Tensor)
