"""What a number was computed from: dims of tensors, or data."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from chase_fx.graphs.calls import call_name
from chase_fx.graphs.tape import Sizes, Slot

__all__ = ["from_data", "view_sizes"]

_VIEWS = frozenset({"view", "reshape", "view_copy", "_unsafe_view"})


def view_sizes(node: Node) -> Sizes:
    """For each dim of a view: the (tensor, dim) pairs that its size was computed from, or None where it is inferred."""
    if call_name(node) not in _VIEWS:
        return ()
    given: Any = node.args[1:] or node.kwargs.get("shape", node.kwargs.get("size", ()))
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return tuple(None if isinstance(size, int) and size < 0 else _origins(size) for size in given)


def _origins(size: Any) -> tuple[tuple[Slot, int], ...]:
    if not isinstance(size, Node):
        return ()
    found: tuple[tuple[Slot, int], ...] | None = size.meta.get("origins")
    if found is None:
        read = size.op == "call_method" and size.target == "size" and len(size.args) == 2
        slot = size.args[0].meta.get("slot") if read and isinstance(size.args[0], Node) else None
        if slot is not None and isinstance(size.args[1], int):
            found = ((slot, size.args[1]),)
        else:
            found = tuple(dict.fromkeys(pair for part in size.all_input_nodes for pair in _origins(part)))
        size.meta["origins"] = found
    return found


def from_data(number: Any) -> bool:
    """Whether a number was computed from the data of a tensor."""
    if not isinstance(number, Node) or "slot" in number.meta:
        return False
    if call_name(number) in ("item", "tolist"):
        return True
    return any(map(from_data, number.all_input_nodes))
