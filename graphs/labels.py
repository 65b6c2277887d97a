"""Labels: abstract interpretation of the tapes.

Parameters start with a fresh axis per dim; each operator's rule ties, refines or freezes axes and labels its outputs.
Train and eval captures share the axes of the parameters, so one solution serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chase_fx.errors import UnsupportedOpError
from chase_fx.graphs.axes import Atom, Axis, Cause, Fixed, Prod, atoms_of, resolve
from chase_fx.graphs.constants import Constants
from chase_fx.graphs.rules.base import Facts, LabelledOp, Labels, Refusal, Rules, Tie
from chase_fx.graphs.rules.normaliser import DECISIVE, decisive
from chase_fx.graphs.rules.recurrent import projections
from chase_fx.graphs.tape import Slot, TapedOp
from chase_fx.graphs.traced import Capture, TraceInfo
from chase_fx.graphs.unification import Axes
from chase_fx.graphs.vanishing import freeze_what_stays

__all__ = ["Labelling", "Unknown", "propagate"]


@dataclass(frozen=True)
class Unknown:
    """An operator whose channels were frozen because no rule could say more."""

    op: str
    node: str
    source: str
    reason: str


@dataclass
class Labelling:
    """What is known of every axis of one traced module.

    Attributes:
        state: axes of parameters, buffers and constants by name.
        slots: per capture, the labels of every tensor by slot index.
        facts: per capture, what the rule of each taped operator noted, by position on the tape.
        told: digests of the tensors whose values decide which channels are coupled, by name.
    """

    axes: Axes
    state: dict[str, Labels]
    slots: list[dict[int, Labels]] = field(default_factory=list)
    facts: list[dict[int, Facts]] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    producers: set[tuple[str, int]] = field(default_factory=set)
    told: dict[str, str] = field(default_factory=dict)


def propagate(
    info: TraceInfo,
    rules: Rules,
    frozen_outputs: Iterable[str],
    constants: Sequence[Constants],
    *,
    raise_on_unknown: bool,
) -> Labelling:
    """Label every tensor of every capture, freeze what has to stay, and settle the rest; ``constants`` are theirs."""
    axes = Axes()
    state = {
        name: tuple(axes.atom(n, (name, d)) for d, n in enumerate(shape))
        for name, shape in info.structure.items()
        if info.aliases.get(name, name) == name
    }
    for alias, name in info.aliases.items():
        state[alias] = state[name]
    labelling = Labelling(axes, state)
    used: set[str] = set()
    for capture, told in zip(info.captures, constants, strict=True):
        propagation = _Propagation(labelling, capture, rules, raise_on_unknown, told)
        propagation.run()
        used |= propagation.used
        labelling.told.update(told.read)
    keep = set(frozen_outputs)
    for capture, labels in zip(info.captures, labelling.slots, strict=True):
        for leaf in capture.outputs:
            if leaf.path in keep:
                cause = Cause("output", "output", "", f"output '{leaf.path}' keeps its shape")
                for axis in labels[leaf.slot.index]:
                    axes.freeze(axis, cause)
    for capture, labels, facts in zip(info.captures, labelling.slots, labelling.facts, strict=True):
        weights = [slot.index for slot in capture.tape.slots if slot.kind == "parameter"]
        freeze_what_stays(axes, capture.tape.ops, labels, facts, weights)
    _settle(labelling, used, info.aliases)
    return labelling


@dataclass
class _Propagation:
    """Labels flow through one capture."""

    labelling: Labelling
    capture: Capture
    rules: Rules
    raise_on_unknown: bool
    constants: Constants
    labels: dict[int, Labels] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    measured: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Label every tensor that the outputs depend on."""
        self._start()
        live, self.measured = _live_ops(self.capture), _measured_ops(self.capture)
        for position, op in enumerate(self.capture.tape.ops):
            if position not in live:
                continue
            for slot in op.inputs():
                self._read(slot, op)
            facts = self.facts[position] = Facts()
            measured = position in self.measured and not op.whole
            if measured and self._measure(op):
                continue
            self._apply(op, facts, decides=measured and op.op in DECISIVE)
            self.labelling.producers.update(axis.owner for axis in facts.produced if isinstance(axis, Atom))
        for leaf in self.capture.outputs:
            self._read(leaf.slot, None)
        for op, slot in projections(self.capture.tape.ops):
            if slot.index in self.labels:
                cause = Cause(op.node, "lstm", op.source, f"has to stay wider than its projection '{slot.name}'")
                self.labelling.axes.require(self.labels[slot.index][1], cause, slot.shape[0] + 1)
        self.labelling.slots.append(self.labels)
        self.labelling.facts.append(self.facts)

    def _start(self) -> None:
        for slot in self.capture.tape.slots:
            if slot.kind in ("parameter", "buffer", "constant") and slot.name is not None:
                self.labels[slot.index] = self.labelling.state[slot.name]
            elif slot.kind == "input":
                self.labels[slot.index] = tuple(
                    Fixed(n, Cause(str(slot.name), "input", "", f"dim {d} of input '{slot.name}'"))
                    for d, n in enumerate(slot.shape)
                )

    def _read(self, slot: Slot, op: TapedOp | None) -> None:
        if slot.index not in self.labels:
            self.labels[slot.index] = _unseen(slot, op)
        if slot.name is not None:
            self.used.add(slot.name)

    def _measure(self, op: TapedOp) -> bool:
        """An unknown call of which only the shape is read needs no rule if that is the shape of what went in."""
        first = next(op.inputs(), None)
        if first is None or self.rules.find(op.op) is not None or any(out.shape != first.shape for out in op.outs):
            return False
        for out in op.outs:
            self.labels.setdefault(out.index, self.labels[first.index])
        return True

    def _apply(self, op: TapedOp, facts: Facts, *, decides: bool) -> None:
        view = LabelledOp(op, self.labelling.axes, self.labels, self.labelling.ties, facts, constants=self.constants)
        for slot, given in zip(op.outs, [decisive(view)] if decides else self._answer(view), strict=False):
            label = given
            if tuple(axis.size for axis in given) != slot.shape:
                self._refuse(view, f"the rule gave sizes {[a.size for a in given]} for {slot.shape}")
                label = _unseen(slot, op)
            before = self.labels.get(slot.index)
            if before is None:
                self.labels[slot.index] = label
            else:  # written in place: what was there and what is written have the same axes
                for a, b in zip(before, label, strict=True):
                    view.tie(a, b)

    def _answer(self, view: LabelledOp) -> Sequence[Labels]:
        """What the operator's rule says of each output."""
        if view.op.whole:
            return view.all_fixed(view.op.whole)
        rule = self.rules.find(view.op.op)
        if rule is None:
            return self._refuse(view, "no channel rule")
        try:
            answer = rule(view)
        except (AssertionError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
            # A rule that met arguments it did not expect has proven nothing; freezing is always right.
            answer = Refusal(f"the rule could not be applied ({type(e).__name__}: {e})")
        if isinstance(answer, Refusal):
            return self._refuse(view, answer.reason)
        given: Any = answer
        if (given and isinstance(given[0], Axis)) or (len(view.op.outs) == 1 and given == ()):
            given = [given]  # the labels of the only output
        found: list[Labels] = list(given)
        if view.op.own_sizes:
            _freeze_what_is_cut(view, found)
        return found

    def _refuse(self, view: LabelledOp, reason: str) -> list[Labels]:
        op = view.op
        if not any(atoms_of(axis) for slot in op.inputs() for axis in view[slot]):
            return view.all_fixed(reason)  # no channel is lost by it
        shapes = ", ".join(str(s.shape) for s in op.inputs())
        if self.raise_on_unknown:
            raise UnsupportedOpError(
                f"{reason} for {view.name} at node '{op.node}' (inputs {shapes}; {op.source or 'unknown line'}). "
                "Add a rule with DEFAULT_RULES.extend(...), or pass on_unknown='freeze' to leave its channels unpruned."
            )
        self.labelling.unknown.append(Unknown(view.name, op.node, op.source, reason))
        return view.all_fixed(reason)


def _freeze_what_is_cut(view: LabelledOp, outs: Sequence[Labels]) -> None:
    """Inside an autograd function no size is replaced: what is torn into factors or pieces keeps all of its indices."""
    for axis in [axis for slot in view.op.inputs() for axis in view[slot]]:
        atoms = set(atoms_of(axis))
        found = [atoms & set(atoms_of(out)) for labels in outs for out in labels]
        if any(part and part != atoms for part in found):
            view.freeze(axis, "cut inside an autograd function, whose sizes can't be replaced")
    for axis in view.facts.notes.values():
        view.freeze(axis, "a number inside an autograd function, which can't be replaced")


def _unseen(slot: Slot, op: TapedOp | None) -> Labels:
    cause = Cause(op.node if op else "output", str(op.op) if op else "output", "", "a tensor of unknown origin")
    return tuple(Fixed(n, cause) for n in slot.shape)


def _live_ops(capture: Capture) -> set[int]:
    """Positions of the calls that the graph still makes; code that only led to dead ends is not among them."""
    ops = enumerate(capture.tape.ops)
    return {position for position, op in ops if op.node in capture.nodes and (op.outs or op.op._schema.is_mutable)}


def _measured_ops(capture: Capture) -> set[int]:
    """Positions of the calls that no output's value depends on: their results are measured, or a guard compares them.

    Where a decision is made anew at each call, outputs depend on what it is made by.
    """
    slots = {leaf.slot.index for leaf in capture.outputs} | {slot.index for slot in capture.conditions}
    storages = {leaf.slot.storage for leaf in capture.outputs}
    storages.update(slot.storage for slot in capture.tape.slots if slot.kind == "buffer")  # those outlive the forward
    measured: set[int] = set()
    for position in range(len(capture.tape.ops) - 1, -1, -1):
        op = capture.tape.ops[position]
        writes = op.op._schema.is_mutable and any(s.storage in storages for s in op.inputs())
        if not writes and not any(s.index in slots for s in op.outs):
            measured.add(position)
            continue
        for slot in op.inputs():
            slots.add(slot.index)
            storages.add(slot.storage)
    return measured


def _settle(labelling: Labelling, used: set[str], aliases: Mapping[str, str]) -> None:
    """Freeze what nothing reads: unused tensors, unread slices, and products of an axis with itself."""
    axes = labelling.axes
    for name, labels in labelling.state.items():
        if aliases.get(name, name) not in used:
            for axis in labels:
                axes.freeze(axis, Cause("", "unused", "", "not used by the forward"))
    contracted = {
        id(atom)
        for facts, labels in zip(labelling.facts, labelling.slots, strict=True)
        for fact in facts.values()
        for slot, dim in fact.contracted
        for atom in atoms_of(labels[slot.index][dim])
    }
    for name, labels in labelling.state.items():
        for axis in labels:
            for atom in atoms_of(axis):
                if id(atom) not in contracted:
                    axes.freeze(atom, Cause("", "unread", "", f"no layer computes with these indices of '{name}'"))
    for labels in labelling.state.values():
        for axis in labels:
            _freeze_squares(axes, axis)


def _freeze_squares(axes: Axes, axis: Axis) -> None:
    axis = resolve(axis)
    if isinstance(axis, Prod):
        seen: set[int] = set()
        for factor in axis.factors:
            for atom in {id(a): a for a in atoms_of(factor)}.values():
                if id(atom) in seen:
                    axes.freeze(atom, Cause("", "product", "", "an axis times itself"))
                seen.add(id(atom))
