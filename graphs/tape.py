"""The tape: every ATen call of a forward, with the FX node that it belongs to.

Labels are propagated over the tape rather than over the torch-level graph, because a few dozen ATen operators cover
what hundreds of torch functions and modules do.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chase_fx.graphs.pickling import from_plain, to_plain

if TYPE_CHECKING:
    from chase_fx.graphs.standins import StandIns

__all__ = ["SizeRead", "Sizes", "Slot", "Tape", "TapeMode", "TapedOp", "slots_in", "writes_outside", "written_by"]


@dataclass(slots=True, eq=False)
class Slot:
    """One tensor of the forward. ``name`` is set for parameters, buffers and constants of the module."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "value"  # value | parameter | buffer | constant | input
    name: str | None = None
    storage: int = 0
    stride: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"%{self.index}{list(self.shape)}" + (f"={self.name}" if self.name else "")


class SizeRead(NamedTuple):
    """What a number was computed from.

    Attributes:
        origins: the (tensor, dim) pairs.
        factors: those of them that it is a product of, with whole numbers.
    """

    origins: tuple[tuple[Slot, int], ...] = ()
    factors: tuple[tuple[Slot, int], ...] = ()


Sizes = tuple[SizeRead | None, ...]


@dataclass(slots=True, eq=False)
class TapedOp:
    """One ATen call; tensors in ``args`` and ``kwargs`` are replaced by their slots."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Slot, ...]
    node: str = ""
    source: str = ""
    call: str = ""  # the torch-level function or module of the node
    operands: tuple[Slot, ...] = ()  # the tensors that the node was called with
    whole: str = ""  # why its channels stay: the reason, if there is one
    own_sizes: bool = False  # inside an autograd function, which computes its sizes itself
    sizes: Sizes = ()  # of a view or copies: what each size was computed from; None for -1
    mapped: int = 0  # of a factory inside a vmap: how many of its sizes, in front, are those that the vmap runs over
    read: tuple[Slot, ...] | None = None  # every tensor argument in order, once known

    def __getstate__(self) -> dict[str, Any]:
        """An operator does not pickle, its name does."""
        return {f.name: to_plain(getattr(self, f.name)) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, from_plain(value))

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Argument ``index`` of the schema, whichever way it was passed."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def inputs(self) -> Iterator[Slot]:
        """Every tensor argument in order."""
        if self.read is None:
            self.read = tuple(slots_in((self.args, self.kwargs)))
        return iter(self.read)

    def writes(self) -> Iterator[Slot]:
        """Every tensor that the call writes to."""
        for position, name in written_by(self.op):
            yield from slots_in(self.arg(position, name))


# In train mode they write to two arguments behind the weights, which their schemas don't say.
_STATISTICS = frozenset(
    {
        torch.ops.aten.native_batch_norm.default,
        torch.ops.aten.cudnn_batch_norm.default,
        torch.ops.aten.miopen_batch_norm.default,
    }
)


@functools.cache
def written_by(func: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operator writes to."""
    given = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in given if a.alias_info is not None and a.alias_info.is_write)


def writes_outside(ops: Sequence[TapedOp]) -> list[Slot]:
    """What the calls write to of memory that none of them made."""
    if not any(written_by(op.op) or op.op in _STATISTICS for op in ops):
        return []
    found: list[Slot] = []
    made: set[int] = set()
    for op in ops:
        found += (slot for slot in op.writes() if slot.storage not in made)
        if op.op in _STATISTICS and op.args[5]:
            found += slots_in(op.args[3:5])
        made.update({slot.storage for slot in op.outs} - {slot.storage for slot in op.inputs()})
    return found


def slots_in(value: Any) -> Iterator[Slot]:
    """Every slot inside nested tuples, lists and dicts."""
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from slots_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from slots_in(item)


# The in-place operators that change the shape of a tensor object; what they return is another axis layout.
_RESHAPING = frozenset(
    {
        "unsqueeze_",
        "squeeze_",
        "transpose_",
        "t_",
        "swapaxes_",
        "swapdims_",
        "resize_",
        "resize_as_",
        "set_",
        "as_strided_",
    }
)


