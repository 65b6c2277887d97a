"""Functions that remember their results by their arguments, such as those under ``functools.lru_cache``.

A live size equals the plain number that an earlier forward asked for, so a cache would answer with that forward's plain
numbers: the graph would silently be made for one batch size. While a forward is recorded, cached functions that are
given a live number run uncached. Finding them takes a look at every loaded module, so it is only done once a live
number is hashed, by starting the capture over.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from chase_fx.graphs.live import is_live
from chase_fx.graphs.pyoperators import fixing

__all__ = ["Uncached", "uncached"]

_Cached = functools._lru_cache_wrapper
# Nothing in these computes sizes for a model; torch's own caches see plain numbers only.
_SKIPPED = frozenset(sys.stdlib_module_names | {"torch"})


class Uncached:
    """A cached function that asks its cache for plain arguments only; in everything else it is that function."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself for live numbers, the cached one for others."""
        if not any(map(_holds_live, args)) and not any(map(_holds_live, kwargs.values())):
            return self._function(*args, **kwargs)
        function = self._function.__wrapped__
        if isinstance(function, types.BuiltinFunctionType):  # it reads numbers without asking them
            function = fixing(function)
        return function(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def _holds_live(value: Any) -> bool:
    return is_live(value) or (isinstance(value, (tuple, frozenset)) and any(map(_holds_live, value)))


def uncached(root: nn.Module) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """(owner, name, replacement) for the cached functions of all loaded modules and of the classes in ``root``."""
    owners: list[Any] = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] not in _SKIPPED]
    classes = {base for module in root.modules() for base in type(module).__mro__}
    owners += [cls for cls in classes if cls.__module__.partition(".")[0] not in _SKIPPED]
    for owner in owners:
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if type(value) is _Cached:
                yield owner, name, Uncached(value)
