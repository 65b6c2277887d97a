"""Which Python functions a model's forward can reach: by the names that its code uses, from the classes of its modules.

An over-approximation by names: a method counts as called where any reachable code mentions an attribute of its name.
Torch, NumPy and the standard library are no model code.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributions.utils import lazy_property

from chase_fx.graphs.walk import held_by, modules_of

__all__ = ["REGISTRY", "Code", "attribute_homes", "codes_in", "is_own", "reachable_code"]

_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sympy", "networkx", "chase_fx"}) - {"__main__"}
_CONTAINERS = (dict, tuple, list, set, frozenset)
_HOLDERS = (nn.Module, types.SimpleNamespace)
_NO_CODE = (torch.Tensor, types.ModuleType)
_PRIMITIVE = (int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size)
_DATA = frozenset({bool, int, float, str, type(None)})  # most of a module's attributes
_TABLES = frozenset(vars(nn.Module()))  # its parameters, its submodules, its hooks
# Python code of torch that computes with sizes, and whose parts a recorder sees as it sees those of a model.
_LIBRARY = ("torch.distributions", "torch.nn.init", "torch.signal")
REGISTRY = 500  # larger containers are data, no tables of functions
OBJECTS = 2000  # that a model holds and that are looked into
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
    tables = _TABLES if isinstance(value, nn.Module) else ()
    for name, item in held_by(value).items():
        if type(item) in _DATA or name in tables or (type(item) is tuple and _DATA.issuperset(map(type, item))):
            continue
        yield from _held(item, seen)


def _held(item: Any, seen: set[int]) -> Iterator[Any]:
    """The functions and classes of what an object holds: whatever has methods, and containers of such."""
    if isinstance(item, (types.FunctionType, type)):
        yield item
    elif type(item) in _DATA or isinstance(item, _NO_CODE) or id(item) in seen:
        return
    elif isinstance(item, _CONTAINERS):
        seen.add(id(item))
        for part in parts_of(item):
            yield from _held(part, seen)
    elif isinstance(item, types.MethodType):
        yield item.__func__
        yield from _held(item.__self__, seen)
    elif isinstance(item, functools.partial):
        for part in (item.func, *item.args, *item.keywords.values()):
            yield from _held(part, seen)
    elif isinstance(item, functools._lru_cache_wrapper):
        yield item
    elif len(seen) < OBJECTS and (isinstance(item, _HOLDERS) or is_own(type(item).__module__)):
        seen.add(id(item))
        yield from _starts(item, seen)


def parts_of(container: Any) -> tuple[Any, ...]:
    """What a small container holds, past methods of its own: some import a module for each item that is asked for."""
    kind: Any = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    if kind.__len__(container) > REGISTRY:
        return ()
    return tuple(dict.values(container)) if kind is dict else tuple(kind.__iter__(container))


def _target(value: Any) -> Any:
    """What is called in the end: the function of a method, a property, a partial or a cache."""
    if isinstance(value, (types.MethodType, staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, (functools.partial, functools.cached_property)):
        return value.func
    if isinstance(value, property):
        return value.fget
    if isinstance(value, lazy_property):
        return value.wrapped
    return value.__wrapped__ if isinstance(value, functools._lru_cache_wrapper) else None


class _Reach:
    def __init__(self) -> None:
        self.functions: dict[int, types.FunctionType] = {}
        self.caches: list[types.CellType] = []
        self._names = {"forward"}
        self._made_of: set[str] = set()  # texts in code that asks for attributes by name
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
        elif isinstance(value, _CONTAINERS):
            self._seen.add(id(value))
            for item in parts_of(value):
                self.visit(item)
        elif (target := _target(value)) is not None:
            self.visit(target)
        elif is_own(type(value).__module__) and not isinstance(value, (nn.Module, types.ModuleType)):
            self._seen.add(id(value))
            for start in _starts(value, self._seen):
                self.visit(start)

    def _class(self, given: type) -> None:
        if id(given) in self._seen:
            return
        for cls in given.__mro__:
            if id(cls) in self._seen or cls is nn.Module:
                continue
            self._seen.add(id(cls))
            if not _followed(cls.__module__) and not cls.__module__.startswith("torch.nn.modules."):
                continue
            for name, member in vars(cls).items():
                if isinstance(member, _PRIMITIVE):
                    continue
                if name in self._names or name.startswith("__") or isinstance(member, dict) or self._is_made(name):
                    self.visit(member)
                else:
                    self._waiting.setdefault(name, []).append(member)

    def _function(self, function: types.FunctionType) -> None:
        self._seen.add(id(function))
        module = function.__module__ or ""
        layer = module.startswith("torch.nn.modules.")  # its code may be inlined, what it calls is torch's
        if not layer and not _followed(module):
            return
        self.functions[id(function)] = function
        scope: Mapping[str, Any] = {} if layer else function.__globals__
        for code in codes_in(function.__code__):
            if "getattr" in code.co_names:
                self._asked(code)
            for name in code.co_names:
                self._name(name)
                found = scope.get(name)
                if isinstance(found, types.ModuleType):
                    self._module(found, code.co_names)
                elif found is not None:
                    self.visit(found)
        if hasattr(function, "__wrapped__"):  # which a function of the standard library may call
            self.visit(function.__wrapped__)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(content, functools._lru_cache_wrapper):
                self.caches.append(cell)
            self.visit(content)

    def _module(self, module: types.ModuleType, names: tuple[str, ...]) -> None:
        """What code with these names may mean by ``module.name`` and ``module.part.name``."""
        if _followed(module.__name__):
            for name in names:
                self.visit(vars(module).get(name))
        if any(home.startswith(module.__name__ + ".") for home in _LIBRARY):
            for name in names:
                part = vars(module).get(name)
                if isinstance(part, types.ModuleType) and part.__name__.startswith(module.__name__ + "."):
                    self._module(part, names)

    def _asked(self, code: types.CodeType) -> None:
        """Names that code asks for by ``getattr(self, "mix")``, and parts of such, ``getattr(self, f"mix_{kind}")``."""
        steps = iter(dis.get_instructions(code))
        for step in steps:
            if step.opname != "LOAD_GLOBAL" or step.argval != "getattr":
                continue
            inside = tuple(itertools.takewhile(lambda step: not step.opname.startswith(("PRECALL", "CALL")), steps))
            texts = tuple(step.argval for step in inside if step.opname == "LOAD_CONST" and type(step.argval) is str)
            if any(step.opname in ("FORMAT_VALUE", "BINARY_OP") for step in inside):
                self._made_of.update(text for text in texts if text)
                for name in list(filter(self._is_made, self._waiting)):
                    self._name(name)
            else:
                for name in texts:
                    self._name(name)

    def _is_made(self, name: str) -> bool:
        texts = tuple(self._made_of)
        return name.startswith(texts) or name.endswith(texts)

    def _name(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            for member in self._waiting.pop(name, ()):
                self.visit(member)


def is_own(module: str | None) -> bool:
    """Whether a module belongs to models, not to torch, NumPy or the standard library."""
    return bool(module) and str(module).partition(".")[0] not in _FOREIGN


def _followed(module: str) -> bool:
    """Whether a module is the model's own, or a part of torch whose functions are code like that of a model."""
    return is_own(module) or module.startswith(_LIBRARY)


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
        if kind.__module__ != "builtins" and is_own(kind.__module__) and (held := held_by(value)):
            yield held