@dataclass
class Tape:
    """Calls in order, and the slot of every tensor seen. Tensors are held so that their identities stay unique.

    Attributes:
        given: the memory of what the forward did not make: inputs, parameters, buffers, constants.
    """

    ops: list[TapedOp] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    regions: list[tuple[int, Any]] = field(default_factory=lambda: [(0, ())])  # of autocast: from which call on
    _by_id: dict[int, Slot] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)
    _replaced: list[torch.Tensor] = field(default_factory=list)

    def slot_of(self, tensor: torch.Tensor) -> Slot:
        """The slot of ``tensor``; a new one when it was never seen."""
        slot = self._by_id.get(id(tensor))
        return self.add(tensor) if slot is None else slot

    def find(self, tensor: torch.Tensor) -> Slot | None:
        """The slot of ``tensor``, if it was seen."""
        return self._by_id.get(id(tensor))

    def tensor_of(self, slot: Slot) -> torch.Tensor:
        """The tensor of ``slot``, while the capture runs."""
        return self._alive[slot.index]

    def operand(self, tensor: torch.Tensor) -> Slot:
        """The slot of what goes into a call; one that was never seen may be a twin of what was."""
        twin = None if id(tensor) in self._by_id else self.twin(tensor)
        if twin is not None:
            self.replace(tensor, twin)
        return self.slot_of(tensor)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """An earlier one in the same memory, laid out alike, of which ``nn.Parameter`` and such made another object."""
        storage, own = _storage(tensor), self.find(tensor)
        if own is not None and self.tensor_of(own) is not tensor:
            return self.tensor_of(own)
        if own is not None and any(own in op.outs for op in self.ops):  # a call made it, which the graph can have
            return None
        for slot in reversed(self.slots if own is None else self.slots[: own.index]):
            other = self._alive[slot.index]
            if slot.storage == storage and _layout(other) == _layout(tensor):
                return other
        return None

    def add(self, tensor: torch.Tensor, kind: str = "value", name: str | None = None) -> Slot:
        """Give ``tensor`` a new slot."""
        stride = tensor.stride() if tensor.layout is torch.strided else None
        slot = Slot(len(self.slots), tuple(map(int, tensor.shape)), tensor.dtype, kind, name, _storage(tensor), stride)
        self.slots.append(slot)
        if kind != "value":
            self.given.add(slot.storage)
        self._by_id[id(tensor)] = slot
        self._alive.append(tensor)
        return slot

    def replace(self, tensor: torch.Tensor, new: torch.Tensor) -> None:
        """The object ``tensor`` is what ``new`` is from here on."""
        self._by_id[id(tensor)] = self.slot_of(new)
        self._replaced.append(tensor)

    def region(self, position: int) -> Any:
        """The settings of every region of autocast around the call at ``position``."""
        return self.regions[bisect_right(self.regions, position, key=lambda region: region[0]) - 1][1]

    def release(self) -> None:
        """Let go of the tensors once the capture is over; only shapes are needed from then on."""
        self._by_id.clear()
        self._alive.clear()
        self._replaced.clear()


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunction():  # the forward does not look at it
        strided = tensor.layout is torch.strided
        return tensor.dtype, tensor.shape, *((tensor.stride(), tensor.storage_offset()) if strided else ())


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and functional tensors have no storage
        return id(tensor)


class TapeMode(TorchDispatchMode):
    """Writes each ATen call to a tape; where there are stand-ins, they decide what is computed."""

    def __init__(self, tape: Tape, standins: StandIns | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.tape = tape
        self.standins = standins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor asked for its device
            return func(*args, **kwargs)
        tape = self.tape
        read: list[Slot] = []

        def operand(tensor: torch.Tensor) -> Slot:
            read.append(slot := tape.operand(tensor))
            return slot

        op = TapedOp(func, _replace(args, operand), _replace(kwargs, operand) if kwargs else {}, ())
        op.read = tuple(read)
        dependence: tuple[set[int], ...] = ()
        try:
            # Where C code calls an operator (at the end of a vmap) modes of the torch API are on, and would see this.
            with torch._C.DisableTorchFunction():
                if self.standins is None:
                    out = func(*args, **kwargs)
                else:
                    out, dependence = self.standins.run(op, args, kwargs)
        except ZeroDivisionError:
            # torch's fake batch norm divides by n - 1 for the running variance, also where n is 1.
            if func is not torch.ops.aten.native_batch_norm.default:
                raise
            x = args[0]
            out = (torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1]))
        if isinstance(out, torch.Tensor):
            op.outs = ((tape.add if _reshapes(func) else tape.slot_of)(out),)
        else:
            op.outs = tuple(_slots_of_output(out, tape))
        if self.standins is not None:
            self.standins.follow(op.outs, dependence)
        tape.ops.append(op)
        return out


@functools.cache
def _reshapes(func: Any) -> bool:
    return func._schema.name.rpartition("::")[2] in _RESHAPING


def _replace(value: Any, slot_of: Callable[[torch.Tensor], Slot]) -> Any:
    if isinstance(value, torch.Tensor):
        return slot_of(value)
    if isinstance(value, (tuple, list)):
        made = list if type(value) is list else tuple
        return made([_replace(v, slot_of) for v in value])
    if isinstance(value, dict):
        return {k: _replace(v, slot_of) for k, v in value.items()}
    return int(value) if isinstance(value, int) and type(value) is not int and type(value) is not bool else value


def _slots_of_output(out: Any, tape: Tape) -> Iterator[Slot]:
    if isinstance(out, torch.Tensor):
        yield tape.slot_of(out)
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from _slots_of_output(item, tape)
