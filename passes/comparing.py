"""The slim graph, run and compared with the reference node by node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.traced import TracedModule
from chase_fx.passes.differences import largest, relative_difference
from chase_fx.passes.following import Following
from chase_fx.passes.reference import initialised

__all__ = ["Comparing"]

# A node inside the graph that differs by more than this computes something else; smaller differences are left to the
# outputs, for a node can amplify rounding where its values cancel.
_GROSS = 1e-3


class Comparing(Following):
    """Compares the value of every node as soon as it is there, and lets go of both.

    Outputs alone would not show everything: where most channels are gone, the last bias can be nearly all of them.

    Args:
        wanted: the reference's values, by the names of nodes; those that are compared are taken out.
        stepwise: go on with the reference's value after each node, so that the rounding of one is not in the next.

    Attributes:
        gross: the first node that differs by more than rounding does, and by how much, relative to it and its operands.
        single: whether a value was in single precision.
    """

    def __init__(
        self,
        module: TracedModule,
        wanted: dict[str, torch.Tensor],
        forced: Mapping[str, bool],
        *,
        stepwise: bool = False,
    ) -> None:
        super().__init__(module, module.graph, forced)
        self._stepwise = stepwise
        self._owned = {_memory(t) for t in (*module.parameters(), *module.buffers())}
        self.gross: tuple[Node, float] | None = None
        self.single = False
        self._wanted = wanted
        self._matters = _value_nodes(module.graph)
        self._differences: list[tuple[Node, float]] = []
        self._largest: dict[Node, float] = {}  # absolute value of a node
        self._reach: dict[Node, float] = {}  # the same among it and all that it is computed from

    def run_node(self, n: Node) -> Any:
        """One node, if the way that it lies on was taken."""
        out = super().run_node(n)
        self._reach[n] = max((self._reach[n] for n in n.all_input_nodes), default=0.0)
        if n in self._largest:
            self._reach[n] = max(self._reach[n], self._largest[n])
            want = self._wanted.pop(n.name, None)
            if want is not None and want.is_floating_point():
                self._compare(n, want, out.detach())
                if self._stepwise and _memory(out) not in self._owned:
                    out = _corrected(out, want)
        return out

    def compute(self, node: Node) -> Any:
        """One node, of memory that the forward has not written yet a fixed number."""
        out = initialised(node, super().compute(node))
        if isinstance(out, torch.Tensor) and out.layout is torch.strided:
            self._largest[node] = largest(out.detach())
            self.single |= out.dtype is torch.float32
        return out

    @property
    def worst(self) -> float:
        """The largest difference of a node."""
        return max((difference for _, difference in self._differences), default=0.0)

    def first_beyond(self, tolerance: float) -> Node:
        """The first node that differs by more; the last one if only the result does."""
        found = (node for node, difference in self._differences if difference > tolerance)
        return next(found, self.graph.output_node())

    def _compare(self, node: Node, want: torch.Tensor, have: torch.Tensor) -> None:
        difference = relative_difference(want, have)
        self._differences.append((node, difference))
        if difference <= _GROSS or self.gross is not None or node not in self._matters:
            return
        # Where values cancel, what is left is rounding of what they were computed from.
        rounding = 1e4 * torch.finfo(want.dtype).eps * self._reach[node]
        near = max((self._largest.get(operand, 0.0) for operand in node.all_input_nodes), default=0.0)
        difference = relative_difference(want, have, max(near, rounding / _GROSS))
        if difference > _GROSS:
            self.gross = node, difference


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _corrected(out: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """``out`` with the values of ``want``, in its own memory, which others may share or write to."""
    if torch.equal(out, want) or out.shape != want.shape:
        return out
    if any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride(), strict=True)):  # one place for several
        return want.clone()
    with torch.no_grad():
        return out.copy_(want)


def _value_nodes(graph: Graph) -> set[Node]:
    """The nodes whose values the results depend on; a tensor that is only measured is not among them."""
    found: set[Node] = set()
    stack = [n for n in graph.nodes if n.op == "output" or any(map(n.meta.get, ("in_place", "writes")))]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node.target not in ("size", "numel"):
            stack.extend(node.all_input_nodes)
    return found
