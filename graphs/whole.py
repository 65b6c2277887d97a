"""Functions that stay one call of the graph.

A graph holds one way through the model's Python code. Where the data decides which one (how many classes the boxes of
an image have), no graph can hold them all; but a function of tensors alone can be called as it is, and finds its way
itself. Its channels stay then: nothing inside is rewritten, so what goes in and what comes out keeps its size.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from chase_fx.errors import ArgumentError
from chase_fx.graphs.source import is_model_code

__all__ = ["Function", "FunctionName", "bindings", "enclosing", "functions", "named"]

Function = Callable[..., Any]
FunctionName = tuple[str, str]  # a module of Python, and the function's name there


def functions(given: Sequence[Function]) -> tuple[Function, ...]:
    """The functions that a caller names. Raises :class:`ArgumentError` for what no name of a Python module leads to."""
    if not isinstance(given, Sequence):
        raise ArgumentError(f"whole must be a list of functions, found {type(given).__name__}")
    for function in given:
        name = str(getattr(function, "__name__", ""))
        if not callable(function) or not any(vars(m).get(name) is function for m in list(sys.modules.values())):
            raise ArgumentError(f"whole takes functions of the top level of a Python module, found {function!r}")
    return tuple(given)


def enclosing() -> tuple[FunctionName, ...]:
    """The functions of the top level that run right now, innermost first, up to the method that called them."""
    found: list[FunctionName] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_model_code(frame.f_code.co_filename):
            if isinstance(frame.f_locals.get("self"), nn.Module):
                break
            name = (str(frame.f_globals.get("__name__")), frame.f_code.co_name)
            function = named(name)
            if callable(function) and getattr(inspect.unwrap(function), "__code__", None) is frame.f_code:
                found.append(name)
        frame = frame.f_back
    return tuple(found)


def named(name: FunctionName) -> Function | None:
    """The function of that name."""
    module = sys.modules.get(name[0])
    return None if module is None else vars(module).get(name[1])


def bindings(function: Function, code: tuple[types.FunctionType, ...]) -> Iterator[tuple[types.ModuleType, str]]:
    """Where the model's code finds ``function``: modules of Python, and the name that it has there."""
    names = dict.fromkeys([function.__module__, *(f.__module__ for f in code)])
    for module in [sys.modules[name] for name in names if name in sys.modules]:
        for name, value in vars(module).items():
            if value is function:
                yield module, name
