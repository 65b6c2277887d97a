"""Functions and classes that read numbers without asking them: of Python's library, and of extensions in C."""

from __future__ import annotations

import array
import collections
import decimal
import fractions
import json
import random
import struct
import types
from collections.abc import Container
from typing import Any

import numpy as np

from chase_fx.graphs.pyoperators import fixing
from chase_fx.graphs.reach import is_own

__all__ = ["READERS", "Extended", "Readers", "is_extension", "leads_to_extension"]

# Of modules whose other names stay: what is called reads numbers, what is not may be a class.
READERS: dict[types.ModuleType, tuple[str, ...]] = {
    array: ("array",),
    collections: ("deque",),
    decimal: ("Decimal",),
    fractions: ("Fraction",),
    json: ("dumps",),
    np.random: ("RandomState", "default_rng"),
    random: ("Random",),
    struct: ("pack",),
}


class _Reader:
    """A function or a class that reads numbers without asking them, called with plain ones that are guarded."""

    def __init__(self, own: Any) -> None:
        self._own, self._fixing = own, fixing(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fixing(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class Readers(types.ModuleType):
    """A module some names of which read numbers. The others are what they are now: a recording replaces functions."""

    def __init__(self, home: types.ModuleType, names: tuple[str, ...]) -> None:
        super().__init__(home.__name__)
        self._home = home
        vars(self).update({name: _Reader(getattr(home, name)) for name in names})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._home, name)


# Of functions that are written in C, or made into it.
_COMPILED = frozenset({"builtin_function_or_method", "cython_function_or_method", "nb_func"})


def is_extension(value: Any) -> bool:
    """Whether ``value`` is a function in C of a module that is neither torch's, NumPy's nor Python's own."""
    if type(value).__name__ not in _COMPILED:
        return False
    home, owner = getattr(value, "__module__", None), getattr(value, "__self__", None)
    if home is None and isinstance(owner, types.ModuleType):
        home = owner.__name__
    return isinstance(home, str) and is_own(home)


def leads_to_extension(module: types.ModuleType, names: Container[str]) -> bool:
    """Whether code with these names may mean such a function by ``module.name`` or ``module.part.name``."""
    return is_own(module.__name__) and any(
        name in names and (is_extension(value) or (_is_part(value, module) and leads_to_extension(value, names)))
        for name, value in list(vars(module).items())
    )


def _is_part(value: Any, module: types.ModuleType) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.startswith(module.__name__ + ".")


class Extended(types.ModuleType):
    """A module whose functions in C get plain numbers that are guarded; all else is read from it and written to it."""

    def __init__(self, home: types.ModuleType) -> None:
        super().__init__(home.__name__)
        vars(self)["_home"] = home

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._home, name)
        if is_extension(found):
            return fixing(found)
        return Extended(found) if _is_part(found, self._home) else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._home, name, value)
