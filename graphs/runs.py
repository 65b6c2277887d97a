"""Recorded forwards in a form in which two of them can be compared.

A forward is a list of *steps*: the nodes that have to run in their place. Everything else that a graph holds (sizes,
arithmetic of numbers, parameters, elements of tuples) is an *expression* of steps; equal ones are the same object,
also those of different runs. Guards are expressions too: where they stand does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from chase_fx.graphs.autocast import AUTOCAST, region_settings
from chase_fx.graphs.branches import result
from chase_fx.graphs.changed import PUTS
from chase_fx.graphs.draws import DRAWS
from chase_fx.graphs.guards import GUARDS, check, check_data, check_number
from chase_fx.graphs.opaque import alike
from chase_fx.graphs.outcomes import Decision
from chase_fx.graphs.recorder import Recorder
from chase_fx.graphs.tape import Slot, Tape

__all__ = [
    "Expression",
    "OtherStructureError",
    "Pool",
    "Run",
    "Step",
    "Value",
    "branches",
    "key",
    "leaves_of",
    "like",
    "map_values",
    "read",
    "step_args",
]

_READS = frozenset({"item", "tolist"})


class OtherStructureError(Exception):
    """Two ways of a forward differ in more than one graph can hold.

    Attributes:
        line: of the decision between them, if it is one decision.
    """

    def __init__(self, reason: str, line: str = "") -> None:
        super().__init__(reason)
        self.line = line


@dataclass(eq=False)
class Step:
    """A node that has to run in its place, with arguments in which values stand for nodes."""

    node: Node
    run: Run
    args: Any

    @property
    def slot(self) -> Slot | None:
        """The tensor that it gives."""
        found = self.node.meta.get("slot")
        return None if found is None else self.run.slot(found)


@dataclass(eq=False)
class Expression:
    """A value that is the same wherever it is computed."""

    node: Node
    target: Any
    args: Any
    slot: Slot | None


Value = Step | Expression


def map_values(tree: Any, fn: Callable[[Any], Any], kinds: tuple[type, ...] = (Step, Expression)) -> Any:
    """An argument with every value, or whatever is of one of ``kinds``, replaced."""
    if isinstance(tree, kinds):
        return fn(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_values(v, fn, kinds) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_values(v, fn, kinds) for v in tree)
    if isinstance(tree, dict):
        return {k: map_values(v, fn, kinds) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_values(v, fn, kinds) for v in (tree.start, tree.stop, tree.step)))
    return tree


def leaves_of(value: Any) -> set[Value]:
    """The values that an argument depends on, itself included if it is one."""
    found: set[Value] = set()

    def visit(part: Any) -> None:
        if part not in found:
            found.add(part)
            if isinstance(part, Expression):
                map_values(part.args, visit)

    map_values(value, visit)
    return found


def key(tree: Any, name: Callable[[Value], Any] = id) -> Any:
    """What tells two arguments apart; ``name`` tells two values apart."""
    if isinstance(tree, (Step, Expression)):
        return "value", name(tree)
    if isinstance(tree, (tuple, list)):
        return (type(tree), *(key(v, name) for v in tree))
    if isinstance(tree, dict):
        return (dict, *((k, key(v, name)) for k, v in tree.items()))
    if isinstance(tree, slice):
        return (slice, key(tree.start, name), key(tree.stop, name), key(tree.step, name))
    if isinstance(tree, float):
        return float, tree.hex()
    try:
        hash(tree)
    except TypeError:
        return type(tree), id(tree)
    return type(tree), tree


@dataclass
class Pool:
    """What the runs of one model share: expressions, constants, templates of results, and the tape that grows.

    Attributes:
        constants: tensors by the name that they have in the end.
        rebuilds: templates likewise.
        branches: whether a decision has both ways in the graph; else it is a guard, with one outcome.
    """

    tape: Tape
    constants: dict[str, torch.Tensor]
    rebuilds: dict[str, Any]
    branches: Callable[[Decision], bool]
    expressions: dict[Any, Expression] = field(default_factory=dict)
    storages: int = 0

    def constant(self, tensor: torch.Tensor) -> str:
        """The name of a constant, the same for equal ones."""
        for name, known in self.constants.items():
            same = known is tensor or (known.dtype == tensor.dtype and known.device == tensor.device)
            if same and torch.equal(known, tensor):
                return name
        name = f"_chase_constant_{len(self.constants)}"
        self.constants[name] = tensor
        return name

    def rebuild(self, found: Any) -> str:
        """The name of a template, the same for those that build the same object."""
        for name, known in self.rebuilds.items():
            if known is found or alike(known.template, found.template):
                return name
        name = f"_chase_rebuild_{len(self.rebuilds)}"
        self.rebuilds[name] = found
        return name

    def storage(self) -> int:
        """A name for memory that no run has."""
        self.storages -= 1
        return self.storages


class Run:
    """One recorded forward.

    Attributes:
        decisions: positions of the steps at which something was decided.
        guards: what it took for granted.
        outputs: the tensors of its result.
    """

    def __init__(self, recorder: Recorder, pool: Pool, *, first: bool) -> None:
        self.tape = recorder.tape
        self.outcomes = tuple(decision.outcome for decision in recorder.decisions)
        self.steps: list[Step] = []
        self.decisions: list[int] = []
        self.guards: list[Expression] = []
        self.outputs = recorder.outputs
        self._pool = pool
        self._first = first
        self._slots: dict[int, Slot] = {}
        self._storages: dict[int, int] = {}
        if not first:
            known = {(s.kind, s.name): s for s in pool.tape.slots if s.kind != "value"}
            self._names = {n: pool.constant(t) for n, t in recorder.arguments.constants.items()}
            for slot in self.tape.slots:
                name = self._names.get(str(slot.name), slot.name)
                if slot.kind != "value" and (slot.kind, name) in known:
                    self.same_slot(slot, known[slot.kind, name])
        else:
            self._names = {n: n for n in recorder.arguments.constants}
        self._templates = {n: pool.rebuild(r) for n, r in recorder.arguments.rebuilds.items()}

    def target(self, node: Node) -> Any:
        """The target of ``node``, under the names that all runs share."""
        names = self._names if node.op == "get_attr" else self._templates if node.op == "call_module" else {}
        return names.get(str(node.target), node.target)

    def same_slot(self, own: Slot, shared: Slot) -> None:
        """A tensor of this run is one of an earlier one."""
        if not self._first:
            self._slots[own.index] = shared
            self._storages.setdefault(own.storage, shared.storage)

    def slot(self, own: Slot) -> Slot:
        """The tensor as all runs know it; a new one joins them."""
        if self._first:
            return own
        if own.index not in self._slots:
            if own.storage not in self._storages:
                self._storages[own.storage] = self._pool.storage()
            tape = self._pool.tape
            name = self._names.get(str(own.name), own.name)
            kind, storage = own.kind, self._storages[own.storage]
            new = Slot(len(tape.slots), own.shape, own.dtype, kind, name, storage, own.stride)
            tape.slots.append(new)
            self._slots[own.index] = new
        return self._slots[own.index]


def read(recorder: Recorder, pool: Pool, known: Sequence[Step] | None = None) -> Run:
    """The run that was recorded; its first steps are ``known``, those of an earlier run.

    Raises:
        OtherStructureError: they are others.
    """
    run = Run(recorder, pool, first=known is None)
    _name_result(recorder.graph)
    for decision in recorder.decisions:
        decision.node.meta["branches"] = pool.branches(decision)
    values: dict[Node, Value] = {}
    for node in recorder.graph.nodes:
        args = map_values((node.args, node.kwargs), values.__getitem__, (Node,))
        if _in_place(node):
            position = len(run.steps)
            if position < len(known or ()):
                step = _same(run, (known or ())[position], node, args)
            else:
                step = Step(node, run, args)
            if "branches" in node.meta:
                run.decisions.append(position)
            run.steps.append(step)
            values[node] = step
            continue
        values[node] = found = _expression(run, pool, node, args)
        if node.target in GUARDS:
            run.guards.append(found)
    return run


def _name_result(graph: Graph) -> None:
    """Make the result a value, for it may be one thing after one way and another after the other."""
    output = next(iter(reversed(graph.nodes)))
    if isinstance(output.args[0], Node) and output.args[0].target is result:
        return
    with graph.inserting_before(output):
        output.args = (graph.call_function(result, output.args),)


def _in_place(node: Node) -> bool:
    return (
        node.op in ("placeholder", "output")
        or "tape" in node.meta
        or node.target in DRAWS
        or node.target in AUTOCAST
        or node.target in PUTS
        or node.target is region_settings
        or node.target is check_data  # what it reads may be written to later
        or (node.op == "call_method" and node.target in _READS)
    )


def _expression(run: Run, pool: Pool, node: Node, args: Any) -> Expression:
    target = run.target(node)
    told = args
    if target in (check, check_number):  # whichever line found out
        told = args[0][:4]
    name = node.op, target, key(told)
    slot = node.meta.get("slot")
    found = pool.expressions.get(name)
    if found is None:
        shared = None if slot is None else run.slot(slot)
        found = pool.expressions[name] = Expression(node, target, args, shared)
    elif slot is not None and found.slot is not None:
        run.same_slot(slot, found.slot)
    return found


def _same(run: Run, known: Step, node: Node, args: Any) -> Step:
    """The known step, which ``node`` repeats."""
    if not like(known.node, node) or key(step_args(known.node, known.args)) != key(step_args(node, args)):
        raise OtherStructureError(f"the forward differs before a draw decides, at {node.meta.get('source')}")
    before, after = known.run.tape.ops, run.tape.ops
    (a, b), (c, d) = known.node.meta.get("tape", (0, 0)), node.meta.get("tape", (0, 0))
    for old, new in zip(before[a:b], after[c:d], strict=False):
        for first, second in zip(old.outs, new.outs, strict=False):
            run.same_slot(second, known.run.slot(first))
    slot = node.meta.get("slot")
    if slot is not None and known.slot is not None:
        run.same_slot(slot, known.slot)
    return known


def step_args(node: Node, args: Any) -> Any:
    """The arguments that make two steps equal; the outcome of a decision with two ways is none."""
    return args[0][:1] if branches(node) else args


def branches(node: Node) -> bool:
    """Whether both ways of what ``node`` decides are to be in the graph."""
    return bool(node.meta.get("branches"))


def like(a: Node, b: Node) -> bool:
    """Whether two steps do the same, with whatever arguments."""
    return a.op == b.op and a.target == b.target
