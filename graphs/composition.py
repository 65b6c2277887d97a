"""One graph of a forward whose ways random draws or data decide, put together from the runs that :mod:`.ways` compared.

A value that is one thing after the one way and another after the other is bound to the ``choose`` that tells which.
Whatever reads it later, in whichever run, reads that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.branches import begin, choose, follow, join, otherwise, result
from chase_fx.graphs.guards import check, check_data, check_number
from chase_fx.graphs.runs import (
    Expression,
    OtherStructureError,
    Pool,
    Run,
    Step,
    Value,
    key,
    leaves_of,
    map_values,
    read,
    step_args,
)
from chase_fx.graphs.tape import Slot, Tape, TapedOp
from chase_fx.graphs.traced import OutputLeaf
from chase_fx.graphs.ways import Branch, Capture, Decided, patterns

__all__ = ["check_combinations", "compose", "unname_result"]

_MEASURES = frozenset(
    {"size", "stride", "numel", "dim"}
)  # read where the tensor is made: its shape may change in place


@dataclass
class _Scope:
    """What is known in one block, and in those around it."""

    outer: _Scope | None = None
    bound: dict[Value, tuple[Any, int]] = field(default_factory=dict)
    cached: dict[Expression, tuple[Any, int]] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)

    def find(self, table: str, value: Any) -> Any:
        """The entry of the innermost block that has one."""
        scope: _Scope | None = self
        while scope is not None:
            if value in getattr(scope, table):
                return getattr(scope, table)[value]
            scope = scope.outer
        return None

    def slot(self, slot: Slot) -> Slot:
        """The tensor that stands for ``slot`` here."""
        found: Slot | None = self.find("slots", slot.index)
        return slot if found is None else found


class _Walk:
    """Goes through a decided forward and through both ways of each branch. Subclasses say what comes of it."""

    def __init__(self, given: Decided) -> None:
        self.given = given
        self.tick = 0
        runs = dict.fromkeys([given.usual, *(b.other for b in given.branches.values())])
        self._guards: dict[Value, list[Expression]] = {}
        for guard in dict.fromkeys(g for run in runs for g in run.guards):
            for leaf in leaves_of(guard):
                self._guards.setdefault(leaf, []).append(guard)

    def block(self, run: Run, start: int, stop: int, scope: _Scope) -> None:
        """Steps ``start`` to ``stop`` of a run."""
        while start < stop:
            step = run.steps[start]
            branch = self.given.branches.get(step)
            if branch is None:
                self.bind(scope, step, self.step(step, self.arguments(step.args, scope), scope))
                start += 1
            else:
                self.branch(branch, step, scope)
                start = branch.stop

    def bind(self, scope: _Scope, value: Value, found: Any) -> None:
        """From here on ``value`` is ``found``; what all runs take for granted of it is asked at once."""
        self.tick += 1
        scope.bound[value] = found, self.tick
        self.bound(scope, value)
        for guard in self._guards.get(value, ()):
            steps = [leaf for leaf in leaves_of(guard) if isinstance(leaf, Step)]
            if all(scope.find("bound", leaf) is not None for leaf in steps):
                self.value(guard, scope)

    def bound(self, scope: _Scope, value: Value) -> None:
        """Something new was bound."""

    def value(self, value: Value, scope: _Scope) -> Any:
        """What ``value`` is here."""
        bound = scope.find("bound", value)
        if bound is not None:
            return bound[0]
        if isinstance(value, Step):
            raise OtherStructureError(f"a value of one way is read after the other, at {value.node.meta.get('source')}")
        cached = scope.find("cached", value)
        changed = [found[1] for part in leaves_of(value) if (found := scope.find("bound", part)) is not None]
        if cached is not None and cached[1] > max(changed, default=0):
            return cached[0]
        found = self.expression(value, self.arguments(value.args, scope), scope)
        self.tick += 1
        scope.cached[value] = found, self.tick
        return found

    def arguments(self, tree: Any, scope: _Scope) -> Any:
        """Arguments with what their values are here."""
        return map_values(tree, lambda value: self.value(value, scope))

    def step(self, step: Step, args: Any, scope: _Scope) -> Any:
        """A step with arguments from here."""
        raise NotImplementedError

    def expression(self, value: Expression, args: Any, scope: _Scope) -> Any:
        """An expression with arguments from here."""
        raise NotImplementedError

    def branch(self, branch: Branch, step: Step, scope: _Scope) -> None:
        """Both ways of a branch, or one of them."""
        raise NotImplementedError


class _Composer(_Walk):
    """Writes the graph and the tape."""

    def __init__(self, given: Decided, pool: Pool, by_themselves: Mapping[Step, bool]) -> None:
        super().__init__(given)
        self.by_themselves = by_themselves
        self.graph = Graph()
        self.tape = pool.tape
        self.ops: list[TapedOp] = []
        self._measures: dict[Value, list[Expression]] = {}
        for found in pool.expressions.values():
            if found.node.op == "call_method" and found.target in _MEASURES:
                self._measures.setdefault(found.args[0][0], []).append(found)

    def step(self, step: Step, args: Any, scope: _Scope) -> Node:
        node = self._node(step.node, step.node.target, args, step.slot, scope)
        start, stop = step.node.meta.get("tape", (0, 0))
        if stop > start:
            first = len(self.ops)
            self.ops += [self._copy(op, node, step.run, scope) for op in step.run.tape.ops[start:stop]]
            node.meta["tape"] = first, len(self.ops)
        return node

    def bound(self, scope: _Scope, value: Value) -> None:
        for measure in self._measures.get(value, ()):
            self.value(measure, scope)

    def expression(self, value: Expression, args: Any, scope: _Scope) -> Node:
        return self._node(value.node, value.target, args, value.slot, scope)

    def branch(self, branch: Branch, step: Step, scope: _Scope) -> None:
        if not branch.handed and branch.stop == branch.other_stop == branch.start + 1:
            return  # it decides nothing
        condition, usual = self.value(step.args[0][0], scope), step.node.args[1]
        if step.node.target is check_data:
            taken = self._call(follow, (condition, usual, self.by_themselves.get(step, usual), step.node.args[2]), step)
        else:
            taken = self._call(begin, (condition, usual), step)
        first = _Scope(scope)
        self.block(branch.run, branch.start + 1, branch.stop, first)
        firsts = [self.value(x, first) for x, _ in branch.handed]
        other = self._call(otherwise, (taken,), step)
        second = _Scope(scope)
        self.block(branch.other, branch.start + 1, branch.other_stop, second)
        seconds = [self.arguments(y, second) for _, y in branch.handed]
        self._call(join, (other,), step)
        for (x, y), a, b in zip(branch.handed, firsts, seconds, strict=True):
            node = a
            if a is not b:
                node = self._call(choose, (taken, a, b), step)
                self._choose(node, (x, first), (y, second), scope)
                if isinstance(a, Node) and "value" in a.meta:
                    node.meta["value"] = a.meta["value"]
            self.bind(scope, x, node)

    def _choose(self, node: Node, ours: tuple[Value, _Scope], theirs: tuple[Any, _Scope], scope: _Scope) -> None:
        """The two tensors that ``node`` chooses from have the same axes."""
        (x, first), (y, second) = ours, theirs
        if x.slot is None:
            return
        slot = first.slot(x.slot)
        if isinstance(y, (Step, Expression)) and y.slot is not None:
            one, two = slot, second.slot(y.slot)
            if (one.shape, one.dtype) != (two.shape, two.dtype):
                raise OtherStructureError(
                    f"a tensor has another shape or type after the decision at {node.meta['source']}"
                )
            if one is not two:
                flag = self._slot(Slot(0, (), torch.bool))
                slot = self._slot(Slot(0, one.shape, one.dtype, stride=one.stride))
                where = torch.ops.aten.where.self
                node.meta["tape"] = len(self.ops), len(self.ops) + 1
                self.ops.append(TapedOp(where, (flag, one, two), {}, (slot,), node.name, node.meta["source"], "where"))
        node.meta["slot"] = scope.slots[x.slot.index] = slot

    def _slot(self, slot: Slot) -> Slot:
        slot.index = len(self.tape.slots)
        slot.storage = -(1 << 40) - slot.index  # no memory that any run has
        self.tape.slots.append(slot)
        return slot

    def _call(self, target: Any, args: tuple[Any, ...], step: Step) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["source"] = step.node.meta["source"]
        return node

    def _node(self, like: Node, target: Any, args: Any, slot: Slot | None, scope: _Scope) -> Node:
        node = self.graph.create_node(like.op, target, args[0], args[1], like.name)
        node.meta = {k: v for k, v in like.meta.items() if k != "origins"}
        if slot is not None:
            node.meta["slot"] = scope.slot(slot)
        return node

    def _copy(self, op: TapedOp, node: Node, run: Run, scope: _Scope) -> TapedOp:
        def here(tree: Any) -> Any:
            return map_values(tree, lambda slot: scope.slot(run.slot(slot)), (Slot,))

        parts = here((op.args, op.kwargs, op.outs, op.operands, op.sizes))
        args, kwargs, outs, operands, sizes = parts
        return dataclasses.replace(
            op, args=args, kwargs=kwargs, outs=outs, node=node.name, operands=operands, sizes=sizes, read=None
        )


def compose(given: Decided, pool: Pool, found: Sequence[bool]) -> tuple[Graph, tuple[OutputLeaf, ...]]:
    """The graph, and the tensors of its result; its calls replace those of the pool's tape.

    Args:
        given: the forward and its branches.
        pool: of its runs.
        found: how the branches' decisions went by themselves.

    Raises:
        OtherStructureError: the parts don't fit together.
    """
    composer, scope = _Composer(given, pool, dict(_by_themselves(given, found))), _Scope()
    composer.block(given.usual, 0, len(given.usual.steps), scope)
    pool.tape.ops = composer.ops
    unname_result(composer.graph)
    made = {slot.index for op in composer.ops for slot in op.outs}
    leaves = [(leaf.path, scope.slot(leaf.slot)) for leaf in given.usual.outputs]
    for branch in given.branches.values():  # a result may hold other tensors after the other way
        others = [(leaf.path, scope.slot(branch.other.slot(leaf.slot))) for leaf in branch.other.outputs]
        leaves += [(path, slot) for path, slot in others if slot.index in made]
    return composer.graph, tuple(OutputLeaf(path, slot) for path, slot in dict.fromkeys(leaves))


def _by_themselves(given: Decided, found: Sequence[bool]) -> Iterator[tuple[Step, bool]]:
    """The decisions on the way that the forward took when nothing told it another."""
    outcomes = iter(found)

    def walk(run: Run, start: int, stop: int) -> Iterator[tuple[Step, bool]]:
        while start < stop:
            step = run.steps[start]
            branch = given.branches.get(step)
            start += 1
            if branch is None:
                continue
            outcome = next(outcomes, None)
            if outcome is None:
                raise OtherStructureError("the parts decide more than the forward")
            yield step, outcome
            if outcome is step.node.args[1]:
                yield from walk(run, start, branch.stop)
            else:
                yield from walk(branch.other, start, branch.other_stop)
            start = branch.stop

    yield from walk(given.usual, 0, len(given.usual.steps))


def unname_result(graph: Graph) -> None:
    """The result as it was, if it has the same form after all ways."""
    output = next(iter(reversed(graph.nodes)))
    found: Any = output.args[0]
    if isinstance(found, Node) and found.target is result:
        output.args = found.args
        graph.erase_node(found)


class _Unroll(_Walk):
    """The steps of one combination of outcomes, as plain data."""

    def __init__(self, given: Decided, flipped: Iterable[bool], names: dict[Any, int]) -> None:
        super().__init__(given)
        self.outcomes: list[bool] = []
        self.steps: list[Any] = []
        self.checks: set[Any] = set()
        self._flipped = dict(zip(given.branches, flipped, strict=True))
        self._names = names

    def step(self, step: Step, args: Any, scope: _Scope) -> str:  # noqa: ARG002
        if step.node.meta.get("branches") is False:  # a guard, that only goes one way
            self.outcomes.append(bool(step.node.args[1]))
        self.steps.append((step.node.op, step.node.target, key(step_args(step.node, args))))
        return f"step {len(self.steps)}"

    def expression(self, value: Expression, args: Any, scope: _Scope) -> str:  # noqa: ARG002
        if value.target in (check, check_number):  # whichever line found out
            self.checks.add((value.target, key(args[0][:4])))
        return f"value {self._names.setdefault((value.node.op, value.target, key(args)), len(self._names))}"

    def branch(self, branch: Branch, step: Step, scope: _Scope) -> None:
        flipped = self._flipped[step]
        self.outcomes.append(bool(step.node.args[1]) is not flipped)
        condition = self.value(step.args[0][0], scope)
        self.bind(scope, step, self.step(step, ((condition,), {}), scope))
        inner = _Scope(scope)
        run, stop = (branch.other, branch.other_stop) if flipped else (branch.run, branch.stop)
        self.block(run, branch.start + 1, stop, inner)
        for x, found in [(x, self.arguments(y if flipped else x, inner)) for x, y in branch.handed]:
            self.bind(scope, x, found)


def check_combinations(given: Decided, capture: Capture, pool: Pool) -> None:
    """Captures in which several decisions go otherwise are what the branches put together give.

    Raises:
        OtherStructureError: they are not, so the decisions depend on each other in a way that no branch shows.
    """
    apart = Pool(Tape(), pool.constants, pool.rebuilds, pool.branches)
    for flipped in patterns(len(given.branches)):
        names: dict[Any, int] = {}
        want = _Unroll(given, flipped, names)
        want.block(given.usual, 0, len(given.usual.steps), _Scope())
        run = read(capture(tuple(want.outcomes)), apart, ())
        have = _Unroll(Decided(run, {}), (), names)
        have.block(run, 0, len(run.steps), _Scope())
        if want.steps != have.steps or not have.checks <= want.checks:
            lines = sorted({str(step.node.meta["source"]) for step in given.branches})
            raise OtherStructureError(f"what is decided at {', '.join(lines[:3])} together is more than each decides")
