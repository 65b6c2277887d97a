"""Graphs as plain data, so that traced and slim modules pickle (``torch.save``, process pools, launchers).

``GraphModule`` pickles its generated code and traces it again, which would lose the tapes, the labels' slots and the
train graph. Here a graph is a flat list of its nodes: linked nodes would overflow the stack of a recursive pickler.
Operators of torch don't pickle, but they have names.
"""

from __future__ import annotations

import importlib
import operator
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.functions import Level, caller_of

__all__ = ["FlatGraph", "flatten", "from_plain", "restore", "to_plain"]


@dataclass(frozen=True)
class _Ref:
    """A node as an argument: its position in the list."""

    index: int


@dataclass(frozen=True)
class _Named:
    """An attribute of torch that does not pickle by itself under every protocol, such as a memory format."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of ``torch.ops``: ``aten::add.Tensor`` for one overload, ``aten::add`` for all of them."""

    name: str


@dataclass(frozen=True)
class _Function:
    """A function that was made inside another one and lies in a module under its own name, such as ``F.max_pool2d``."""

    module: str
    name: str


@dataclass(frozen=True)
class _Applied:
    """The caller of a custom autograd function, and the vmaps that it is applied under."""

    cls: Any
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class FlatGraph:
    """Nodes in order: (name, op, target, args, kwargs, meta)."""

    nodes: tuple[tuple[str, str, Any, Any, Any, dict[str, Any]], ...]


def flatten(graph: Graph) -> FlatGraph:
    """``graph`` as plain data."""
    index = {node: _Ref(i) for i, node in enumerate(graph.nodes)}
    return FlatGraph(
        tuple(
            (n.name, n.op, to_plain(n.target), to_plain(n.args, index), to_plain(n.kwargs, index), _meta(n, index))
            for n in graph.nodes
        )
    )


def _meta(node: Node, index: Mapping[Node, _Ref]) -> dict[str, Any]:
    """What is known of a node; of nodes in it, those of the same graph."""
    found = {k: index.get(v) if isinstance(v, Node) else v for k, v in node.meta.items()}
    return {k: v for k, v in found.items() if v is not None or node.meta[k] is None}


def restore(flat: FlatGraph) -> Graph:
    """The graph that :func:`flatten` was given, as a new object."""
    graph = Graph()
    nodes: list[Node] = []
    for name, op, target, args, kwargs, meta in flat.nodes:
        node = graph.create_node(op, from_plain(target), from_plain(args, nodes), from_plain(kwargs, nodes), name)
        node.meta = {k: nodes[v.index] if isinstance(v, _Ref) else v for k, v in meta.items()}
        nodes.append(node)
    return graph


def to_plain(value: Any, index: Mapping[Node, _Ref] = MappingProxyType({})) -> Any:
    """An argument or a target as something that pickles."""

    def leaf(found: Any) -> Any:
        if isinstance(found, Node):
            return index[found]
        if isinstance(found, (torch.memory_format, torch.layout)):
            return _Named(str(found).removeprefix("torch."))
        if isinstance(found, torch._ops.OpOverload):
            return _Operator(f"{found._schema.name}.{found._overloadname}")
        if isinstance(found, torch._ops.OpOverloadPacket):
            return _Operator(found._qualified_op_name)
        if isinstance(found, types.FunctionType) and "<locals>" in found.__qualname__:
            module, name = found.__module__, found.__name__
            if module in sys.modules and vars(sys.modules[module]).get(name) is found:
                return _Function(module, name)
        applied = getattr(found, "applies", None) if callable(found) else None
        return found if applied is None else _Applied(*applied)

    return _map(value, leaf)


def from_plain(value: Any, nodes: Sequence[Node] = ()) -> Any:
    """The argument or target that :func:`to_plain` was given.

    Raises:
        AttributeError: the library that defines a custom operator is not loaded.
    """

    def leaf(found: Any) -> Any:
        if isinstance(found, _Ref):
            return nodes[found.index]
        if isinstance(found, _Named):
            return getattr(torch, found.name)
        if isinstance(found, _Operator):
            namespace, _, path = found.name.partition("::")
            return operator.attrgetter(path)(getattr(torch.ops, namespace))
        if isinstance(found, _Function):
            return getattr(importlib.import_module(found.module), found.name)
        return caller_of(found.cls, found.levels) if isinstance(found, _Applied) else found

    return _map(value, leaf)


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, leaf) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, leaf) for v in value)
    if isinstance(value, dict):
        return type(value)((k, _map(v, leaf)) for k, v in value.items())
    if isinstance(value, slice):
        return slice(*(_map(v, leaf) for v in (value.start, value.stop, value.step)))
    return leaf(value)
