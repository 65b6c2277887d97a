"""A forward without its arithmetic: zeros stand in for the results of large contractions.

A capture needs the shapes of tensors and hardly ever their values, while nearly all of a forward's time goes into
convolutions and matrix products. So these are not computed: zeros stand in for their results, and everything computed
from them is marked, by the memory that it lies in. Elementwise operators on what is marked have stand-ins as well. As
soon as the forward could tell the difference (it reads marked data into Python, asks for a shape that depends on
them, runs code that is not torch's on them, writes them to a parameter), the capture gives up, and is done again on
real values. What does not depend on the inputs is always computed: code may keep it beyond the forward, such as a
table in a cache by size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from chase_fx.graphs.standin_results import CONTRACTIONS, ELEMENTWISE, Zeros
from chase_fx.graphs.tape import Slot, TapedOp, slots_in, written_by

__all__ = ["StandIns", "ValuesNeeded"]

aten = torch.ops.aten
Dependence = tuple[set[int], ...]

# Elements of a tensor without data that an operator without a stand-in may run on.
_LARGEST = 1 << 22


class ValuesNeeded(BaseException):  # no error; no handler of the model's is to catch it
    """The forward depends on values that were not computed."""


class StandIns:
    """What is marked in one forward.

    Args:
        zeros: what stand-ins are made with.
        hollow: the model and the inputs hold no data, but stand-ins themselves.

    Attributes:
        gave_up: whether values were needed; the forward may have caught the exception.
    """

    def __init__(self, zeros: Zeros, *, hollow: bool = False) -> None:
        self.gave_up = False
        self.hollow = hollow
        self._parameters: set[int] = set()
        self._given: set[int] = set()  # what depends on the inputs
        self._marked: set[int] = set()
        self._zeros = zeros

    def start(self, slots: Sequence[Slot]) -> None:
        """The tensors that there are before the forward."""
        for slot in slots:
            if slot.kind == "input":
                self._given.add(slot.storage)
            elif slot.kind == "parameter":
                self._parameters.add(slot.storage)
        if self.hollow:
            state = [slot.storage for slot in slots]
            self._given.update(state)
            self._marked.update(state)

    def marks(self, slots: Iterable[Slot]) -> bool:
        """Whether one of the tensors depends on a stand-in."""
        return not self._marked.isdisjoint([slot.storage for slot in slots])

    def need(self, slots: Iterable[Slot]) -> None:
        """The data of these tensors matter: give up if one of them depends on a stand-in."""
        if self.marks(slots):
            self.give_up()

    def give_up(self) -> None:
        """Values are needed."""
        self.gave_up = True
        raise ValuesNeeded

    def run(self, op: TapedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Dependence]:
        """The result of one ATen call, or its stand-in; ``args`` and ``kwargs`` are the arguments themselves."""
        func = op.op
        inputs = [slot.storage for slot in op.inputs()]
        if self._given.isdisjoint(inputs):
            return func(*args, **kwargs), ()
        marked = not self._marked.isdisjoint(inputs)
        if marked:
            self._check(func, op.args, op.kwargs)
        stand_in = CONTRACTIONS.get(func) or (ELEMENTWISE.get(func) if marked else None)
        out = stand_in(self._zeros, *args, **kwargs) if stand_in is not None else None
        if out is not None:
            return out, (self._given, self._marked)
        if self.hollow and not func.is_view and any(math.prod(slot.shape) > _LARGEST for slot in op.inputs()):
            self.give_up()  # computing it would touch memory that is not there
        return func(*args, **kwargs), (self._given, self._marked) if marked else (self._given,)

    def follow(self, outs: Sequence[Slot], dependence: Dependence) -> None:
        """What a call gave depends on what its arguments do."""
        for found in dependence:
            found.update([slot.storage for slot in outs])
        if len(dependence) > 1 and any(slot.stride is None for slot in outs):
            self.give_up()  # how much a sparse tensor stores depends on its data

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give up if the call does more than compute tensors of known shapes from marked ones."""
        if func is aten.index.Tensor:  # of a known shape unless a mask is what is marked
            self.need(slot for slot in slots_in(args[1]) if slot.dtype in (torch.bool, torch.uint8))
        elif func.namespace != "aten" or _depends_on_data(func):
            self.give_up()
        for i, name in written_by(func):
            written = list(slots_in(args[i] if i < len(args) else kwargs.get(name)))
            if any(slot.storage in self._parameters for slot in written):
                self.give_up()
            self.follow(written, (self._given, self._marked))


@functools.cache
def _depends_on_data(func: Any) -> bool:
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
