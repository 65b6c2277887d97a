"""Functions and classes of Python's library that read numbers without asking them."""

from __future__ import annotations

import array
import collections
import decimal
import fractions
import json
import random
import struct
import types
from typing import Any

import numpy as np

from chase_fx.graphs.pyoperators import fixing

__all__ = ["READERS", "Readers"]

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
