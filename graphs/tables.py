"""Tables that a forward makes of the sizes of its inputs, and keeps in a buffer until other sizes come.

``if self.table.shape[1] != n: self.table = make(n)`` replaces a buffer by one of another shape. The graph makes the
table again in every call. What it is made from stays whole, and the table is cut as the buffer would be.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from chase_fx.graphs.calls import call_name
from chase_fx.graphs.provenance import from_data
from chase_fx.graphs.tape import Tape

__all__ = ["TABLE", "table_of_sizes", "told_by_sizes"]

TABLE = "table_of_sizes"
# Calls that read nothing of a tensor but its shape, dtype and device, by that tensor's position.
_SHAPED_LIKE = ("new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like")
_UNREAD = {**dict.fromkeys(_SHAPED_LIKE, 0), "to": 1, "type_as": 1}


def table_of_sizes(made: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - tells the channels
    """What a forward puts in place of ``buffer``."""
    return made


def told_by_sizes(node: Node, tape: Tape) -> bool:
    """Whether the sizes of the inputs alone decide a tensor: every call with such sizes makes the same one."""
    writers = [other for other in node.graph.nodes if any(map(other.meta.get, ("in_place", "writes")))]
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        slot = node.meta.get("slot")
        if slot is None and node not in writers:  # a number: a size, or a dtype
            if from_data(node):
                return False
            continue
        if node.op == "placeholder" or (node.op == "get_attr" and node.meta["slot"].kind != "constant"):
            return False
        ops = tape.ops[slice(*node.meta.get("tape", (0, 0)))]
        if node.meta.get("whole") or any(torch.Tag.nondeterministic_seeded in op.op.tags for op in ops):
            return False
        unread = node.args[_UNREAD[name] :][:1] if (name := call_name(node)) in _UNREAD else ()
        parts = [part for part in node.all_input_nodes if part not in unread]
        if slot is not None:  # what writes to the same memory, maybe through another view
            parts += [writer for writer in writers if _written_by(writer) == slot.storage]
        todo += (part for part in parts if part not in seen)
        seen.update(parts)
    return True


def _written_by(node: Node) -> int | None:
    """The memory that a call in place writes to."""
    written = node.kwargs.get("out") or (node.args[0] if node.args else None)
    slot = written.meta.get("slot") if isinstance(written, Node) else None
    return slot.storage if slot is not None else None
