"""Tensors that the forward computed where the torch API does not show it, such as inside ``torch.vmap``.

No torch-level call can be written down for them. But the tape has their ATen calls, so these are written to the graph
instead, as far back as to tensors that it knows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.source import source_line
from chase_fx.graphs.tape import Slot, Tape, TapedOp

__all__ = ["recover", "transformed"]

NodeOf = Callable[[torch.Tensor], Node]


def transformed() -> bool:
    """Whether a call made now is inside ``torch.vmap`` or ``torch.func``, on tensors that stand for other ones."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def recover(
    tensor: torch.Tensor, graph: Graph, tape: Tape, node_of: NodeOf, to_fx: Callable[[Any], Any]
) -> Node | None:
    """The node that computes ``tensor`` by the taped calls that belong to no node yet; ``None`` where they can't.

    They can't if a call belongs to a node that does not hand its results out (the inside of a module or of an autograd
    function), if what they read was overwritten since, or if a region of autocast began or ended since.
    """
    slot = tape.find(tensor)
    positions = _needed(slot, tape) if slot is not None else []
    if slot is None or not positions or _overwritten(positions, tape):
        return None
    if any(tape.region(p) != tape.regions[-1][1] for p in positions):  # here torch casts otherwise
        return None
    nodes: dict[int, Node] = {}
    source = source_line()

    def argument(value: Any) -> Any:
        if isinstance(value, Slot):
            return nodes[value.index] if value.index in nodes else node_of(tape.tensor_of(value))
        if isinstance(value, (tuple, list)):
            return type(value)(argument(v) for v in value)
        return to_fx(value)

    for position in positions:
        op = tape.ops[position]
        args = [argument(a) for a in op.args]
        if op.op in _SIZED:
            args[1] = _live_sizes(graph, op, args[0])
        node = graph.call_function(op.op, tuple(args), {k: argument(v) for k, v in op.kwargs.items()})
        node.meta.update(source=source, in_place=op.op._schema.is_mutable, tape=(position, position + 1))
        op.node, op.source, op.call, op.operands = node.name, source, str(op.op.overloadpacket.__name__), ()
        single = len(op.op._schema.returns) == 1 and len(op.outs) == 1
        for i, out in enumerate(op.outs):
            nodes[out.index] = node if single else graph.call_function(operator.getitem, (node, i))
            nodes[out.index].meta.update(slot=out, source=source)
    return nodes[slot.index]


_SIZED = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.expand.default})


def _live_sizes(graph: Graph, op: TapedOp, x: Node) -> list[Any]:
    """The sizes of a view that only adds or drops dims of size 1, read from ``x``; -1 where an expand changes none."""
    given, sizes = op.args[0].shape, [int(n) for n in op.args[1]]
    if op.op is torch.ops.aten.expand.default:
        lead = len(sizes) - len(given)
        return [-1 if d >= lead and given[d - lead] == n else n for d, n in enumerate(sizes)]
    dims = [d for d, n in enumerate(given) if n != 1]
    if [given[d] for d in dims] != [n for n in sizes if n != 1]:
        return sizes
    left = iter(dims)
    return [1 if n == 1 else _size(graph, x, next(left), n) for n in sizes]


def _size(graph: Graph, x: Node, dim: int, value: int) -> Node:
    node = graph.call_method("size", (x, dim))
    node.meta.update(source="", value=value)
    return node


def _needed(slot: Slot, tape: Tape) -> list[int]:
    """Positions, in order, of the calls that ``slot`` depends on and that belong to no node."""
    makers: dict[int, int] = {}
    for position, op in enumerate(tape.ops):
        for out in op.outs:
            makers.setdefault(out.index, position)
    found: set[int] = set()
    storages: set[int] = set()
    stack = [makers[slot.index]] if slot.index in makers else []
    while stack:
        position = stack.pop()
        op = tape.ops[position]
        if position in found or op.node:
            continue
        found.add(position)
        storages.update(out.storage for out in op.outs)
        stack += [makers[s.index] for s in op.inputs() if s.index in makers]
        if not stack:
            stack = [p for p, w in enumerate(tape.ops) if p not in found and not w.node and _writes(w) in storages]
    return sorted(found)


def _writes(op: TapedOp) -> int | None:
    """The storage that a call writes to, if it does."""
    target = next(op.inputs(), None)
    return target.storage if target is not None and op.op._schema.is_mutable else None


def _overwritten(positions: list[int], tape: Tape) -> bool:
    """Whether a node has written since to what one of the calls read."""
    last = {s.storage: p for p in positions for s in tape.ops[p].inputs()}
    return any(op.node and p > last.get(_writes(op) or 0, p) for p, op in enumerate(tape.ops))
