"""What a forward reads of its tensors' data: numbers, and decisions.

A number stays live where it is an argument: the graph reads it again. What Python decides by data holds for the example
alone, so the graph has a guard there: where the data would decide otherwise, it refuses to run. A guard of a truth
value is remembered as a decision, for the other way may be captured too (see :mod:`.alternatives`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from chase_fx.errors import CaptureError
from chase_fx.graphs.guards import agree, check, check_data
from chase_fx.graphs.live import LiveFloat, LiveInt, derive, fix, is_live
from chase_fx.graphs.outcomes import Decision, Outcomes
from chase_fx.graphs.pyoperators import fixed
from chase_fx.graphs.recording import Recording
from chase_fx.graphs.source import source_line, source_place
from chase_fx.graphs.standins import StandIns
from chase_fx.graphs.whole import enclosing

__all__ = ["READS_DATA", "Decisions"]

# Calls that make a Python number of a tensor of one number.
_TRUTHS = frozenset({"__bool__", "is_nonzero"})
_CONVERSIONS = frozenset({*_TRUTHS, "__int__", "__index__", "__float__"})


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``torch.equal``, for which no NaN equals another one."""
    return (a == b).all() if a.shape == b.shape else a.new_zeros((), dtype=torch.bool)


# Calls that compare tensors, as calls that give a tensor.
_COMPARISONS: dict[str, Callable[..., torch.Tensor]] = {
    "equal": _equal,
    "allclose": lambda *args, **kwargs: torch.isclose(*args, **kwargs).all(),
    "__contains__": lambda tensor, value: torch.eq(tensor, value).any(),
}
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_READS_NUMBERS = frozenset({"item", "tolist"})
# Calls that hand all data out: whatever comes of it is a constant.
_READS_ALL = frozenset({"numpy", "__array__", "__complex__", "__dlpack__"})
READS_DATA = frozenset({*_CONVERSIONS, *_COMPARISONS, *_READS_NUMBERS, *_READS_ALL})
# Calls that give a Python value which does not depend on the data.
_ABOUT = frozenset(
    {
        "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "stride", "element_size",
        "get_device", "type", "has_names", "is_same_size", "result_type", "can_cast",
        "is_tensor", "is_storage", "is_pinned", "is_shared", "__hash__", "register_hook",
    }
)  # fmt: skip

# Functions of torch that are those of Python for numbers.
_OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "sym_int": int,
    "sym_float": float,
    "sym_max": max,
    "sym_min": min,
    "_sym_sqrt": math.sqrt,
}
# Calls that tell how a tensor lies in memory, and where.
_LAYOUT = frozenset({"is_contiguous", "storage_offset", "data_ptr"})


