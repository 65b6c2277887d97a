"""Which Python functions a model's forward can reach: by the names that its code uses, from the classes of its modules.

An over-approximation by names: a method counts as called where any reachable code mentions an attribute of its name.
Torch, NumPy and the standard library are no model code.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Code", "reachable_code"]

_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sympy", "networkx", "chase_fx"}) - {"__main__"}
_PRIMITIVE = (int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size)
_REGISTRY = 500  # larger containers are data, no tables of functions


@dataclass(frozen=True)
class Code:
    """The model's code.

    Attributes:
        functions: what a forward may call.
        caches: cells of closures that hold a function under ``functools.lru_cache``.
    """

    functions: tuple[types.FunctionType, ...]
    caches: tuple[types.CellType, ...]


def reachable_code(root: nn.Module) -> Code:
    """The code that a forward of ``root`` may run."""
    reach = _Reach()
    for module in root.modules():
        reach.instance(module)
    return Code(tuple(reach.functions.values()), tuple(reach.caches))


class _Reach:
    def __init__(self) -> None:
        self.functions: dict[int, types.FunctionType] = {}
        self.caches: list[types.CellType] = []
        self._names = {"forward"}
        self._waiting: dict[str, list[Any]] = {}
        self._seen: set[int] = set()

    def instance(self, value: Any) -> None:
        """An object: the code of its class, and functions that it holds."""
        self._class(type(value))
        for item in vars(value).values() if hasattr(value, "__dict__") else ():
            if not isinstance(item, (*_PRIMITIVE, nn.Module)) and (callable(item) or isinstance(item, (tuple, list))):
                self._value(item)

    def _value(self, value: Any) -> None:
        if isinstance(value, _PRIMITIVE) or id(value) in self._seen:
            return
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            return
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            self._value(value.__func__)
        elif isinstance(value, functools.partial):
            self._value(value.func)
        elif isinstance(value, property):
            self._value(value.fget)
        elif isinstance(value, functools.cached_property):
            self._value(value.func)
        elif isinstance(value, (dict, tuple, list)):
            self._items(value)
        elif hasattr(value, "__wrapped__"):  # functools.lru_cache
            self._value(value.__wrapped__)
        elif _own(type(value).__module__) and not isinstance(value, nn.Module):
            self._seen.add(id(value))
            self.instance(value)

    def _items(self, value: Mapping[Any, Any] | tuple[Any, ...] | list[Any]) -> None:
        self._seen.add(id(value))
        if len(value) <= _REGISTRY:
            for item in value.values() if isinstance(value, Mapping) else value:
                if callable(item):
                    self._value(item)

    def _class(self, given: type) -> None:
        if id(given) in self._seen:
            return
        for cls in given.__mro__:
            if id(cls) in self._seen or cls is nn.Module:
                continue
            self._seen.add(id(cls))
            if not _own(cls.__module__) and not cls.__module__.startswith("torch.nn.modules."):
                continue
            for name, member in vars(cls).items():
                if isinstance(member, _PRIMITIVE):
                    continue
                if name in self._names or name.startswith("__") or isinstance(member, dict):
                    self._value(member)
                else:
                    self._waiting.setdefault(name, []).append(member)

    def _function(self, function: types.FunctionType) -> None:
        self._seen.add(id(function))
        module = function.__module__ or ""
        layer = module.startswith("torch.nn.modules.")  # its code may be inlined, what it calls is torch's
        if not layer and not _own(module):
            return
        self.functions[id(function)] = function
        scope: Mapping[str, Any] = {} if layer else function.__globals__
        for code in _codes(function.__code__):
            for name in code.co_names:
                self._name(name)
                found = scope.get(name)
                if isinstance(found, types.ModuleType):
                    if _own(found.__name__):
                        for attribute in code.co_names:
                            self._value(vars(found).get(attribute))
                elif found is not None:
                    self._value(found)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(content, functools._lru_cache_wrapper):
                self.caches.append(cell)
            self._value(content)

    def _name(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            for member in self._waiting.pop(name, ()):
                self._value(member)


def _own(module: str | None) -> bool:
    return bool(module) and str(module).partition(".")[0] not in _FOREIGN


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
