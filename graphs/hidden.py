"""Tensors that the forward computed where the torch API does not show it, such as inside ``torch.vmap``.

No torch-level call can be written down for them. But the tape has their ATen calls, so these are written to the graph
instead, as far back as to tensors that it knows.

The numbers in ATen calls are plain. Those that the forward gave in a call of its own stay, as they do everywhere. Those
that torch made of sizes are read from a tensor where it is certain which size they are, such as in views that only
insert dims; where it is not, the graph serves the example's sizes alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.gradients import Gradients
from chase_fx.graphs.guards import check
from chase_fx.graphs.source import source_line
from chase_fx.graphs.tape import Slot, Tape, TapedOp

__all__ = ["NEW", "VMAP_END", "Recovered", "recover", "transformed"]

_aten = torch.ops.aten
NEW = frozenset({getattr(_aten, f"new_{kind}").default for kind in ("empty", "full", "ones", "zeros")})
_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default})
# Calls by which a forward itself asks for a shape, with numbers or with -1.
_RESHAPES = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "resize", "ravel"})
# Arguments that no size is passed by.
_NO_SIZES = frozenset({"dim", "dims", "dim0", "dim1", "eps", "correction", "dtype", "layout", "memory_format"})
_FACTORS = frozenset({"alpha", "beta"})  # which are 1, unless they are given
_PRODUCTS = frozenset({"matmul", "bmm", "linear"})
VMAP_END = "_remove_batch_dim"
_GETS = frozenset({"slice", "select"})


def transformed() -> bool:
    """Whether a call made now is inside ``torch.vmap`` or ``torch.func``, on tensors that stand for other ones."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@dataclass
class Recovered:
    """Nodes by the index of the slot that they compute, in order, and what is known of the sizes in them.

    Attributes:
        nodes: those that were made.
        read: the nodes that they read.
        certain: whether every size in them is either read from a tensor or the forward's own number.
        once: whether a dim of size 1 may be as long as what a vmap ran over.
    """

    nodes: dict[int, Node] = field(default_factory=dict)
    read: list[Node] = field(default_factory=list)
    certain: bool = True
    once: bool = False


def recover(
    tensor: torch.Tensor,
    graph: Graph,
    tape: Tape,
    gradients: Gradients,
    values: tuple[Callable[[torch.Tensor], Node], Callable[[Any], Any]],
    *,
    end: int | None,
) -> Recovered | None:
    """Nodes for the taped calls that belong to none yet and that ``tensor`` depends on; ``None`` if they can't be.

    Calls from ``end`` on are no part of it: they are those of a call that was given the tensor.

    They can't if a call belongs to a node that does not hand its results out (the inside of a module or of an autograd
    function), if what they read was overwritten since, or if a region of autocast began or ended since.
    """
    slot = tape.find(tensor)
    positions = _needed(slot, tape.ops[:end]) if slot is not None else []
    if slot is None or not positions or _overwritten(positions, tape.ops[:end]):
        return None
    if any(tape.region(p) != tape.regions[-1][1] for p in positions):  # here torch casts otherwise
        return None
    node_of, to_fx = values
    found = Recovered()
    nodes = found.nodes
    source = source_line()

    def argument(value: Any) -> Any:
        if isinstance(value, Slot):
            if value.index in nodes:
                return gradients.here(nodes[value.index])
            found.read.append(node_of(tape.tensor_of(value)))
            return found.read[-1]
        if isinstance(value, (tuple, list)):
            return type(value)(argument(v) for v in value)
        return to_fx(value)

    for position in positions:
        op = tape.ops[position]
        with gradients.at(position):
            args = [argument(a) for a in op.args]
            kwargs = {k: argument(v) for k, v in op.kwargs.items()}
        sizes = _sizes(graph, op, args)
        if sizes is None:
            found.certain = found.certain and _has_own_numbers(op)
        else:
            args[1] = sizes
        ends = op.op is _aten.expand.default and op.call == VMAP_END
        found.once = found.once or (ends and 1 in op.args[1])
        node = graph.call_function(op.op, tuple(args), kwargs)
        node.meta.update(source=source, in_place=op.op._schema.is_mutable, tape=(position, position + 1))
        op.node, op.source, op.call, op.operands = node.name, source, str(op.op.overloadpacket.__name__), ()
        returns = op.op._schema.returns
        single = len(returns) == 1 and not isinstance(returns[0].type, torch.ListType)
        for i, out in enumerate(op.outs):
            nodes[out.index] = node if single else graph.call_function(operator.getitem, (node, i))
            nodes[out.index].meta.update(slot=out, source=source)
    return found


