"""One graph for train and eval mode: constants that differ between the two captures are chosen by the module's mode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.modes import FLAG
from chase_fx.graphs.opaque import Rebuild, alike
from chase_fx.graphs.tape import Tape

__all__ = ["by_mode", "merge", "share_constants", "share_rebuilds"]


def by_mode(training: bool, in_train: Any, in_eval: Any) -> Any:
    """The constant that belongs to the module's mode."""
    return in_train if training else in_eval


def merge(graph: Graph, train: Graph) -> bool:
    """Make ``graph`` serve both modes, if the two differ in constants only."""
    ours, theirs = list(graph.nodes), list(train.nodes)
    if len(ours) != len(theirs):
        return False
    twin = dict(zip(theirs, ours, strict=True))
    edits: list[tuple[Node, tuple[Any, ...], dict[str, Any]]] = []
    differ = _Differences(twin)
    for a, b in zip(ours, theirs, strict=True):
        if a.op != b.op or a.target != b.target or len(a.args) != len(b.args) or set(a.kwargs) != set(b.kwargs):
            return False
        marks = [differ(x, y) for x, y in zip(a.args, b.args, strict=True)]
        kmarks = {k: differ(a.kwargs[k], b.kwargs[k]) for k in a.kwargs}
        if differ.failed or (differ.found and a.op == "get_attr"):
            return False
        if differ.found:
            edits.append((a, tuple(marks), kmarks))
            differ.found = False
    if not edits:
        return True
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        flag = graph.call_module(FLAG)
        flag.meta["source"] = ""
    for node, args, kwargs in edits:
        with graph.inserting_before(node):
            node.args = tuple(_place(graph, flag, a) for a in args)
            node.kwargs = {k: _place(graph, flag, v) for k, v in kwargs.items()}
    return True


class _Choice:
    def __init__(self, in_train: Any, in_eval: Any) -> None:
        self.in_train, self.in_eval = in_train, in_eval


class _Differences:
    """Compares two argument trees; constants that differ become a :class:`_Choice`."""

    def __init__(self, twin: dict[Node, Node]) -> None:
        self.twin = twin
        self.found = self.failed = False

    def __call__(self, a: Any, b: Any) -> Any:
        if isinstance(b, Node) or isinstance(a, Node):
            self.failed = self.failed or not isinstance(b, Node) or self.twin.get(b) is not a
            return a
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            items = [self(x, y) for x, y in zip(a, b, strict=True)]
            return type(a)(items) if not hasattr(a, "_fields") else type(a)(*items)
        if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
            return {k: self(a[k], b[k]) for k in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(self(a.start, b.start), self(a.stop, b.stop), self(a.step, b.step))
        if type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))):
            return a
        if isinstance(a, (bool, int, float)) and isinstance(b, (bool, int, float)):
            self.found = True
            return _Choice(b, a)
        self.failed = True
        return a


def _place(graph: Graph, flag: Node, value: Any) -> Any:
    if isinstance(value, _Choice):
        if value.in_train is True and value.in_eval is False:
            return flag
        node = graph.call_function(by_mode, (flag, value.in_train, value.in_eval))
        node.meta["source"] = ""
        return node
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_place(graph, flag, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_place(graph, flag, v) for v in value)
    if isinstance(value, dict):
        return {k: _place(graph, flag, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_place(graph, flag, value.start), _place(graph, flag, value.stop), _place(graph, flag, value.step))
    return value


def share_constants(
    graph: Graph, tape: Tape, found: Mapping[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> None:
    """Constants ``found`` by the second capture that equal one of the first share it; others get their own names."""
    names: dict[str, str] = {}
    for name, tensor in found.items():
        same = constants.get(name)
        if same is not None and same.dtype == tensor.dtype and torch.equal(same, tensor):
            names[name] = name
            continue
        names[name] = f"{name}_train"
        constants[names[name]] = tensor
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = names[node.target]
    for slot in tape.slots:
        if slot.kind == "constant" and slot.name in names:
            slot.name = names[slot.name]


def share_rebuilds(graph: Graph, found: dict[str, Rebuild], rebuilds: Mapping[str, Rebuild]) -> None:
    """Templates ``found`` by the second capture that are not those of the first get their own names."""
    names = {
        name: name if name in rebuilds and alike(rebuild.template, rebuilds[name].template) else f"{name}_train"
        for name, rebuild in found.items()
    }
    for node in graph.nodes:
        if node.op == "call_module" and node.target in names:
            node.target = names[node.target]
    for name, new in names.items():
        found[new] = found.pop(name)
