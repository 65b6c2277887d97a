"""Hooks on modules that the graph could call as they are.

A module that is one call of the graph runs its hooks in every call, unseen by the capture. That is right for a hook
that only looks, or computes what the module gives. One that keeps something for the forward (``self.found = out``,
``self.count = out.shape[0]``) is a part of the forward: what it keeps has to come from the graph, so its module is
taken apart, and the hook runs while the forward is recorded.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _modules

from chase_fx.errors import CaptureError
from chase_fx.graphs.reach import REGISTRY, codes_in, is_own
from chase_fx.graphs.walk import held_by

__all__ = [
    "HookedError",
    "check_backward_hooks",
    "every_hook",
    "forward_hooks",
    "global_hooks",
    "keeping",
    "put_hooks",
    "saved_hooks",
]

_OWN = frozenset(vars(nn.Module()))
_HOMES = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward")) and "hooks" in name)
_ATOMIC = (int, float, complex, str, bytes, type(None), type, torch.Tensor, types.FunctionType, types.ModuleType)


class HookedError(BaseException):
    """A hook changed the module that it belongs to, which the graph was to call as it is."""


def check_backward_hooks(module: nn.Module, name: str) -> None:
    """Refuse hooks of gradients on a module that is taken apart: a graph has no place to run them at.

    Raises:
        CaptureError: there are some.
    """
    if module._backward_hooks or module._backward_pre_hooks:
        raise CaptureError(
            f"{repr(name) if name else 'the model'} ({type(module).__name__}) has backward hooks, and a graph calls "
            "its parts, not the module itself, so they would not run; remove them before the capture, or register them "
            "on layers, outside of the forward"
        )


def keeping(modules: Iterable[nn.Module], functions: Iterable[types.FunctionType]) -> frozenset[int]:
    """The identities of those with a hook on their forward that can reach what the forward can.

    Args:
        modules: those of the model; the forward can reach them, and what they have as attributes.
        functions: those that the forward may call, which may reach more by global names.
    """
    modules = list(dict.fromkeys(modules))
    hooked = [module for module in modules if forward_hooks(module)]
    parts = _parts(modules, functions) if hooked else set()
    return frozenset(id(m) for m in hooked if any(_holds(hook, parts, set()) for hook in forward_hooks(m)))


def forward_hooks(module: nn.Module) -> list[Any]:
    """What runs before and after the forward of ``module``."""
    if not (module._forward_pre_hooks or module._forward_hooks):  # nearly always, and asked at every call of a layer
        return []
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def every_hook(module: nn.Module) -> list[Any]:
    """Those of gradients too, each with its number, which no other has."""
    homes = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for home in homes for hook in home.items()] if any(homes) else []


def global_hooks() -> list[Any]:
    """What runs before and after the forward of every module."""
    homes = (_modules._global_forward_pre_hooks, _modules._global_forward_hooks)
    return [hook for home in homes for hook in home.items()] if any(homes) else []


def saved_hooks(module: nn.Module) -> dict[str, dict[int, Any]]:
    """The hooks of ``module``, and how they want to be called."""
    return {name: dict(vars(module)[name]) for name in _HOMES if vars(module).get(name)}


def put_hooks(module: nn.Module, saved: dict[str, dict[int, Any]]) -> None:
    """Give ``module`` the hooks that :func:`saved_hooks` found, and no others."""
    for name in _HOMES:
        if isinstance(home := vars(module).get(name), dict):
            home.clear()
            home.update(saved.get(name, {}))


def _parts(modules: list[nn.Module], functions: Iterable[types.FunctionType]) -> set[int]:
    found = {id(module) for module in modules}
    stack = [value for module in modules for name, value in vars(module).items() if name not in _OWN]
    hooks = {id(_function(hook)) for module in modules for hook in forward_hooks(module)}
    stack += [value for function in functions if id(function) not in hooks for value in _globals(function)]
    while stack:
        value = stack.pop()
        if isinstance(value, _ATOMIC) or id(value) in found:
            continue
        if not isinstance(value, tuple):  # which nothing can be kept in
            found.add(id(value))
        stack += _items(value)
    return found


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from dict.values(value) if len(value) <= REGISTRY else ()
    elif isinstance(value, (list, tuple, set)):
        yield from value if len(value) <= REGISTRY else ()
    elif is_own(type(value).__module__) and not isinstance(value, nn.Module):
        yield from held_by(value).values()


def _holds(value: Any, parts: set[int], seen: set[int]) -> bool:
    """Whether what a hook is given by its own making leads to one of ``parts``."""
    if id(value) in parts:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    held: Iterable[Any] = ()
    if isinstance(value, types.FunctionType):
        held = (*_cells(value), *_globals(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, types.MethodType):
        held = value.__self__, value.__func__
    elif isinstance(value, functools.partial):
        held = value.func, *value.args, *value.keywords.values()
    elif isinstance(value, (tuple, list, set)):
        held = value
    elif isinstance(value, dict):
        held = value.values()
    return any(_holds(item, parts, seen) for item in held)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue


def _globals(function: types.FunctionType) -> Iterator[Any]:
    """What the code of a function finds by global names."""
    for code in codes_in(function.__code__):
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


def _function(hook: Any) -> Any:
    return hook.__func__ if isinstance(hook, types.MethodType) else hook
