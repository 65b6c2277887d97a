"""Indices that are the same in every call: lists in the code, buffers that no forward writes to, what is made of them.

Their values are those of the module that is analyzed, so an analysis holds for modules with the same ones.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from chase_fx.graphs.axes import Places
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.provenance import from_data, size_read
from chase_fx.graphs.shadows import given_path
from chase_fx.graphs.tape import Slot, Tape, TapedOp

__all__ = ["Constants", "digest", "index_argument"]

_MAX_SIZE = 1 << 20  # elements; what is larger is a table of positions, not one of channels
_MODULES = ("torch", "_operator", "builtins")  # whose functions are run again


class _UnknownError(Exception):
    """What a node gives may differ from call to call."""


def digest(tensor: torch.Tensor) -> str:
    """A fingerprint of the values of a tensor."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def index_argument(node: Node) -> Any:
    """The only index tensor, or list, of a node that picks or writes along one dim; None for every other call."""
    name = call_name(node)
    if name.rstrip("_") in ("index_select", "index_add", "index_copy", "index_reduce", "index_fill"):
        return node.args[2] if len(node.args) > 2 else node.kwargs.get("index")
    subscripts = name in ("getitem", "setitem", "index", "index_put", "index_put_")
    given: Any = node.args[1] if subscripts and len(node.args) > 1 else ()
    items = given if isinstance(given, tuple) or name.startswith("index") else (given,)
    found = [item for item in items if isinstance(item, list) or (isinstance(item, Node) and "slot" in item.meta)]
    return found[0] if len(found) == 1 else None


class Constants:
    """What the indices of one graph hold.

    Args:
        tensors: parameters and buffers of the module by name, its constants included.
        aliases: second names of tied tensors.
        graph: the graph of the capture.
        tapes: that of the graph first, then those of all others: what any of them writes to is no constant.

    Attributes:
        read: a digest of each tensor that an index was made of.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], graph: Graph, tapes: Sequence[Tape]
    ) -> None:
        self.read: dict[str, str] = {}
        self._tensors, self._aliases, self._graph, self._tapes = tensors, aliases, graph, tapes
        self._found: dict[str, Places | None] = {}

    def index(self, op: TapedOp, is_channels: Callable[[Slot, int], bool]) -> Places | None:
        """The index of a call that picks along one dim, if it is the same in every call; of a mask the places.

        Sizes that it is made of are those of channels. Captures that share a graph share the answer.
        """
        if op.node not in self._found:
            self._found[op.node] = self._index(op.node, is_channels)
        return self._found[op.node]

    def _index(self, name: str, is_channels: Callable[[Slot, int], bool]) -> Places | None:
        node = self._nodes.get(name)
        item = None if node is None else index_argument(node)
        origins: dict[tuple[Slot, int], None] = {}
        try:
            value = np.asarray(item) if isinstance(item, list) else self._value(item, origins).cpu().numpy()
        except (_UnknownError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None
        if value.ndim != 1 or value.dtype.kind not in "biu" or value.dtype == np.uint8:
            return None
        if not all(is_channels(*origin) for origin in origins):
            return None
        return np.flatnonzero(value) if value.dtype.kind == "b" else value.astype(np.int64)

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self._graph.nodes}

    @cached_property
    def _written(self) -> set[int]:
        """The memory that this capture writes to."""
        return {slot.storage for slot in _writes(self._tapes[0])}

    @cached_property
    def _changed(self) -> set[str]:
        """The names of parameters and buffers that some capture writes to."""
        found: set[str] = set()
        for tape in self._tapes:
            storages = {slot.storage for slot in _writes(tape)}
            found.update(slot.name for slot in tape.slots if slot.name is not None and slot.storage in storages)
        return found

    @cached_property
    def _readers(self) -> Counter[str]:
        """How many nodes read each parameter and buffer."""
        pairs = {(slot.name, op.node) for tape in self._tapes[:1] for op in tape.ops for slot in op.inputs()}
        return Counter(name for name, _ in pairs if name is not None)

    def _value(self, node: Any, origins: dict[tuple[Slot, int], None]) -> Any:
        """What a node gives, on the CPU."""
        if not isinstance(node, Node):
            raise _UnknownError
        start, stop = node.meta.get("tape", (0, 0))
        if "slot" not in node.meta and start == stop:
            return _number(node, origins)
        if node.op == "get_attr":
            return self._tensor(given_path(str(node.target)))
        if node.op not in ("call_function", "call_method") or node.meta.get("whole") or self._is_unsteady(node):
            raise _UnknownError
        args: Any = map_arg(node.args, lambda n: self._value(n, origins))
        kwargs: Any = map_arg(node.kwargs, lambda n: self._value(n, origins))
        with torch.no_grad():
            run: Any = node.target
            return getattr(args[0], run)(*args[1:], **kwargs) if isinstance(run, str) else run(*args, **kwargs)

    def _tensor(self, given: str) -> torch.Tensor:
        name = self._aliases.get(given, given)
        tensor = self._tensors[name] if name in self._tensors else self._tensors.get(given)
        if tensor is None or tensor.is_meta or tensor.numel() > _MAX_SIZE or name in self._changed:
            raise _UnknownError
        # Numbers that a layer works with, such as statistics, may be changed where no operator shows it.
        if tensor.is_floating_point() and (isinstance(tensor, torch.nn.Parameter) or self._readers[name] > 1):
            raise _UnknownError
        if given not in self.read:
            self.read[given] = digest(tensor)
        return tensor.detach().cpu()

    def _is_unsteady(self, node: Node) -> bool:
        module = getattr(node.target, "__module__", None) or "torch"
        ops = self._tapes[0].ops[slice(*node.meta.get("tape", (0, 0)))]
        return (
            module.partition(".")[0] not in _MODULES
            or any(slot.storage in self._written for slot in _results(node))
            or any(op.op.namespace != "aten" or torch.Tag.nondeterministic_seeded in op.op.tags for op in ops)
        )


def _results(node: Node) -> list[Slot]:
    """The tensor that a node gives, or those that are taken out of what it gives."""
    own = node.meta.get("slot")
    return [own] if own is not None else [user.meta["slot"] for user in node.users if "slot" in user.meta]


def _writes(tape: Tape) -> list[Slot]:
    return [slot for op in tape.ops for slot in op.writes()]


def _number(node: Node, origins: dict[tuple[Slot, int], None]) -> Any:
    """A device, or a number that only sizes go into; ``origins`` gets the dims that these are of."""
    if node.target is getattr and node.args[1] == "device":
        return torch.device("cpu")
    if "value" not in node.meta or from_data(node) or not _is_arithmetic(node):
        raise _UnknownError
    origins.update(dict.fromkeys(size_read(node).origins))
    return node.meta["value"]


def _is_arithmetic(node: Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 2
    known = node.op == "call_function" and getattr(operator, call_name(node), None) is node.target
    return known and all("slot" not in part.meta and _is_arithmetic(part) for part in node.all_input_nodes)
