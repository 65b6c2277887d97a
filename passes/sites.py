"""One call of a graph that is cut: its arguments, and what is known of the dims of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import Graph, Node

from chase_fx.errors import RewriteError
from chase_fx.graphs.axes import Axis, BoolArray
from chase_fx.graphs.rules.base import Facts, Labels
from chase_fx.passes.counts import Counts
from chase_fx.passes.quantities import Size

__all__ = ["CallSite", "Handler", "KeptBuffers", "Places"]

# What is right of each live factor of a dim, by the dim's axis: a view that made the dim can tell, others can't.
Places = dict[int, tuple[Axis, tuple[Size, ...]]]


class KeptBuffers(Protocol):
    """Makes buffers of what a plan keeps, and names them."""

    def __call__(self, axis: Axis) -> str:
        """Of the kept indices of an axis."""

    def places(self, axis: Axis) -> str:
        """Of the place of each dense index of an axis."""

    def mask(self, axis: Axis) -> BoolArray:
        """Which indices of an axis stay."""


@dataclass
class CallSite:
    """One node under rewrite, with the labels of tensors and what the rules noted about it.

    Attributes:
        buffer: makes buffers of the kept indices of an axis.
        places: of live factors in dims that earlier views made.
    """

    graph: Graph
    node: Node
    counts: Counts
    labels: Callable[[Node], Labels | None]
    facts: Sequence[Facts]
    buffer: KeptBuffers
    places: Places

    def label(self, value: Any) -> Labels:
        """The labels of a tensor argument."""
        found = self.labels(value) if isinstance(value, Node) else None
        if found is None:
            raise RewriteError(f"{self.where()}: no labels for argument {value}")
        return found

    @property
    def out(self) -> Labels:
        """The labels of the node's own value."""
        return self.label(self.node)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """A positional-or-keyword argument."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def set(self, index: int, name: str, value: Any) -> None:
        """Replace an argument in the form it was given."""
        if index < len(self.node.args):
            self.node.update_arg(index, value)
        else:
            self.node.update_kwarg(name, value)

    def shrink(self, value: Any, axis: Axis) -> Any:
        """A dense size as a kept one."""
        with self.graph.inserting_before(self.node):
            return self.counts.shrink(self.graph, value, axis)

    def note(self, name: str) -> Axis | None:
        """An axis that a rule noted for this node."""
        for fact in self.facts:
            if name in fact.notes:
                return fact.notes[name]
        return None

    def where(self) -> str:
        """For messages: the node and its source line."""
        return f"node '{self.node.name}' ({self.node.meta.get('source') or 'unknown line'})"


Handler = Callable[[CallSite], None]