class Decisions(Recording):
    """A recording of numbers from data, and of what Python decides by data."""

    def __init__(self, root: nn.Module, device: torch.device | None, *, standins: StandIns | None) -> None:
        super().__init__(root, device, standins=standins)
        self.outcomes = Outcomes()
        self.decisions: list[Decision] = []
        self._settled: dict[tuple[Node, int], bool] = {}

    def _call_function(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write one call of the torch API."""
        raise NotImplementedError

    def _python_value(self, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose result is no tensor."""
        if name in _OF_NUMBERS and any(map(is_live, args)):
            return derive(_OF_NUMBERS[name], args)
        if isinstance(out, (int, float)) and not isinstance(out, bool):  # of sizes, that nobody follows
            fixed((args, tuple(kwargs.values())))
        if name in _LAYOUT:
            return self._read_layout(name, out, args, kwargs)
        if name not in _ABOUT:
            self._need_values(args, kwargs)
        if name not in READS_DATA:
            return out
        line = source_line()
        for places in (self.reads, self.deciders):
            places.setdefault(line, enclosing())
        read = f"{name} at {line}"
        numbers = name in _READS_NUMBERS and args and args[0].dtype not in (torch.bool, *_COMPLEX)
        if numbers:
            self.specialised.append(read)
            return self._read_numbers(name, args[0], out)
        condition = self._condition(name, out, args, kwargs)
        if condition is None:
            self.specialised.append(read)
            self._guard_data(name, out, args, line)
            return out
        node = self.arguments.node_of(condition)
        return self._settle(check_data, node, out, self._writes(condition), read)

    def _read_layout(self, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A view that another call is given may lie otherwise, so the forward may decide otherwise by it."""
        tensor = args[0]
        source = self.arguments.measured(tensor)
        if source is None:
            return out
        line = source_line()
        if name == "data_ptr":
            raise CaptureError(
                f"the forward reads the address of a tensor at {line}, which is another one at every call; compare "
                "tensors by what they hold, or name the function in whole="
            )
        found = self.arguments.size(name, source, **kwargs)
        self.deciders.setdefault(line, enclosing())
        self.arguments.call(check, (found, "==", out, True, line), plain=True)
        return out

    def _settle(self, marker: Callable[..., Any], node: Node, found: bool, writes: int = 0, read: str = "") -> bool:
        """The forward goes on with the truth of ``node``, as it was after so many writes, or otherwise."""
        key = node, writes
        if key not in self._settled:
            (line, place), drawn = source_place(), marker is not check_data
            place = line if drawn else place
            outcome = self.outcomes.of(len(self.decisions), place, found, drawn=drawn)
            guard = self.graph.call_function(marker, (node, outcome, line))
            guard.meta["source"] = line
            self.decisions.append(Decision(guard, line, place, outcome, found, drawn, read))
            self._settled[key] = outcome
            if read:
                self.specialised.append(read)
        return self._settled[key]

    def _writes(self, tensor: torch.Tensor) -> int:
        """How often its memory was written to; torch's version of it leaves out what is written through ``.data``."""
        storage = self.tape.slot_of(tensor).storage
        ops = [op for op in self.tape.ops if op.op._schema.is_mutable]
        return sum(any(slot.storage == storage for slot in op.inputs()) for op in ops)

    def _condition(self, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The tensor whose truth Python asks for, if that is what it does."""
        if name in _TRUTHS or (name == "item" and type(out) is bool):
            tensor: torch.Tensor = args[0]
            return tensor
        if name in _COMPARISONS:
            with self:
                return _COMPARISONS[name](*args, **kwargs)
        return None

    def _guard_data(self, name: str, out: Any, args: tuple[Any, ...], line: str) -> None:
        """Write a guard: the forward goes on with ``out``."""
        if name in _CONVERSIONS:
            self.arguments.call(check_data, (args[0], out, line))
            return
        start = len(self.tape.ops)
        with _disable_current_modes():
            known = args[0].detach().clone()  # no result of the forward, but a constant
        same = self._call_function(agree, "agree", (args[0], known), {})
        for op in self.tape.ops[start:]:
            op.whole = "the forward reads all of it"
        self.arguments.call(check_data, (same, True, line))

    def _live_dim(self, tensor: torch.Tensor, dim: int, size: int, method: str = "size") -> int:
        source = self.arguments.measured(tensor)
        return size if source is None else LiveInt(size, self, lambda: self.arguments.size(method, source, dim))

    def _read_numbers(self, name: str, tensor: torch.Tensor, out: Any) -> Any:
        """Numbers read from data stay live: the graph reads them again where they are arguments of its calls.

        How many there are is fixed, for Python counts a list without asking anybody.
        """
        shape = self.tape.slot_of(tensor).shape
        for d, n in enumerate(shape):
            fix(self._live_dim(tensor, d, n))
        if shape:  # Python picks elements by their places
            start = len(self.tape.ops)
            tensor = self._call_function(torch.clone, "clone", (tensor,), {})
            for op in self.tape.ops[start:]:
                op.whole = f"{name}() reads its elements into Python"
        node = self.graph.call_method(name, (self.arguments.to_fx(tensor),))
        node.meta["source"] = ""

        def element(build: Callable[[], Node], place: int) -> Node:
            return self.arguments.number(operator.getitem, (build(), place))

        def live(value: Any, build: Callable[[], Node]) -> Any:
            if isinstance(value, list):
                return [live(v, functools.partial(element, build, i)) for i, v in enumerate(value)]
            if type(value) is int:
                return LiveInt(value, self, build)
            return LiveFloat(value, self, build) if type(value) is float else value

        return live(out, lambda: node)
