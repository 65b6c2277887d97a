"""Which Python functions a model's forward can reach: by the names that its code uses, from the classes of its modules.

An over-approximation by names: a method counts as called where any reachable code mentions an attribute of its name.
Torch, NumPy and the standard library are no model code.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chase_fx.graphs.walk import modules_of

__all__ = ["REGISTRY", "Code", "attribute_homes", "codes_in", "is_own", "reachable_code"]

_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sympy", "networkx", "chase_fx"}) - {"__main__"}
_PRIMITIVE = (int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size)
_DATA = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set})  # most of a module's attributes
REGISTRY = 500  # larger containers are data, no tables of functions
_REMEMBERED = 64  # models


@dataclass(frozen=True)
class Code:
    """The model's code.

    Attributes:
        functions: what a forward may call.
        caches: cells of closures that hold a function under ``functools.lru_cache``.
    """

    functions: tuple[types.FunctionType, ...]
    caches: tuple[types.CellType, ...]


# Of models with these classes and functions, whose identities stay theirs while they are held.
_known: dict[frozenset[int], tuple[tuple[Any, ...], Code]] = {}


def reachable_code(root: nn.Module) -> Code:
    """The code that a forward of ``root`` may run."""
    seen: set[int] = set()
    starts = {id(start): start for _, module in modules_of(root) for start in _starts(module, seen)}
    key = frozenset(starts)
    if key in _known:
        return _known[key][1]
    reach = _Reach()
    for start in starts.values():
        reach.visit(start)
    code = Code(tuple(reach.functions.values()), tuple(reach.caches))
    if not any(getattr(start, "__closure__", None) for start in starts.values()):  # it might hold a whole model
        if len(_known) >= _REMEMBERED:
            _known.pop(next(iter(_known)))
        _known[key] = tuple(starts.values()), code
    return code


def _starts(value: Any, seen: set[int]) -> Iterator[Any]:
    """The class of an object, and the functions and classes that it holds."""
    yield type(value)
    if isinstance(value, nn.Module):
        for hook in (*value._forward_hooks.values(), *value._forward_pre_hooks.values()):
            yield from _held(hook, seen)
    for item in vars(value).values() if hasattr(value, "__dict__") else ():
        if type(item) in _DATA:
            continue
        if isinstance(item, (tuple, list)) or _may_hold(item):
            yield from _held(item, seen)


def _held(item: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(item, (types.FunctionType, type)):
        yield item
    elif isinstance(item, types.MethodType):
        yield item.__func__
    elif isinstance(item, functools.partial):
        yield from _held(item.func, seen)
    elif isinstance(item, (tuple, list)):
        for part in item if len(item) <= REGISTRY else ():
            if _may_hold(part):
                yield from _held(part, seen)
    elif is_own(type(item).__module__) and id(item) not in seen:
        seen.add(id(item))
        yield from _starts(item, seen)


def _may_hold(item: Any) -> bool:
    return callable(item) and not isinstance(item, (nn.Module, torch.Tensor))


def _target(value: Any) -> Any:
    """What is called in the end: the function of a method, a property, a partial or a cache."""
    if isinstance(value, (types.MethodType, staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, (functools.partial, functools.cached_property)):
        return value.func
    if isinstance(value, property):
        return value.fget
    return value.__wrapped__ if isinstance(value, functools._lru_cache_wrapper) else None


class _Reach:
    def __init__(self) -> None:
        self.functions: dict[int, types.FunctionType] = {}
        self.caches: list[types.CellType] = []
        self._names = {"forward"}
        self._waiting: dict[str, list[Any]] = {}
        self._seen: set[int] = set()

    def visit(self, value: Any) -> None:
        """A value that reachable code may call, or that holds such values."""
        if isinstance(value, _PRIMITIVE) or id(value) in self._seen:
            return
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (dict, tuple, list)):
            self._items(value)
        elif (target := _target(value)) is not None:
            self.visit(target)
        elif is_own(type(value).__module__) and not isinstance(value, (nn.Module, types.ModuleType)):
            self._seen.add(id(value))
            for start in _starts(value, self._seen):
                self.visit(start)

    def _items(self, value: dict[Any, Any] | tuple[Any, ...] | list[Any]) -> None:
        """What a container holds, past methods of its own: some import a module for each item that is asked for."""
        self._seen.add(id(value))
        kind: Any = next(kind for kind in (dict, tuple, list) if isinstance(value, kind))
        if kind.__len__(value) <= REGISTRY:
            for item in tuple(dict.values(value) if isinstance(value, dict) else kind.__iter__(value)):
                if callable(item):
                    self.visit(item)

    def _class(self, given: type) -> None:
        if id(given) in self._seen:
            return
        for cls in given.__mro__:
            if id(cls) in self._seen or cls is nn.Module:
                continue
            self._seen.add(id(cls))
            if not is_own(cls.__module__) and not cls.__module__.startswith("torch.nn.modules."):
                continue
            for name, member in vars(cls).items():
                if isinstance(member, _PRIMITIVE):
                    continue
                if name in self._names or name.startswith("__") or isinstance(member, dict):
                    self.visit(member)
                else:
                    self._waiting.setdefault(name, []).append(member)

    def _function(self, function: types.FunctionType) -> None:
        self._seen.add(id(function))
        module = function.__module__ or ""
        layer = module.startswith("torch.nn.modules.")  # its code may be inlined, what it calls is torch's
        if not layer and not is_own(module):
            return
        self.functions[id(function)] = function
        scope: Mapping[str, Any] = {} if layer else function.__globals__
        for code in codes_in(function.__code__):
            for name in code.co_names:
                self._name(name)
                found = scope.get(name)
                if isinstance(found, types.ModuleType):
                    if is_own(found.__name__):
                        for attribute in code.co_names:
                            self.visit(vars(found).get(attribute))
                elif found is not None:
                    self.visit(found)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(content, functools._lru_cache_wrapper):
                self.caches.append(cell)
            self.visit(content)

    def _name(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            for member in self._waiting.pop(name, ()):
                self.visit(member)


def is_own(module: str | None) -> bool:
    """Whether a module belongs to models, not to torch, NumPy or the standard library."""
    return bool(module) and str(module).partition(".")[0] not in _FOREIGN


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of the functions, comprehensions and classes inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def attribute_homes(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The attributes of a module, and of the plain objects that it holds, such as its configuration."""
    yield module.__dict__
    for value in module.__dict__.values():
        kind = type(value)
        if kind.__module__ != "builtins" and type(getattr(value, "__dict__", None)) is dict and is_own(kind.__module__):
            yield value.__dict__
