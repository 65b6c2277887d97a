"""Parts of a graph that run or are left out as a random draw or data decide.

A graph stays one flat list of nodes, so that every pass reads it as ever: ``begin`` or ``follow``, the nodes of one
way, ``otherwise``, those of the other way, ``join``; then a ``choose`` for each value that is one thing after the one
way and another after the other. Only the code that is generated knows that the two parts are alternatives.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.graph import PythonCode, _custom_builtins
from torch.fx.node import has_side_effect

from chase_fx.graphs.guards import check_data

__all__ = [
    "BEGINNINGS",
    "BRANCHES",
    "begin",
    "choose",
    "follow",
    "join",
    "nested_code",
    "otherwise",
    "python_code",
    "result",
]


def begin(condition: Any, expected: bool) -> bool:
    """Whether the nodes up to ``otherwise`` run: those of the way on which ``condition`` has the expected truth."""
    return bool(condition) is expected


def follow(condition: torch.Tensor, expected: bool, found: bool, where: str) -> bool:
    """:func:`begin` of data.

    A compiled graph can't wait for them: it goes the way of the capture, and asserts that this is theirs.
    """
    if torch.compiler.is_compiling() or condition.is_meta:
        check_data(condition, found, where)
        return found is expected
    return bool(condition.item()) is expected


def otherwise(taken: bool) -> bool:
    """Begins the other way."""
    return not taken


def join(other: bool) -> bool:
    """Ends the other way."""
    return other


def choose(taken: bool, first: Any, second: Any) -> Any:
    """The value after the way that was taken; that of the other way was not computed."""
    return first if taken else second


def result(value: Any) -> Any:
    """What the forward returns."""
    return value


# Kept although nobody reads their value: where they stand is what they mean.
BEGINNINGS: frozenset[Any] = frozenset({has_side_effect(begin), has_side_effect(follow)})
BRANCHES: frozenset[Any] = BEGINNINGS | {has_side_effect(otherwise), has_side_effect(join)}
_INDENT = "    "


def python_code(graph: Graph) -> PythonCode:
    """The code of a graph, in which only one of two ways runs and no argument hides a name of FX's."""
    with nested_code(graph):
        return graph.python_code(root_module="self")


@contextmanager
def nested_code(graph: Graph) -> Iterator[None]:
    """Code that is generated inside the block is as :func:`python_code` gives it."""
    codegen: Any = graph._codegen
    before = codegen._body_transformer
    nested, reads = _nested(graph), _reads(graph)
    codegen._body_transformer = lambda body: nested(reads(body))
    try:
        yield
    finally:
        codegen._body_transformer = before


def _reads(graph: Graph) -> Callable[[list[str]], list[str]]:
    """Arguments that FX gives another name are read first, since a node may have theirs.

    Where one is called ``inf``, ``torch``, ``list`` or alike, what FX means by it follows.
    """
    given = {n.name: str(n.target).lstrip("*") for n in graph.nodes if n.op == "placeholder"}
    renamed = {name: argument for name, argument in given.items() if name != argument}
    if not renamed:
        return lambda body: body
    functions = {name for name in renamed.values() if any(vars(builtins).get(name) is n.target for n in graph.nodes)}

    def reads(body: list[str]) -> list[str]:
        text = "".join(body)
        first = []
        for name, argument in renamed.items():
            read = re.compile(rf"^{name} = {argument}\b.*\n", re.MULTILINE)
            first += [found[0]] if (found := read.search(text)) else []
            text = read.sub("", text, count=1)
        for argument in renamed.values():
            if argument in _custom_builtins:
                first.append(f"{_custom_builtins[argument].import_str}\n")
            elif argument in functions:
                first.append(f"from builtins import {argument}\n")
        return [*first, text]

    return reads


def _nested(graph: Graph) -> Callable[[list[str]], list[str]]:
    """Turns the lines between markers into blocks; what a way leaves out is ``None`` there."""
    markers = {node.name: node.target for node in graph.nodes if node.target in BRANCHES}
    if not markers:
        return lambda body: body
    undefined = _undefined(graph)

    def nested(body: list[str]) -> list[str]:
        lines: list[str] = []
        depth = 0
        for line in "".join(body).split("\n"):
            name = found[1] if (found := re.match(r"(\w+) = ", line)) else ""
            marker = markers.get(name)
            if marker in (otherwise, join):
                depth -= 1
            indent = _INDENT * depth
            if marker is None or marker in BEGINNINGS:
                lines.append(indent + line if line else line)
            if marker is not None and marker is not join:
                lines.append(f"{indent}else:" if marker is otherwise else f"{indent}if {name}:")
                lines.append(f"{indent}{_INDENT}pass")
                lines += [f"{indent}{_INDENT}{value} = None" for value in undefined.get(name, ())]
                depth += 1
        return ["\n".join(lines)]

    return nested


def _undefined(graph: Graph) -> dict[str, list[str]]:
    """By the marker that a block begins with: values of the other block that are chosen from after both."""
    around: list[str] = []
    blocks: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.target in (otherwise, join):
            around.pop()
        if node.target is otherwise or node.target in BEGINNINGS:
            around.append(node.name)
        blocks[node.name] = tuple(around)
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.target is choose:
            taken = node.args[0]
            other = next(user for user in taken.users if user.target is otherwise)
            for value, own, opposite in ((node.args[1], taken, other), (node.args[2], other, taken)):
                names = found.setdefault(opposite.name, [])
                if isinstance(value, Node) and own.name in blocks[value.name] and value.name not in names:
                    names.append(value.name)
    return found
