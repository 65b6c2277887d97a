"""Regions of a forward that compute gradients whatever its caller does (``with torch.enable_grad()``).

Energies whose derivative is a force need one where the model is evaluated without gradients. Its ends are nodes of
their own. A capture runs with gradients enabled, so where nothing is differentiated inside, a region has no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import has_side_effect

__all__ = ["ENABLED", "enables", "enter_enabled", "exit_enabled", "remove_idle_regions"]


def enter_enabled() -> bool:
    """Begin a region; gives whether gradients were enabled before."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
    return before


def exit_enabled(before: bool) -> None:
    """End a region."""
    torch._C._set_grad_enabled(before)


# Kept although nobody reads their value, and in their places.
ENABLED: frozenset[Any] = frozenset({has_side_effect(enter_enabled), has_side_effect(exit_enabled)})


def enables(graph: Graph) -> bool:
    """Whether the graph has regions."""
    return any(node.target is enter_enabled for node in graph.nodes)


def remove_idle_regions(graph: Graph) -> None:
    """Erase the regions in which nothing is differentiated."""
    opened: list[Node] = []
    busy: set[Node] = set()
    for node in list(graph.nodes):
        if node.target is enter_enabled:
            opened.append(node)
        elif node.target is torch.autograd.grad:
            busy.update(opened)
        elif node.target is exit_enabled and node.args[0] in opened:
            enter = node.args[0]
            opened.remove(enter)
            if enter not in busy:
                graph.erase_node(node)
                graph.erase_node(enter)
