"""Which part of a forward a decision is about, found by captures with other outcomes.

Each random draw, and each truth of data, that decides gets one more capture, in which it goes otherwise and everything
else goes on as usual: the number of captures grows with the number of decisions, not with that of their combinations.
Up to the decision the two captures are equal; from their ends backwards their steps are matched, and what is left
between is what it decides about. The values that the matched steps read and that differ are what the two ways hand on.

That decisions don't depend on each other beyond these values is an assumption. So captures with several that go
otherwise, in combinations that hold every pair of outcomes, have to be what the parts put together give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any

import torch

from chase_fx.graphs.branches import result
from chase_fx.graphs.calls import DATA_SIZED, call_name
from chase_fx.graphs.guards import check_data
from chase_fx.graphs.outcomes import Decision
from chase_fx.graphs.recorder import Recorder
from chase_fx.graphs.runs import (
    Expression,
    OtherStructureError,
    Pool,
    Run,
    Step,
    Value,
    branches,
    key,
    leaves_of,
    like,
    map_values,
    read,
    step_args,
)

__all__ = ["TOGETHER", "Branch", "Capture", "Decided", "decide", "patterns", "take_long_ways"]

TOGETHER = 4  # decisions of which all combinations are captured
Capture = Callable[[tuple[bool, ...]], Recorder]  # a capture whose first decisions go as told


def take_long_ways(
    recorder: Recorder, capture: Capture, usual: dict[str, bool], has_both: Callable[[Decision], bool]
) -> bool:
    """Let the usual outcome at each place be the one with which more is computed; whether one changed.

    What a layer computes is then told from what it was given, which are the same thing where it is left out.
    """
    first = {d.place: index for index, d in reversed(list(enumerate(recorder.decisions))) if has_both(d)}
    outcomes, length = [decision.outcome for decision in recorder.decisions], len(recorder.graph.nodes)
    changed = []
    for place, index in first.items():
        with _at(recorder.decisions[index].line):
            if len(capture((*outcomes[:index], not outcomes[index])).graph.nodes) > length:
                changed.append(place)
    usual.update({place: not usual[place] for place in changed})
    return bool(changed)


@dataclass(eq=False)
class Branch:
    """What one decision is about.

    Attributes:
        run: the run in which it goes as usual; steps from ``start`` (the decision itself) to ``stop`` are its way.
        other: the run in which it goes otherwise; its way ends before step ``other_stop``.
        handed: values that later steps read, with what they are after the other way.
    """

    run: Run
    start: int
    stop: int
    other: Run
    other_stop: int
    handed: tuple[tuple[Value, Any], ...]


@dataclass
class Decided:
    """The usual run, and the branch at each decision, of it and of the other ways."""

    usual: Run
    branches: dict[Step, Branch]


def decide(first: Recorder, capture: Capture, pool: Pool) -> Decided:
    """Find the branches of a forward of which ``first`` is a capture.

    Raises:
        OtherStructureError: the ways don't join again, or can't be told apart.
    """
    usual, draws = read(first, pool), len(first.decisions)
    limit = min(16 + 3 * draws, 24 + draws)  # each overlap doubles the ways of what is inside: many are found out early
    return Decided(usual, _Finder(capture, pool, limit).among(usual, 0, len(usual.steps)))


class _Finder:
    """Finds branches, the last ones first, so that what one is about can be seen to hold all of what begins in it.

    What draws decide about may overlap: a result may tell which layers ran, and the steps of the last one give only
    part of it. The earlier branch is then made longer, up to the end of the later one, which has to be found in both
    of its ways.
    """

    def __init__(self, capture: Capture, pool: Pool, limit: int) -> None:
        self._capture, self._pool, self._limit = capture, pool, limit
        self._found: dict[Step, Branch] = {}  # as long as they are known to be

    def among(self, run: Run, start: int, stop: int) -> dict[Step, Branch]:
        """The branches at the decisions among some steps of ``run``, and in their ways."""
        branch_at: dict[Step, Branch] = {}
        for index, position in reversed(list(enumerate(run.decisions))):
            step = run.steps[position]
            if start <= position < stop and branches(step.node):
                with _at(str(step.node.meta["source"])):
                    inner = self._branch(run, index, branch_at)
                branch_at = {step: self._found[step], **inner, **branch_at}
        return branch_at

    def _branch(self, run: Run, index: int, later: dict[Step, Branch]) -> dict[Step, Branch]:
        """Find the branch at decision ``index``, which may hold ``later`` ones; gives those in its other way."""
        position = run.decisions[index]
        step = run.steps[position]
        if step not in self._found:
            self._found[step] = _branch(run, position, self._other_way(run, index))
        while True:
            branch = self._found[step]
            inner = self.among(branch.other, position + 1, branch.other_stop)
            over = {b: b.stop - branch.stop for b in later.values() if b.run is run and b.start < branch.stop}
            over |= {b: b.stop - branch.other_stop for b in inner.values() if b.run is branch.other}
            over = {b: steps for b, steps in over.items() if steps > 0}
            if not over:
                return inner
            _may_overlap(branch, over)
            self._found[step] = _branch(run, position, branch.other, len(run.steps) - branch.stop - max(over.values()))

    def _other_way(self, run: Run, index: int) -> Run:
        position = run.decisions[index]
        if len(self._found) >= self._limit:
            raise OtherStructureError(
                f"there are more than {self._limit} ways, for what they decide about does not end before the next one "
                f"does, from {_where(run, position)} on"
            )
        told = (*run.outcomes[:index], not run.outcomes[index])
        return read(self._capture(told), self._pool, run.steps[: position + 1])


@contextmanager
def _at(line: str) -> Iterator[None]:
    """Errors are about the decision at that line."""
    try:
        yield
    except OtherStructureError as e:
        e.line = e.line or line
        raise


def _where(run: Run, position: int) -> str:
    return f"at {run.steps[position].node.meta['source']}"


def _may_overlap(outer: Branch, inner: Iterable[Branch]) -> None:
    """Data that decide about what other decisions are about too are guards, for a graph of all ways is large."""
    for branch in (*inner, outer):
        step = branch.run.steps[branch.start]
        if step.node.target is check_data:
            where = _where(branch.run, branch.start)
            raise OtherStructureError(
                f"what it decides about overlaps with another decision {where}", str(step.node.meta["source"])
            )


def _branch(run: Run, start: int, other: Run, longest: int | None = None) -> Branch:
    """Match the two runs from their ends, at most ``longest`` steps; ``start`` is the decision in both."""
    ours, theirs = run.steps[start + 1 :], other.steps[start + 1 :]
    length = 0
    for a, b in zip(reversed(ours), reversed(theirs), strict=False):
        if length == longest or not _alike(a, b):
            break
        length += 1
    while length:
        matching = _Matching(ours, theirs, length)
        if matching.length == length:
            stop, other_stop = len(run.steps) - length, len(other.steps) - length
            handed = matching.result(_where(run, start))
            if run.steps[start].node.target is check_data and any(x.node.target is result for x, _ in handed):
                break
            return Branch(run, start, stop, other, other_stop, handed)
        length = matching.length
    raise OtherStructureError(f"what the forward returns depends on what is decided {_where(run, start)}")


def _alike(a: Step, b: Step) -> bool:
    """Whether the two do the same with values that may differ."""
    if not like(a.node, b.node) or (a.slot is None) is not (b.slot is None):
        return False
    if a.slot is not None and b.slot is not None and a.slot.dtype != b.slot.dtype:
        return False
    if not _same_shape(a, b) and not _sized_by_data(a, b):
        return False
    if branches(a.node):
        return branches(b.node)
    return _same_form(a.args, b.args) and _same_calls(a, b)


def _same_shape(a: Any, b: Any) -> bool:
    return a.slot is None or b.slot is None or a.slot.shape == b.slot.shape


def _sized_by_data(a: Step, b: Step) -> bool:
    """Whether the result has as many elements as the data says, or as an operand that differs between the two."""
    if a.slot is None or b.slot is None or len(a.slot.shape) != len(b.slot.shape):
        return False
    operands: tuple[list[Value], list[Value]] = ([], [])
    for step, found in zip((a, b), operands, strict=True):
        map_values(step.args, found.append)
    differ = any(_same_shape(x, y) is False for x, y in zip(*operands, strict=False) if isinstance(y, Value))
    return differ or call_name(a.node) in DATA_SIZED


def _same_calls(a: Step, b: Step) -> bool:
    """Whether the tape of ``a`` serves ``b``, which lacks what ``a`` makes of operands that are None in ``b``.

    That are calls of these operands alone, and what puts them to another value, element by element.
    """
    left_out = {id(value.slot) for value in _none_in(a.args, b.args) if value.slot is not None}
    if not left_out:
        return True
    first, second = (step.run.tape.ops[slice(*step.node.meta.get("tape", (0, 0)))] for step in (a, b))
    calls = []
    for op in first:
        given = [id(a.run.slot(slot)) for slot in op.inputs()]
        if left_out.issuperset(given):
            left_out.update(id(a.run.slot(slot)) for slot in op.outs)
        elif left_out.isdisjoint(given) or torch.Tag.pointwise not in op.op.tags:
            calls.append(op.op)
    return calls == [op.op for op in second]


def _none_in(a: Any, b: Any) -> Iterator[Value]:
    """The values of ``a`` for which ``b``, of the same form, has None."""
    if isinstance(a, (Step, Expression)):
        if b is None:
            yield a
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            yield from _none_in(x, y)
    elif isinstance(a, dict):
        for k in a:
            yield from _none_in(a[k], b[k])


def _same_form(a: Any, b: Any) -> bool:
    if isinstance(a, (Step, Expression)):
        return b is None or isinstance(b, (Step, Expression))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same_form, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same_form(a[k], b[k]) for k in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and all(map(_same_form, (a.start, a.stop, a.step), (b.start, b.stop, b.step)))
    return bool(key(a) == key(b))


class _Matching:
    """The last ``length`` steps of two runs as the same steps; ``length`` gets smaller where they can't be."""

    def __init__(self, ours: list[Step], theirs: list[Step], length: int) -> None:
        self.length = length
        self._twin = dict(zip(ours[-length:], theirs[-length:], strict=True))
        self._from_end = {s: i for steps in (ours, theirs) for i, s in enumerate(reversed(steps[-length:]))}
        self._handed: dict[Value, Any] = {}
        self._kept: set[Value] = set()
        self._ambiguous = False
        self._compared: set[tuple[int, int]] = set()
        for a, b in self._twin.items():
            self._reader = a
            self._differs = not _same_shape(a, b)
            self._compare(step_args(a.node, a.args), step_args(b.node, b.args))

    def result(self, where: str) -> tuple[tuple[Value, Any], ...]:
        """What the two ways hand on."""
        if self._ambiguous or not self._kept.isdisjoint(self._handed):
            raise OtherStructureError(f"one value has several meanings after the decision {where}")
        return tuple(self._handed.items())

    def _compare(self, a: Any, b: Any) -> None:
        if isinstance(a, (Step, Expression)):
            self._value(a, b)
        elif isinstance(a, (tuple, list)):
            for x, y in zip(a, b, strict=True):
                self._compare(x, y)
        elif isinstance(a, dict):
            for k in a:
                self._compare(a[k], b[k])
        elif isinstance(a, slice):
            self._compare((a.start, a.stop, a.step), (b.start, b.stop, b.step))

    def _value(self, a: Value, b: Any) -> None:
        if (id(a), id(b)) in self._compared:
            return
        self._compared.add((id(a), id(b)))
        if a is b:
            self._kept.add(a)
            if isinstance(a, Expression):
                map_values(a.args, lambda part: self._value(part, part))
        elif a in self._twin or b in self._from_end:
            if self._twin.get(a) is not b:  # type: ignore[arg-type]  # a step, or no key of it
                self.length = min(self.length, *(self._from_end[v] for v in (a, b) if v in self._from_end))
        elif self._same_number(a, b):
            self._compare(a.args, b.args)
        else:
            if self._differs if a.slot is None else isinstance(b, Value) and not _same_shape(a, b):
                self.length = min(self.length, self._from_end[self._reader])  # only data may say how many there are
            self._ambiguous = self._ambiguous or self._handed.setdefault(a, b) is not b
            self._untouched(a)
            self._untouched(b)

    def _same_number(self, a: Value, b: Any) -> bool:
        """The same arithmetic, or the same element of what is matched: its parts are what differs."""
        if not (isinstance(a, Expression) and isinstance(b, Expression)):
            return False
        if a.node.op != b.node.op or a.target != b.target or not _same_form(a.args, b.args):
            return False
        if a.slot is None:
            return a.node.op != "get_attr"
        return any(part in self._twin for part in leaves_of(a))

    def _untouched(self, value: Any) -> None:
        """What is handed on is known before the matched steps."""
        late = [self._from_end[p] for p in leaves_of(value) if p in self._from_end]
        if late:
            self.length = min(self.length, *late)


def patterns(number: int) -> Iterator[tuple[bool, ...]]:
    """Which of ``number`` draws decide otherwise: all combinations of few, else some that hold every pair of outcomes.

    Those of one or no draw are left out.
    """
    if number <= TOGETHER:
        yield from (p for p in product((False, True), repeat=number) if sum(p) > 1)
        return
    rows = next(n for n in range(2, number + 2) if comb(n, n // 2) >= number)
    codes = [code for code, _ in zip(combinations(range(rows), rows // 2), range(number), strict=False)]
    yield (True,) * number
    for row in range(rows):
        yield tuple(row in code for code in codes)
