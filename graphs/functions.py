"""Custom autograd functions as targets of a graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_structure, tree_unflatten

__all__ = ["Level", "caller_of", "forward_patches", "holds_code"]

# Where torch makes a function for each operator that has a derivative in Python: there are hundreds, and only the
# operator applies them, whose call is what a recording sees.
_OF_OPERATORS = "torch._library.autograd"


class Level(NamedTuple):
    """A ``torch.vmap`` around an autograd function, by its arguments.

    Attributes:
        in_dims: one for each leaf of what the function is applied to.
    """

    in_dims: tuple[int | None, ...]
    out_dims: Any
    randomness: str


@functools.cache
def caller_of(cls: Any, levels: tuple[Level, ...] = ()) -> Callable[..., Any]:
    """A plain function that applies an autograd function, for ``cls.apply`` is bound to the class and has no name.

    Args:
        cls: the function.
        levels: the vmaps that it is applied under, from the inside out.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        function = cls.apply
        for level in levels:
            in_dims = tree_unflatten(level.in_dims, tree_structure(args))
            function = torch.vmap(function, in_dims, level.out_dims, level.randomness)
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"apply_{cls.__name__}"
    call.applies = cls, levels  # type: ignore[attr-defined]  # by which it is found again when a graph is unpickled
    if levels:  # Dynamo loses the function's own backward under vmap, or can't look into it
        torch.compiler.allow_in_graph(call)
    return call


def forward_patches(call: Callable[[Any, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[tuple[Any, str, Any]]:
    """(class, ``"forward"``, replacement) for every autograd function that a model may apply.

    The replacement is ``call(class, run, args)`` with the arguments that the function was applied to.
    """
    todo: list[Any] = [torch.autograd.Function]
    while todo:
        todo += (cls := todo.pop()).__subclasses__()
        if cls.__module__ != _OF_OPERATORS and isinstance(cls.__dict__.get("forward"), staticmethod):
            yield cls, "forward", staticmethod(_forward(cls, cls.__dict__["forward"].__func__, call))


def _forward(cls: Any, original: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        if cls.setup_context is not torch.autograd.Function.setup_context:
            return call(cls, original, args)
        context = args[0]  # made for the class that is applied, which may inherit this forward
        return call(getattr(type(context), "_forward_cls", cls), functools.partial(original, context), args[1:])

    forward.__wrapped__ = original  # type: ignore[attr-defined]  # so that it has the original's signature
    return forward


def holds_code(value: Any) -> bool:
    """Whether a module or a function is in ``value``, which can't be an argument in a graph."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_code, value))
    return isinstance(value, (nn.Module, types.FunctionType, types.MethodType, functools.partial))
