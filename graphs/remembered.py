"""What earlier forwards left in the modules, and a forward makes again for inputs of other sizes.

A detector keeps the anchors of the last image: ``if self.shape != x.shape: self.anchors = ...; self.shape = x.shape``.
Captured after a forward of the example's sizes, a graph would hold these anchors, and a guard that refuses all inputs
for which the model makes new ones. So such attributes are forgotten in the copy that is captured, and the graph makes
what belongs to them in every call. At other sizes the model goes that way itself. At the remembered ones the result has
to be the same, and the forward has to write the very same to the attributes: what it does not write is no memory.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Graph, Node

from chase_fx.graphs.draws import restored_generators
from chase_fx.graphs.guards import agree, check
from chase_fx.graphs.reach import Code, is_own
from chase_fx.graphs.trees import tensors_in
from chase_fx.graphs.walk import modules_of

__all__ = ["Attributes", "decides_by_memory", "forget", "remade"]

Attributes = frozenset[tuple[str, str]]  # (module, name) of each

_STORE = dis.opmap["STORE_ATTR"]
_EQUAL = ("==", True), ("!=", False)


def decides_by_memory(graph: Graph, model: nn.Module, code: Code) -> Attributes:
    """Attributes that may be why a graph holds for some sizes only: they hold such sizes, and methods write them."""
    sizes = {size for node in graph.nodes for size in _tied_sizes(node)}
    if not sizes:
        return frozenset()
    reached = {id(function) for function in code.functions}
    written: dict[type, set[str]] = {}
    found = set()
    for owner, module in modules_of(model):
        cls = type(module)
        if cls not in written:
            written[cls] = set(_written(cls, reached)) if is_own(cls.__module__) else set()
        found |= {
            (owner, n) for n in written[cls] & vars(module).keys() if not sizes.isdisjoint(_held(vars(module)[n]))
        }
    return frozenset(found)


def _tied_sizes(node: Node) -> Iterator[Any]:
    """The plain number that a guard wants a size to be."""
    if node.target is check and (node.args[1], node.args[3]) in _EQUAL:
        yield from (side for side in (node.args[0], node.args[2]) if not isinstance(side, Node))


def _written(cls: type, reached: set[int]) -> Iterator[str]:
    """The attributes that methods of a class assign to, other than where it is made."""
    for base in cls.__mro__:
        for name, member in vars(base).items():
            method = inspect.unwrap(member) if isinstance(member, FunctionType) else None
            if method is not None and id(method) in reached and name != "__init__":
                yield from (str(i.argval) for i in dis.get_instructions(method) if i.opcode == _STORE)


def _held(value: Any) -> Iterator[int]:
    """The sizes that an attribute holds or has."""
    if type(value) is int:
        yield value
    elif type(value) is torch.Tensor:
        yield from value.shape
    elif type(value) in (tuple, list, torch.Size):
        for item in value:
            yield from _held(item)


def _other(value: Any) -> Any:
    """``value`` with sizes that no tensor has, or none at all."""
    if type(value) is int:
        return -1
    if type(value) is torch.Tensor:
        return value.new_empty((0,) * value.dim())
    return type(value)(map(_other, value)) if type(value) in (tuple, list, torch.Size) else value


def forget(root: nn.Module, attributes: Collection[tuple[str, str]]) -> None:
    """Let what ``root`` remembers in these attributes be of sizes that no input has."""
    modules = dict(modules_of(root)) if attributes else {}
    for owner, name in attributes:
        vars(modules[owner])[name] = _other(vars(modules[owner])[name])


class Run(Protocol):
    """Makes a copy of a model, does to it what it is given, runs it, and returns it with its result."""

    def __call__(self, prepare: Callable[[nn.Module], None]) -> tuple[nn.Module, Any]:
        """See the class."""


def remade(run: Run, model: nn.Module, attributes: Attributes) -> Attributes:
    """Those of ``attributes`` that a forward makes again as they were, if its result is the same without them.

    Args:
        run: a forward of a copy of ``model``.
        model: the model that remembers.
        attributes: what may be its memory.
    """
    modules = dict(modules_of(model)) if attributes else {}
    while attributes:
        try:
            with torch.no_grad():
                with restored_generators():
                    _, want = run(lambda _: None)
                with restored_generators():
                    copy, have = run(partial(forget, attributes=attributes))
        except Exception:  # noqa: BLE001 - it takes the attributes to run
            return frozenset()
        after = dict(modules_of(copy))
        kept = {(o, n) for o, n in attributes if _same(vars(modules[o])[n], vars(after[o]).get(n))}
        if kept == attributes:
            same = _same(list(tensors_in(want)), list(tensors_in(have)))
            return attributes if same else frozenset()
        attributes = frozenset(kept)
    return attributes


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal, a NaN being equal to itself."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and bool(agree(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)
