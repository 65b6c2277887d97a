"""Regions that a forward enters only where a region of autocast is around it already.

``torch.is_autocast_enabled()`` is asked in order to turn casting off for a while, and not to bother where it is off. No
recorder sees the question. So a forward whose code can ask is recorded a second time inside a region, and the regions
that it enters then are added to the first recording. They turn casting off, so elsewhere they do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.autocast import AUTOCAST, enter_autocast, region_settings
from chase_fx.graphs.reach import Code

__all__ = ["add_regions", "asks", "inside_region"]

_MARKS: frozenset[Any] = AUTOCAST | {region_settings}
_NAMES = frozenset({"is_autocast_enabled", "autocast"})


def asks(code: Code) -> bool:
    """Whether a function that the forward may call asks for a region around it, and makes one itself."""
    return any(_NAMES.issubset(function.__code__.co_names) for function in code.functions)


@contextmanager
def inside_region(device: torch.device | None) -> Iterator[None]:
    """A region of autocast on the model's device."""
    kind = "cpu" if device is None else device.type
    with torch.autocast(kind, dtype=torch.bfloat16):
        yield


def add_regions(graph: Graph, found: Graph) -> None:
    """Add the regions of ``found`` that ``graph`` lacks; none if the two differ in anything else but types.

    What follows the type of a tensor (``y.to(x.dtype)``) differs between them, and is no reason.
    """
    ours = list(graph.nodes)
    twin: dict[Node, Node] = {}
    extra: list[tuple[Node, Node]] = []  # marker, and the node before which it stands
    position = 0
    for node in found.nodes:
        if position < len(ours) and _alike(ours[position], node, twin):
            twin[node] = ours[position]
            position += 1
        elif node.target in _MARKS and position < len(ours):
            extra.append((node, ours[position]))
        else:
            return
    if position < len(ours) or not all(_turns_off(node) for node, _ in extra if node.target is enter_autocast):
        return
    for node, place in extra:
        with graph.inserting_before(place):
            twin[node] = graph.node_copy(node, lambda n: twin[n])


def _turns_off(enter: Node) -> bool:
    settings: Any = enter.args[0]
    return (settings.args[1] if isinstance(settings, Node) else settings[1]) is False


def _alike(a: Node, b: Node, twin: dict[Node, Node]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Node) or isinstance(y, Node):
            return isinstance(y, Node) and twin.get(y) is x
        if isinstance(x, (tuple, list)):
            return isinstance(y, (tuple, list)) and len(x) == len(y) and all(map(same, x, y))
        if isinstance(x, dict):
            return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, slice):
            return isinstance(y, slice) and all(map(same, (x.start, x.stop, x.step), (y.start, y.stop, y.step)))
        if isinstance(x, (torch.dtype, float)) and type(x) is type(y):  # a type that is followed, or its limit
            return True
        return type(x) is type(y) and (x is y or bool(x == y))

    return a.op == b.op and a.target == b.target and same((a.args, a.kwargs), (b.args, b.kwargs))
