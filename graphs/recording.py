"""What every part of a recording shares: the graph, the tape, and how a call becomes a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from chase_fx.errors import CaptureError, ChaseError
from chase_fx.graphs.arguments import Arguments
from chase_fx.graphs.autocast import Regions
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.changed import put_back
from chase_fx.graphs.draws import draws, given_arrays
from chase_fx.graphs.guards import check, check_number
from chase_fx.graphs.provenance import from_data, view_sizes
from chase_fx.graphs.results import result_to_fx
from chase_fx.graphs.source import source_line
from chase_fx.graphs.standins import StandIns, ValuesNeeded
from chase_fx.graphs.tape import Tape, TapeMode, writes_outside, written_by
from chase_fx.graphs.trees import map_tensors, tensors_in
from chase_fx.graphs.walk import modules_of
from chase_fx.graphs.whole import FunctionName, enclosing

__all__ = ["CAUGHT", "Recording"]

# Errors of calls that fail for some sizes, and not for others.
CAUGHT = (RuntimeError, IndexError, ValueError)
_linalg: Any = torch.linalg  # its stub leaves out the error


class Recording(TorchFunctionMode):
    """A graph and a tape in the making."""

    def __init__(self, root: nn.Module, device: torch.device | None, *, standins: StandIns | None) -> None:
        super().__init__()
        self.root = root
        self.modules = modules_of(root)
        self.graph = Graph()
        self.tape = Tape()
        self.arguments = Arguments(self.modules, self.graph, self.tape, device)
        self.standins = standins
        self.tape_mode = TapeMode(self.tape, self.standins)
        self.specialised = self.arguments.specialised
        self.decided: list[str] = []  # what the forward read from data, where the graph has both ways
        self.deciders: dict[str, tuple[FunctionName, ...]] = {}
        self.reads: dict[str, tuple[FunctionName, ...]] = {}
        self.reads_dtype = False  # of a tensor of floats
        self.may_hash = False
        self.regions: Regions
        self._measures_at = ""
        self._guards: set[tuple[Any, ...]] = set()
        self._names = {id(m): name for name, m in reversed(self.modules)}
        self._active = False

    def recording(self) -> bool:
        """Whether live numbers are to write their arithmetic down."""
        return self._active

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write the arithmetic ``fn(*args)`` of live numbers."""
        return self.arguments.number(fn, args)

    def guard(self, left: Any, comparison: str, right: Any, holds: bool) -> None:
        """Write down that the forward decided by ``left comparison right``; once for each pair of numbers."""
        a, b = self.arguments.to_fx(left), self.arguments.to_fx(right)
        if a is b:
            return
        key = (a, comparison, b, type(b))
        if key not in self._guards:
            self._guards.add(key)
            line = source_line()
            self.deciders.setdefault(line, enclosing())
            guard = check_number if from_data(a) or from_data(b) else check
            self.arguments.call(guard, (a, comparison, b, holds, line), plain=True)

    def decide(self, left: Any, comparison: str, right: Any, holds: bool) -> bool:
        """The outcome to go on with where random draws decide."""
        raise NotImplementedError

    def lose(self, number: Any) -> None:
        """The forward goes on with a whole or plain number that was made from a random draw."""
        raise NotImplementedError

    def finish(self, out: Any) -> None:
        """Write the forward's result; live sizes in it still write nodes."""
        self._active = True
        result = result_to_fx(self.arguments, out)
        self.arguments.written = list(put_back(self.arguments, result_to_fx))
        self.graph.output(result)
        if self._measures_at:
            self.arguments.guard_ranks(self._measures_at)
        self._check_writes()
        self._active = False

    def _check_writes(self) -> None:
        """Refuse what the graph would not do: writes that the torch API does not show, to tensors that it does.

        Raises:
            CaptureError: there is one, such as inside a function that ``torch.vmap`` maps.
        """
        hidden = [op for op in self.tape.ops if not op.node and written_by(op.op)]
        known = {node.meta["slot"].storage for node in self.graph.nodes if "slot" in node.meta} if hidden else set()
        for op in hidden:
            if any(slot.storage in known for slot in op.writes()):
                raise CaptureError(
                    f"the forward writes to a tensor where the torch API does not show it ({op.op}, as in a function "
                    "that torch.vmap maps), so a graph would not; write to it outside of that"
                )

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call of torch."""
        self._active = False
        try:
            return func(*given_arrays(args), **kwargs)
        except CAUGHT as e:
            self._raised(e, args, kwargs)
            raise
        finally:
            self._active = True

    def _raised(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call failed, and the forward may catch the error and go on another way: the graph only serves such sizes.

        Raises:
            CaptureError: data decide whether the call fails.
        """
        if isinstance(error, (ChaseError, NotImplementedError)):  # what torch does not implement it never does
            return
        if self.standins is not None:
            raise ValuesNeeded
        if isinstance(error, _linalg.LinAlgError):
            raise CaptureError(
                f"a call at {source_line()} fails for the example's data ({type(error).__name__}: {error}), and a "
                "graph can't do for other data what the forward does when it succeeds; trace with data for which it "
                "does, or name the function around it in whole="
            ) from error
        self.arguments.keep_sizes([self.arguments.node_of(t) for t in tensors_in((args, kwargs))])

    def _node(self, op: str, target: Any, args: Any, kwargs: Mapping[str, Any], start: int) -> Node:
        """The call of ``target``, whose ATen calls begin at ``start``.

        FX would look through arguments that it is given at once for numbers of its own.
        """
        fx_args, fx_kwargs = self.arguments.given(args, kwargs, start)
        node = self.graph.create_node(op, target)
        node.args = fx_args
        if fx_kwargs:
            node.kwargs = fx_kwargs
        return node

    def let_go(self, tensor: torch.Tensor) -> bool:
        """``tensor`` is an empty one from here on, if it was made in the forward."""
        slot = self.tape.find(tensor)
        if slot is None or slot.kind != "value":
            return False
        node = self.graph.call_method("new_empty", (self.arguments.node_of(tensor), (0,)))
        start = len(self.tape.ops)
        with self._paused(), torch._C.DisableTorchFunction():
            empty = tensor.new_empty(0)
        self._finish(node, empty, (tensor,), {}, start, in_place=False)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            tensor.data = empty
        self.tape.replace(tensor, empty)
        self.arguments.bind(tensor, node)
        return True

    def _need_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The data of the tensors among the arguments matter."""
        if self.standins is not None:
            self.standins.need([self.tape.slot_of(t) for t in tensors_in((args, kwargs))])

    def _finish(
        self, node: Node, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], start: int, *, in_place: bool
    ) -> Any:
        self.regions.check_call()
        source = source_line()
        node.meta["source"] = source
        node.meta["in_place"] = in_place
        if written := {slot.storage for slot in writes_outside(self.tape.ops[start:])}:
            node.meta["writes"] = "values" if self.tape.given.isdisjoint(written) else "state"
        operands = list(tensors_in((args, kwargs)))
        if not in_place:
            given = {id(t) for t in operands}
            if any(id(t) in given for t in tensors_in(out)):
                # Same object in, same object out (dropout in eval mode): give it an identity of its own, or a later
                # use of the input would be mistaken for a use of the output.
                with self._paused(), torch._C.DisableTorchFunction():
                    alias = torch.ops.aten.alias.default
                    plain = type(out) is torch.Tensor
                    out = alias(out) if plain else map_tensors(out, lambda t: alias(t) if id(t) in given else t)
        slots = tuple(map(self.tape.slot_of, operands))
        call, sizes = call_name(node), view_sizes(node)
        for op in self.tape.ops[start:]:
            op.node, op.source, op.call, op.operands, op.sizes = node.name, source, call, slots, sizes
        node.meta["tape"] = (start, len(self.tape.ops))
        if any(map(draws, self.tape.ops[start:])):
            node.meta["draws"] = True
        if self.arguments.gradients.off and node.op != "call_module":
            node.meta["grad"] = False
        self.arguments.bind(out, node)
        return out
