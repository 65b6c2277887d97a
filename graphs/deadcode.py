"""Removal of nodes whose value nobody reads and that change nothing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import Graph, Node

from chase_fx.graphs.autocast import AUTOCAST, remove_empty_regions
from chase_fx.graphs.branches import BRANCHES
from chase_fx.graphs.changed import PUTS
from chase_fx.graphs.draws import DRAWS
from chase_fx.graphs.enabled import ENABLED, remove_idle_regions
from chase_fx.graphs.guards import GUARDS
from chase_fx.graphs.shadows import given_path
from chase_fx.graphs.tape import Slot

__all__ = ["has_effect", "remove_dead_nodes"]


def has_effect(node: Node, root: nn.Module) -> bool:
    """Whether running ``node`` matters even if its value is not used.

    It does if it writes in place or to an input, updates statistics, guards, or draws random numbers, which the next
    draw depends on.
    """
    if node.op in ("placeholder", "output") or any(map(node.meta.get, ("in_place", "whole", "draws"))):
        return True
    if node.op == "call_module":
        module = root.get_submodule(given_path(str(node.target)))
        return any(True for _ in module.buffers())
    return any(node.target in kind for kind in (GUARDS, PUTS, DRAWS, BRANCHES, AUTOCAST, ENABLED))


def remove_dead_nodes(graph: Graph, root: nn.Module) -> list[Node]:
    """Erase every node without users and without effect, last first, so that whole chains go; the erased ones.

    A call that happens to write (a function that was told ``inplace=True``, an autograd function) has an effect if the
    memory is read later, or outlives the forward.
    """
    erased = []
    read: set[int] = set()
    for node in reversed(list(graph.nodes)):
        writes = node.meta.get("writes")
        shown = writes == "state" or (writes and any(slot.storage in read for slot in _operands(node)))
        if node.users or shown or has_effect(node, root):
            read.update(slot.storage for slot in _operands(node))
        else:
            graph.erase_node(node)
            erased.append(node)
    remove_empty_regions(graph)
    remove_idle_regions(graph)
    return erased


def _operands(node: Node) -> Iterator[Slot]:
    return (given.meta["slot"] for given in node.all_input_nodes if isinstance(given.meta.get("slot"), Slot))
