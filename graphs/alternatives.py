"""Both ways of what a forward decides by data or by random draws, in one graph.

A decision gets one more capture, in which it goes otherwise (see :mod:`.ways`). A decision by data of which that can't
be had is a guard: the other way raises, does not join the first one again, returns something of another form, or there
are too many. Draws have no such choice: where one of theirs can't be had, nothing can.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.ambient import add_regions, asks
from chase_fx.graphs.attempts import Captured, Inputs, Way, captured, copy_of, record
from chase_fx.graphs.composition import check_combinations, compose, unname_result
from chase_fx.graphs.guards import check_data
from chase_fx.graphs.outcomes import Decision, Outcomes
from chase_fx.graphs.recorder import Recorder
from chase_fx.graphs.runs import OtherStructureError, Pool
from chase_fx.graphs.tape import Tape
from chase_fx.graphs.traced import OutputLeaf
from chase_fx.graphs.trees import tensors_in
from chase_fx.graphs.ways import TOGETHER, decide, take_long_ways

__all__ = ["both_ways"]

# A place that decides by data more often than this is in a loop.
_AT_A_PLACE = 4
# How much larger than its longest way a graph with both ways of decisions by data may be.
_GROWTH = 3
# Captures that decisions by data may cost, besides those of draws.
_CAPTURES = 24


def both_ways(model: nn.Module, inputs: Inputs, way: Way) -> Captured:
    """The capture of a forward, with both ways of what it decides.

    Raises:
        CaptureError: the forward can't be captured, or not both ways of a random draw in train mode.
    """
    found = _both_ways(model, inputs, way)
    if asks(found[2].code):
        with suppress(CaptureError):  # where it can't run inside a region of autocast, no call has one
            there = replace(way, ambient=True, unroll=found[2].unroll)
            add_regions(found[0], _both_ways(model, inputs, there)[0])
    return found


def _both_ways(model: nn.Module, inputs: Inputs, way: Way) -> Captured:
    first = record(model, inputs, way)
    judged = first.unrolled and not (way.fake or way.training or way.ambient)
    if judged and not _same_results(model, inputs, first):
        first = record(model, inputs, replace(way, unroll=False))
    ways = _Ways(model, inputs, way, first)
    while any(map(ways.has_both, first.decisions)):
        try:
            return ways.together()
        except OtherStructureError as e:
            if not ways.give_up(e.line):
                raise CaptureError(f"random draws decide which code runs, and {e}") from e
    unname_result(first.graph)
    return captured(first)


def _same_results(model: nn.Module, inputs: Inputs, found: Recorder) -> bool:
    """Whether loops that were unrolled further than the model runs them give the same result."""
    with torch.no_grad():
        want = list(tensors_in(copy_of(model).eval()(*inputs.args, **inputs.kwargs)))
    have = found.results
    return len(want) == len(have) and all(
        a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(want, have, strict=True)
    )


class _Ways:
    """The captures of one forward, and which of its decisions have both ways."""

    def __init__(self, model: nn.Module, inputs: Inputs, way: Way, first: Recorder) -> None:
        self._model, self._inputs, self._first = model, inputs, first
        values = way.values or first.standins is None
        self._way = replace(way, values=values, may_hash=first.may_hash, unroll=first.unroll, dead=first.loops.dead)
        self._known = [first]
        self._spent = 0
        outcomes = defaultdict(list)
        for decision in first.decisions:
            if not decision.drawn:
                outcomes[decision.place].append(decision.outcome)
        self._free = {place for place, found in outcomes.items() if len(set(found)) > 1 or len(found) > _AT_A_PLACE}
        self._guards: set[str] = set()  # lines
        self._data = True
        self._usual: dict[str, bool] = {}

    def has_both(self, decision: Decision) -> bool:
        """Whether both ways of a decision are to be in the graph."""
        if decision.drawn:
            return self._first.training
        fixed = decision.line in self._guards or decision.place in self._free
        return self._data and not fixed and _may_differ(decision.node)

    def give_up(self, line: str) -> bool:
        """Decisions by data at ``line``, or all of them if it is no such line, are guards; whether that may help."""
        if not self._data:
            return False
        known = {d.line for recorder in self._known for d in recorder.decisions if not d.drawn} - self._guards
        self._data = line in known
        self._guards.add(line)
        return True

    def together(self) -> Captured:
        """One graph of the forward.

        Raises:
            OtherStructureError: both ways can't be had.
        """
        first = self._first
        self._usual = {d.place: d.outcome for d in reversed(first.decisions) if d.place not in self._free}
        recorder = first
        if take_long_ways(first, self._capture, self._usual, self.has_both):
            recorder = self._capture(())
        pool = _pool(recorder, self.has_both)
        parts = decide(recorder, self._capture, pool)
        if len(parts.branches) > TOGETHER and any(step.node.target is check_data for step in parts.branches):
            raise OtherStructureError("there are too many decisions to see them in all combinations")
        found = [d.found if not d.drawn else d.outcome for d in first.decisions if self.has_both(d)]
        graph, outputs = compose(parts, pool, found)
        check_combinations(parts, self._capture, pool)
        if self._data and len(graph.nodes) > _GROWTH * max(len(known.graph.nodes) for known in self._known):
            raise OtherStructureError("what is decided about is most of the forward, several times")
        return self._captured(recorder, pool, graph, outputs)

    def _capture(self, told: tuple[bool, ...]) -> Recorder:
        """The capture whose decisions go as told at first, and then as usual."""
        for known in self._known:
            if self._goes(known, told):
                for decision in known.decisions:
                    if decision.drawn or decision.place not in self._free:
                        self._usual.setdefault(decision.place, decision.outcome)
                return known
        if self._data:
            self._spent += 1
            if self._spent > _CAPTURES + 4 * sum(d.drawn for d in self._first.decisions):
                raise OtherStructureError("there are too many ways")
        try:
            found = record(self._model, self._inputs, replace(self._way, outcomes=self._outcomes(told)))
        except CaptureError as e:
            raise OtherStructureError(str(e)) from e
        self._known.append(found)
        return found

    def _outcomes(self, told: tuple[bool, ...]) -> Outcomes:
        return Outcomes(told, self._usual, self._free)

    def _goes(self, known: Recorder, told: tuple[bool, ...]) -> bool:
        if len(known.decisions) < len(told):
            return False
        usual = dict(self._usual)
        for k, decision in enumerate(known.decisions):
            want = (
                told[k]
                if k < len(told)
                else Outcomes((), usual, self._free).of(k, decision.place, decision.found, drawn=decision.drawn)
            )
            if decision.outcome is not want:
                return False
        return True

    def _captured(self, recorder: Recorder, pool: Pool, graph: Graph, outputs: tuple[OutputLeaf, ...]) -> Captured:
        recorder.graph, recorder.tape, recorder.outputs = graph, pool.tape, outputs
        recorder.arguments.constants, recorder.arguments.rebuilds = pool.constants, pool.rebuilds
        for name, rebuild in pool.rebuilds.items():
            recorder.root.add_module(name, rebuild)
        both = {d.read for known in self._known for d in known.decisions if not d.drawn and self.has_both(d)}
        reads = dict.fromkeys(text for known in self._known for text in known.specialised if text not in both)
        recorder.specialised[:] = list(reads)
        recorder.decided = sorted(both)
        for known in self._known:
            recorder.mode_readers |= known.mode_readers
            recorder.reads_training |= known.reads_training
            recorder.reads_dtype |= known.reads_dtype
            recorder.reads = {**known.reads, **recorder.reads}
            recorder.deciders = {**known.deciders, **recorder.deciders}
        return captured(recorder)


def _pool(recorder: Recorder, has_both: Any) -> Pool:
    """Shares nothing that changes with the recording, which may be needed again."""
    tape = Tape()
    tape.slots, tape.ops = list(recorder.tape.slots), list(recorder.tape.ops)
    arguments = recorder.arguments
    return Pool(tape, dict(arguments.constants), dict(arguments.rebuilds), has_both)


def _may_differ(node: Node) -> bool:
    """Whether a decision depends on an input or on what the model holds; else it goes the same way in every call."""
    stack, seen = [node], {node}
    while stack:
        last = stack.pop()
        if last.op in ("placeholder", "call_module"):
            return True
        if last.op == "get_attr" and not str(last.target).startswith("_chase_constant"):
            return True
        more = [n for n in last.all_input_nodes if n not in seen]
        seen.update(more)
        stack += more
    return False
