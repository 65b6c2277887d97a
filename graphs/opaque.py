"""Results that are objects of some class, such as the key-value caches of language models.

They are rebuilt at every call from a template, a copy of the object whose tensors and computed sizes are replaced by
holes. Their tensors are state that goes back into the same model, no outputs: nobody relies on their shape, so they
don't freeze anything.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch
from torch import nn

from chase_fx.graphs.live import is_live, plain
from chase_fx.graphs.trees import SEQUENCES, map_object, map_tuple

__all__ = ["Rebuild", "alike", "has_parts", "is_code", "strip"]

_ATOMIC = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, nn.Module)
_CODE = (type, nn.Module, types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


def is_code(value: Any) -> bool:
    """Whether a value is a function, a class or a module, rather than an object that can be called besides."""
    return callable(value) and (isinstance(value, _CODE) or not hasattr(value, "__dict__"))


class _Hole:
    def __init__(self, index: int) -> None:
        self.index = index


class _Size(tuple[Any, ...]):
    """A ``torch.Size`` with holes."""


class Rebuild(nn.Module):
    """Fills the holes of a template with tensors."""

    def __init__(self, template: Any) -> None:
        super().__init__()
        self.template = template

    def forward(self, *values: Any) -> Any:
        """A new object like the template, with ``values`` in its holes."""
        return _walk(self.template, {}, lambda found: values[found.index] if isinstance(found, _Hole) else None)


def strip(value: Any) -> tuple[Any, list[Any]]:
    """A template of ``value`` and the tensors and live numbers that were in it."""
    holes: list[Any] = []

    def replace(found: Any) -> Any:
        if not isinstance(found, torch.Tensor) and not is_live(found):
            return plain(found) if isinstance(found, float) else None  # captures have floats of their own
        holes.append(found)
        return _Hole(len(holes) - 1)

    return _walk(value, {}, replace), holes


def alike(a: Any, b: Any) -> bool:
    """Whether two templates build the same object from the same tensors."""
    return _alike(a, b, set())


def _alike(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    if a is b or (id(a), id(b)) in seen:
        return True
    if type(a) is not type(b):
        return False
    seen.add((id(a), id(b)))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, _ATOMIC) or is_code(a):
        return bool(a == b)
    if isinstance(a, dict) and not (list(a) == list(b) and all(_alike(a[k], b[k], seen) for k in a)):
        return False
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and np.array_equal(a, b))
    if isinstance(a, SEQUENCES):
        return len(a) == len(b) and all(_alike(x, y, seen) for x, y in zip(a, b, strict=True))
    return _alike(vars(a), vars(b), seen) if hasattr(a, "__dict__") else isinstance(a, dict) or bool(a == b)


def _walk(value: Any, memo: dict[int, Any], replace: Any) -> Any:
    replaced = replace(value)
    if replaced is not None:
        return replaced
    if isinstance(value, _ATOMIC) or is_code(value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is dict:
        out: Any = {}  # a compiler follows this, and no copy
        memo[id(value)] = out
        for key, item in value.items():
            out[key] = _walk(item, memo, replace)
        return out
    if type(value) is list:
        out = memo[id(value)] = []
        out.extend(_walk(item, memo, replace) for item in value)
        return out
    if isinstance(value, (torch.Size, _Size)):
        sizes = [_walk(item, memo, replace) for item in value]
        return _Size(sizes) if any(isinstance(n, _Hole) for n in sizes) else torch.Size(sizes)
    if isinstance(value, tuple):
        return map_tuple(value, lambda item: _walk(item, memo, replace))
    if type(value) in (set, frozenset):
        return type(value)(_walk(item, memo, replace) for item in value)
    if isinstance(value, np.ndarray):
        return value.copy()
    if not has_parts(value):
        return value
    return map_object(value, lambda item: _walk(item, memo, replace), lambda new: memo.update({id(value): new}))


def has_parts(value: Any) -> bool:
    """Whether a value is taken apart: a container, or an object of a class that Python code defines."""
    return (
        isinstance(value, (dict, *SEQUENCES))
        or hasattr(value, "__dict__")
        or any("__slots__" in vars(cls) for cls in type(value).__mro__)
    )