def _has_own_numbers(op: TapedOp) -> bool:
    """Whether the numbers in a call, if there are any, are those that the forward gave in a call of its own."""
    given = dict(zip((a.name for a in op.op._schema.arguments), op.args, strict=False)) | op.kwargs
    kept = (v for name, v in given.items() if name not in _NO_SIZES and not (name in _FACTORS and v == 1))
    if not any(map(_has_number, kept)):
        return True
    call, name = op.call.strip("_"), str(op.op.overloadpacket.__name__).strip("_")
    if op.op in _VIEWS | NEW or not call:
        return False
    if op.call.startswith("__"):
        return torch.Tag.pointwise in op.op.tags or name in _GETS
    return call == name


def _has_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sizes(graph: Graph, op: TapedOp, args: list[Any]) -> list[Any] | None:
    """The sizes that a call of torch is to be given; ``None`` where they are not known, or where there are none."""
    if op.op in _VIEWS and op.call not in _RESHAPES:
        return _sizes_of_view(graph, op, args[0])
    if op.op is _aten.expand.default:
        return _sizes_of_expand(op)
    return _sizes_of_new(graph, op, args[0]) if op.op in NEW else None


def _sizes_of_view(graph: Graph, op: TapedOp, x: Node) -> list[Any] | None:
    """Those of a view that only adds or drops dims of size 1: which have that size at every call, then."""
    given, sizes = op.args[0].shape, tuple(op.args[1])
    if given == sizes:
        return [_size(graph, x, d, n) for d, n in enumerate(sizes)]
    left = [d for d, n in enumerate(given) if n != 1]
    if [given[d] for d in left] != [n for n in sizes if n != 1]:
        return None
    for d in set(range(len(given))) - set(left):
        guard = graph.call_function(check, (_size(graph, x, d, 1), "==", 1, True, source_line()))
        guard.meta["source"] = ""
    return [1 if n == 1 else _size(graph, x, left.pop(0), n) for n in sizes]


def _sizes_of_expand(op: TapedOp) -> list[Any] | None:
    """-1 for what stays: in the forward's own calls, where a vmap ends, and of operands of products, which must agree.

    The end of a vmap adds a dim of as many elements as the vmap ran over.
    """
    given, sizes, call = op.args[0].shape, list(op.args[1]), op.call.strip("_")
    lead = len(sizes) - len(given)
    found = [-1 if d >= lead and given[d - lead] == n else n for d, n in enumerate(sizes)]
    if call in _PRODUCTS:
        return found if set(found) == {-1} and 1 not in sizes else None
    return found if call == "expand" or (op.call == VMAP_END and set(found) <= {-1, 1}) else None


def _sizes_of_new(graph: Graph, op: TapedOp, x: Node) -> list[Any] | None:
    """In front, those of the dims of ``x`` that a vmap runs over; behind, those that the forward asks for."""
    given, sizes = op.args[0].shape, list(op.args[1])
    mapped = sizes[: op.mapped]
    if any(given.count(n) != 1 for n in mapped):
        return None
    return [*(_size(graph, x, given.index(n), n) for n in mapped), *sizes[op.mapped :]]


def _size(graph: Graph, x: Node, dim: int, value: int) -> Node:
    node = graph.call_method("size", (x, dim))
    node.meta.update(source="", value=value)
    return node


def _needed(slot: Slot, ops: list[TapedOp]) -> list[int]:
    """Positions, in order, of the calls that ``slot`` depends on and that belong to no node."""
    makers: dict[int, int] = {}
    for position, op in enumerate(ops):
        for out in op.outs:
            makers.setdefault(out.index, position)
    found: set[int] = set()
    storages: set[int] = set()
    stack = [makers[slot.index]] if slot.index in makers else []
    while stack:
        position = stack.pop()
        op = ops[position]
        if position not in found and not op.node:
            found.add(position)
            storages.update(out.storage for out in op.outs)
            stack += [makers[s.index] for s in op.inputs() if s.index in makers]
        if not stack:
            stack = [p for p, w in enumerate(ops) if p not in found and not w.node and _writes(w) in storages]
    return sorted(found)


def _writes(op: TapedOp) -> int | None:
    """The storage that a call writes to, if it does."""
    target = next(op.inputs(), None)
    return target.storage if target is not None and op.op._schema.is_mutable else None


def _overwritten(positions: list[int], ops: list[TapedOp]) -> bool:
    """Whether a node has written since to what one of the calls read."""
    last = {s.storage: p for p in positions for s in ops[p].inputs()}
    return any(op.node and p > last.get(_writes(op) or 0, p) for p, op in enumerate(ops))
