"""Buffers that a forward replaces (``self.state = new``): the graph writes the new values to the buffer that there is.

What the forward still reads of the old tensor, and what it goes on writing to the new one, are two tensors in the model
and one in the graph. Where that shows, the graph writes at its end instead.

``weight.data = new`` gives a tensor other memory. The graph writes to the memory that there is, if nobody can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.tape import Slot, Tape, writes_outside
from chase_fx.graphs.walk import Modules, parameters_in

__all__ = ["Assigned", "NewData", "check_data", "check_parameters", "replaced_buffers", "settle"]


@dataclass(frozen=True)
class Assigned:
    """A buffer that was replaced.

    Attributes:
        path: its name.
        buffer: the tensor that the module had.
        value: what it has instead.
        source: the node that gives the values to write.
        copy: the node that writes them.
    """

    path: str
    buffer: Slot
    value: Slot
    source: Node
    copy: Node


def settle(graph: Graph, tape: Tape, assigned: Sequence[Assigned], end: Node) -> None:
    """Move the writes behind ``end``, the last node before those of the result, if any of them shows before."""
    nodes = list(graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    copies = {each.copy for each in assigned}
    if not any(_shows(each, nodes[places[each.copy] + 1 :], copies, tape) for each in assigned):
        return
    last = {each.path: each for each in assigned}
    for each in assigned:
        if last[each.path] is not each:
            graph.erase_node(each.copy)
            graph.erase_node(each.source)
    memory = {each.buffer.storage for each in last.values()}
    for node in nodes[places[end] + 1 :]:  # the result has the old tensor
        for given in node.all_input_nodes:
            if _storage(given) in memory:
                end = _clone(graph, given, end)
                node.replace_input_with(given, end)
    for each in last.values():
        end.append(each.source)
        end = _clone(graph, each.source, each.source)
        each.copy.replace_input_with(each.source, end)
    for each in last.values():  # all are read before any is written, as where two are exchanged
        end.append(each.copy)
        end = each.copy


def _shows(each: Assigned, later: Sequence[Node], copies: set[Node], tape: Tape) -> bool:
    """Whether nodes after the write read or write the old tensor, or write to the new one."""
    for node in later:
        if node in copies:
            continue
        if any(_storage(given) == each.buffer.storage for given in node.all_input_nodes):
            return True
        ops = tape.ops[slice(*node.meta.get("tape", (0, 0)))]
        if any(slot.storage == each.value.storage for op in ops for slot in op.writes()):
            return True
    return False


def _storage(node: Node) -> int | None:
    slot = node.meta.get("slot")
    return slot.storage if isinstance(slot, Slot) else None


def _clone(graph: Graph, node: Node, after: Node) -> Node:
    with graph.inserting_after(after):
        clone = graph.call_method("clone", (node,))
    clone.meta.update(source="", slot=node.meta.get("slot"), tape=(0, 0))  # a step of its own, with no calls to label
    return clone


def replaced_buffers(
    module: nn.Module, owner: str, buffers: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Name, path and tensor of whatever ``module`` has in place of one of these buffers.

    Raises:
        CaptureError: there is no tensor in its place.
    """
    for name, now in list(module._buffers.items()):
        path = f"{owner}.{name}" if owner else name
        if path in buffers and now is None:
            raise CaptureError(
                f"the forward puts None in place of the buffer '{path}', which a second call would find; a graph "
                "keeps the buffer"
            )
        if now is not None and path in buffers and now is not buffers[path]:
            yield name, path, now


def check_parameters(modules: Modules, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse a forward that puts a new tensor in place of a parameter; one that ties it to another parameter may.

    Raises:
        CaptureError: it does.
    """
    known = {id(parameter) for parameter in parameters.values()}
    for path, parameter in parameters_in(modules).items():
        if path in parameters and id(parameter) not in known:
            raise CaptureError(
                f"the forward replaces the parameter '{path}' by another tensor, which an optimizer would not know and "
                "a graph does not do; write to it instead"
            )


@dataclass(frozen=True)
class NewData:
    """A tensor that was given the memory of another one.

    Attributes:
        owner: the tensor.
        value: what has the new memory.
        calls: where on the tape the graph's writes are.
        known: how many tensors there were then.
        source: the line.
    """

    owner: Slot
    value: Slot
    calls: range
    known: int
    source: str


def check_data(graph: Graph, tape: Tape, assigned: Sequence[NewData]) -> None:
    """Refuse a forward that could tell new memory from new values in the old one.

    Raises:
        CaptureError: it does.
    """
    own = {place for each in assigned for place in each.calls}
    (result,) = graph.find_nodes(op="output")
    for each in assigned:
        kept = [node.meta["slot"] for node in result.all_input_nodes if _storage(node) == each.owner.storage]
        if any(_is_old(slot, each) for slot in kept) or _tells(each, tape, own):
            raise CaptureError(
                f"the forward assigns to a tensor's property 'data' at {each.source}, and uses or writes to the old or"
                " the new memory besides; write to the tensor instead (copy_)"
            )


def _is_old(slot: Slot, each: NewData) -> bool:
    return slot.storage == each.owner.storage and slot.index < each.known and slot is not each.owner


def _tells(each: NewData, tape: Tape, own: set[int]) -> bool:
    memory = {each.owner.storage, each.value.storage}
    attached: set[int] = (
        set()
    )  # views that a backward pass may look at again; of the tensor itself it sees the new data
    for place, op in enumerate(tape.ops):
        if place in own:
            continue
        if place < each.calls.start:
            if op.op.is_view:
                if op.op is not torch.ops.aten.detach.default:
                    seen = any(slot is each.owner or slot.index in attached for slot in op.inputs())
                    attached.update(slot.index for slot in op.outs if seen)
            elif any(slot.index in attached for slot in op.inputs()):
                return True
        elif any(slot.storage in memory for slot in writes_outside([op])) or any(_is_old(s, each) for s in op.inputs()):
            return True
    return False
