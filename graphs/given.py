"""What modules held before a forward.

A leaf of the graph runs with the settings and tensors that the module has then. A forward that changes them between
calls (``self.drop.p = 0.5``, ``self.pool.kernel_size = x.shape[2:]``, ``self.bn.eval()``, weights swapped by
``functional_call``) means what they are at each call, so such a call is taken apart: the graph holds what it computes.
So is a call of a module with hooks that keep something for the forward, or with other hooks than it had.
"""

from __future__ import annotations

import enum
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from chase_fx.graphs.draws import OWN_GENERATORS
from chase_fx.graphs.hooks import HookedError, every_hook, forward_hooks, global_hooks, keeping, put_hooks, saved_hooks
from chase_fx.graphs.live import Watchful, is_live, plain
from chase_fx.graphs.walk import Modules
from chase_fx.graphs.writes import writes_state

__all__ = ["Given"]

_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_CHANGING = (list, dict, set)
# What doesn't change inside, or draws, which a leaf does by itself.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.Size, torch.dtype, torch.device),
    *(torch.layout, torch.memory_format, types.BuiltinFunctionType, types.ModuleType, torch.Generator, *OWN_GENERATORS),
)


class Given:
    """Settings and tensors of ``modules``, as they are now.

    Args:
        functions: those that the forward may call.

    Attributes:
        apart: whether all modules with hooks are taken apart.
    """

    def __init__(self, modules: Modules, functions: Iterable[types.FunctionType]) -> None:
        self.apart = False
        self._keeping = keeping((m for _, m in modules), functions)
        self._tensors = {id(m): _tensors(m) for _, m in modules}
        self._settings: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._values: dict[int, dict[str, Any]] = {}
        self._hooks = {id(m): hooks for _, m in modules if (hooks := every_hook(m))}
        self._saved_hooks = {id(m): saved_hooks(m) for _, m in modules if id(m) in self._hooks}
        self._global_hooks = global_hooks()
        for _, module in modules:
            own = _own(module)
            copies = {name: type(value)(value) for name, value in own.items() if type(value) in _CHANGING}
            self._settings[id(module)] = module, {**own, **copies}
            # All of its attributes but for its mode, which is taken away during a capture. A container that changes
            # stays the same object.
            self._values[id(module)] = {} if copies else _without_mode(module)

    def stays(self, module: nn.Module) -> bool:
        """Whether the graph may call ``module`` as it is: not where its class does more around such a call."""
        if type(module).__call__ is not nn.Module.__call__:
            return False
        hooked = id(module) in self._keeping or (self.apart and bool(forward_hooks(module)))
        return not hooked and self.still(module) and self._has_hooks(module) and global_hooks() == self._global_hooks

    def is_plain(self, module: nn.Module) -> bool:
        """Whether what ``module`` holds and can reach can't change but by being replaced, which :meth:`still` sees."""
        return all(map(_is_plain, _own(module).values())) and not writes_state(module)

    def check_hooks(self, module: nn.Module) -> None:
        """Raises :class:`HookedError` where the hooks of ``module``, which ran unseen, changed it."""
        if forward_hooks(module) and not self.still(module):
            raise HookedError

    def still(self, module: nn.Module) -> bool:
        """Whether ``module`` has the tensors and settings that it had."""
        return (self._is_untouched(module) or self._has_settings(module)) and (
            _tensors(module) == self._tensors[id(module)]
        )

    def _is_untouched(self, module: nn.Module) -> bool:
        """Whether its attributes are the same objects: nearly always, so this is asked first."""
        before, now = self._values[id(module)], module.__dict__
        if "training" in now:
            if now["training"] is not self.mode(module):
                return False
            now = _without_mode(module)
        return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))

    def _has_settings(self, module: nn.Module) -> bool:
        settings, found = self._settings[id(module)][1], module.__dict__
        for name, value in found.items():
            if name not in _OF_MODULES and (name not in settings or not _same(value, settings[name])):
                return False
        return all(name in found or name == "training" for name in settings)

    def mode(self, module: nn.Module) -> bool | None:
        """The mode that ``module`` had; none if it is not one of these."""
        found = self._settings.get(id(module))
        return None if found is None else found[1].get("training")

    def _has_hooks(self, module: nn.Module) -> bool:
        return every_hook(module) == self._hooks.get(id(module), [])

    def restore_hooks(self, module: nn.Module) -> None:
        """Give ``module`` the hooks that it had."""
        if not self._has_hooks(module):
            put_hooks(module, self._saved_hooks.get(id(module), {}))

    def restore(self, module: nn.Module) -> None:
        """Give ``module`` its settings back."""
        for name in _own(module):
            del module.__dict__[name]
        module.__dict__.update(self._settings[id(module)][1])


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OF_MODULES}


def _without_mode(module: nn.Module) -> dict[str, Any]:
    found = dict(module.__dict__)
    found.pop("training", None)
    return found


def _tensors(module: nn.Module) -> list[int]:
    return [id(t) for home in (module._parameters, module._buffers) for t in home.values()]


def _is_plain(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    return all(map(_is_plain, value)) if type(value) is tuple else isinstance(value, _PLAIN)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if is_live(a):
        return False
    if type(a) is Watchful:
        a = plain(a)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in (bool, int, float, complex, str, bytes) and bool(a == b)
