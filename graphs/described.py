"""Values of any class as texts, which are equal where the values are.

Pickling knows what an object is made of: attributes, slots, what is in a C object. Besides that it is told here what
functions and classes are that no module has under their names, such as a lambda: code, defaults and what it closes
over. A tensor has no text, for reading its data is what a graph does; nor has what can't be pickled, such as a
generator that is running.
"""

from __future__ import annotations

import hashlib
import io
import operator
import pickle
import sys
import types
from typing import Any

import torch

__all__ = ["HoldsTensorError", "NotDescribedError", "described", "importable", "kind_of"]

_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_OF_CODE = (
    "co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags", "co_argcount",
    "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable",
)  # fmt: skip
_UNTOLD = frozenset({"__doc__", "__module__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"})


class NotDescribedError(Exception):
    """A value is not told by what it is made of."""


class HoldsTensorError(NotDescribedError):
    """There is a tensor in a value."""


def described(value: Any) -> str:
    """The class of ``value`` and a digest of everything that it is made of.

    Raises:
        HoldsTensorError: there is a tensor in it.
        NotDescribedError: it can't be told.
    """
    return f"{kind_of(value)} {hashlib.sha256(_pickled(value)).hexdigest()[:32]}"


def kind_of(value: Any) -> str:
    """The name of a value's class, by which it is known in other processes too."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def importable(value: Any) -> bool:
    """Whether a function or class is what a module has under its name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    try:
        return operator.attrgetter(name)(sys.modules[str(module)]) is value
    except (AttributeError, KeyError):
        return False


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=4)
    pickler.fast = True  # two equal parts make the same text whether they are one object or two
    try:
        pickler.dump(value)
    except HoldsTensorError:
        raise
    except Exception as e:  # each class says in its own way that it can't be pickled
        raise NotDescribedError(f"{type(e).__name__}: {e}") from e
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._classes: dict[type, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Sets have no order, so the texts of what is in them are sorted."""
        if type(obj) not in (set, frozenset):
            return None
        return type(obj).__name__, sorted(map(_pickled, obj))

    def reducer_override(self, obj: Any) -> Any:
        """What pickling does not know."""
        if isinstance(obj, (torch.Tensor, torch.UntypedStorage)):
            raise HoldsTensorError
        if isinstance(obj, types.FunctionType) and not importable(obj):
            cells = tuple(map(_content, obj.__closure__ or ()))
            named = obj.__module__, obj.__qualname__
            return _stands, ("function", *named, obj.__code__, obj.__defaults__, obj.__kwdefaults__, cells)
        if isinstance(obj, types.CodeType):
            return _stands, tuple(getattr(obj, name) for name in _OF_CODE)
        if isinstance(obj, (staticmethod, classmethod)):
            return _stands, (type(obj).__name__, obj.__func__)
        if isinstance(obj, property):
            return _stands, ("property", obj.fget, obj.fset, obj.fdel)
        if isinstance(obj, _SLOTS):
            return _stands, ("slot", obj.__name__)
        if isinstance(obj, type) and obj.__module__ != "builtins" and not importable(obj):
            return self._class(obj)
        return NotImplemented

    def _class(self, cls: type) -> Any:
        named = cls.__module__, cls.__qualname__
        if cls in self._classes:  # its methods close over it
            return _stands, ("class", *named, self._classes[cls])
        self._classes[cls] = len(self._classes)
        members = {name: member for name, member in vars(cls).items() if name not in _UNTOLD}
        return _stands, ("class", *named, cls.__bases__, members)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return "empty"


def _stands(*parts: Any) -> None:
    """A name for what stands in the text for something else; nothing is ever loaded from it."""
