"""What a node calls."""

from __future__ import annotations

import torch
from torch.fx import Node

__all__ = ["DATA_SIZED", "call_name", "is_in_place"]

# Calls whose result has as many elements as the data says.
DATA_SIZED = frozenset({"nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "where"})


def call_name(node: Node) -> str:
    """The function or method without module and overload: ``view`` for ``x.view(...)`` and ``aten.view.default``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_in_place(name: str) -> bool:
    """Whether a method of that name writes to its tensor."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_")
