"""Which values of a forward ask for a gradient, and where the forward cuts them off.

A capture runs without gradients, so this follows from the nodes: parameters that are trained ask for one, and so does
what depends on them, but for what passes a ``no_grad`` region or leaves an autograd function beside its result.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.enabled import enter_enabled, exit_enabled
from chase_fx.graphs.shadows import given_path
from chase_fx.graphs.source import source_line
from chase_fx.graphs.tape import Slot, Tape
from chase_fx.graphs.trees import tensors_in

__all__ = ["Gradients"]


class Gradients:
    """The gradients of one forward.

    Args:
        parameters: those of the model, by name.
        nodes: which node computes a tensor, by the tensor's identity; it grows.
        tape: the calls of the forward.

    Attributes:
        off: the forward is in a ``no_grad`` region.
        trainable: names of the parameters that are trained.
    """

    def __init__(
        self, graph: Graph, parameters: Mapping[str, torch.Tensor], nodes: Mapping[int, Node], tape: Tape
    ) -> None:
        self.off = False
        self._tape = tape
        self._modes = [(0, False)]  # from which call on they were off
        self.trainable = {name for name, p in parameters.items() if p.requires_grad}
        self._graph = graph
        self._nodes = nodes
        self._detached: dict[Node, Node] = {}
        self._regions: list[Node | None] = []  # where those that are not over begin
        self._cut: set[int] = set()  # tensors that left an autograd function beside its result
        self._owners = _owners(self.trainable)

    def enter_mode(self, *, enabled: bool, by: str) -> None:
        """From here on the forward runs with gradients enabled or disabled, says the Python function named ``by``.

        Only an end of a region that enables them has a node.
        """
        self.off = not enabled
        if by == "__enter__":
            self._regions.append(self._mark(enter_enabled) if enabled else None)
        elif by == "__exit__" and self._regions and (begun := self._regions.pop()) is not None:
            self._mark(exit_enabled, begun)
        self._modes.append((len(self._tape.ops), self.off))
        self._detached = {}

    def _mark(self, end: Callable[..., Any], *args: Node) -> Node:
        node = self._graph.call_function(end, args)
        node.meta["source"] = source_line()
        return node

    @contextmanager
    def inside_function(self) -> Iterator[Callable[[Any], Any]]:
        """The forward of an autograd function runs inside the block; its result is passed through what this yields.

        Whatever else leaves the function (states of a cache) has no gradient, for the forward runs without.
        """
        before, result = dict(self._nodes), set[int]()

        def result_of(out: Any) -> Any:
            result.update(map(id, tensors_in(out)))
            return out

        yield result_of
        made = {k for k, node in self._nodes.items() if before.get(k) is not node and node.op != "get_attr"}
        self._cut |= made - result

    def trains(self, module: str) -> bool:
        """Whether a parameter of the module asks for a gradient."""
        return module in self._owners

    def needed(self, node: Node) -> bool:
        """Whether ``node`` depends on a parameter that is trained; inputs ask for no gradient."""
        if node.meta.get("trained") is None:
            if node.op == "get_attr":
                found = given_path(str(node.target)) in self.trainable
            else:
                found = node.meta.get("grad") is not False and any(map(self.needed, node.all_input_nodes))
            node.meta["trained"] = found
        return bool(node.meta["trained"])

    def here(self, node: Node) -> Node:
        """``node`` as it is used here. What enters a ``no_grad`` region is detached, so nothing in it needs to know."""
        if not self.off or not _possible(node):
            return node
        if node not in self._detached:
            self._detached[node] = self._detach(node, node.meta.get("slot"))
        return self._detached[node]

    @contextmanager
    def at(self, position: int) -> Iterator[None]:
        """Inside the block gradients are as they were at a call of the tape, for a node that makes it later."""
        before = self.off, self._detached
        self.off = self._modes[bisect_right(self._modes, position, key=lambda mode: mode[0]) - 1][1]
        if self.off is not before[0]:
            self._detached = {}
        try:
            yield
        finally:
            self.off, self._detached = before

    def outside(self, tensor: torch.Tensor, node: Node, slot: Slot) -> Node:
        """The node of ``tensor``, detached if it left an autograd function beside its result."""
        return self._detach(node, slot) if id(tensor) in self._cut and _possible(node) else node

    def _detach(self, node: Node, slot: Slot | None) -> Node:
        alias = self._graph.call_method("detach", (node,))
        alias.meta.update(source="", grad=False, slot=slot)
        return alias


def _owners(names: Iterable[str]) -> set[str]:
    """Every module that one of the named tensors lies in."""
    found: set[str] = set()
    for name in names:
        owner = name.rpartition(".")[0]
        while owner and owner not in found:
            found.add(owner)
            owner = owner.rpartition(".")[0]
    return found


def _possible(node: Node) -> bool:
    """Whether a gradient could flow through ``node``: it depends on a parameter or on an input of floats."""
    if "grad" not in node.meta:
        node.meta["grad"] = any(map(_possible, node.all_input_nodes))
    return bool(node.meta["grad"])
