"""What a number was computed from: dims of tensors, or data."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.calls import call_name
from chase_fx.graphs.guards import check, check_number
from chase_fx.graphs.tape import SizeRead, Sizes, Tape, TapedOp

__all__ = ["from_data", "size_read", "tell_data_from_sizes", "view_sizes"]

_VIEWS = frozenset({"view", "reshape", "view_copy", "_unsafe_view"})
_COPIES = frozenset({"expand", "broadcast_to", "repeat", "tile"})


def view_sizes(node: Node) -> Sizes:
    """For each dim of a view what its size was computed from, or None where it is inferred. So for counts of copies."""
    if call_name(node) not in _VIEWS | _COPIES:
        return ()
    given: Any = node.args[1:] or node.kwargs.get("shape", node.kwargs.get("size", ()))
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return tuple(None if isinstance(size, int) and size < 0 else size_read(size) for size in given)


def size_read(size: Any) -> SizeRead:
    """What a number was computed from."""
    if not isinstance(size, Node):
        return SizeRead()
    found: SizeRead | None = size.meta.get("origins")
    if found is None:
        read = size.op == "call_method" and size.target == "size" and len(size.args) == 2
        slot = size.args[0].meta.get("slot") if read and isinstance(size.args[0], Node) else None
        if slot is not None and isinstance(size.args[1], int):
            pair = (slot, size.args[1])
            found = SizeRead((pair,), (pair,))
        else:
            origins = dict.fromkeys(pair for part in size.all_input_nodes for pair in size_read(part).origins)
            product = size.target is operator.mul and all(map(_is_whole, size.args))
            factors = [pair for part in size.args if product for pair in size_read(part).factors]
            found = SizeRead(tuple(origins), tuple(factors))
        size.meta["origins"] = found
    return found


def _is_whole(number: Any) -> bool:
    """Whether a factor of a size is a whole number: half of one would cut what the others are the size of."""
    return isinstance(number.meta.get("value") if isinstance(number, Node) else number, int)


def from_data(number: Any) -> bool:
    """Whether a number was computed from the data of a tensor."""
    if not isinstance(number, Node) or "slot" in number.meta:
        return False
    if call_name(number) in ("item", "tolist"):
        return True
    return any(map(from_data, number.all_input_nodes))


def tell_data_from_sizes(graph: Graph, tape: Tape) -> None:
    """Guards of sizes that the data decide, such as how many places of a mask are set, are guards of data."""
    if not any(node.target is check for node in graph.nodes):
        return
    found: set[Node] = set()
    for node in graph.nodes:
        if node.target is check and not found.isdisjoint(node.all_input_nodes):
            node.target = check_number
        elif _sized_by_data(node, tape.ops[slice(*node.meta.get("tape", (0, 0)))], found):
            found.add(node)


def _sized_by_data(node: Node, ops: Sequence[TapedOp], known: set[Node]) -> bool:
    """Whether the data decide the sizes of a tensor, or a number; ``known`` are the nodes of which that is known."""
    if node.meta.get("whole") or call_name(node) in ("item", "tolist") or any(map(_has_any_number, ops)):
        return True
    elementwise = bool(ops) and all(torch.Tag.pointwise in op.op.tags for op in ops)
    return any(part in known and ("slot" in part.meta or not elementwise) for part in node.all_input_nodes)


def _has_any_number(op: TapedOp) -> bool:
    """Whether the data decide how many elements a call gives."""
    if torch.Tag.dynamic_output_shape not in op.op.tags:
        return False
    if op.op.overloadpacket not in (torch.ops.aten.index, torch.ops.aten._unsafe_index):
        return True
    return any(slot.dtype in (torch.bool, torch.uint8) for slot in list(op.inputs())[1:])
