"""What a rule sees of an operator, and what it may say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chase_fx.graphs.axes import Atom, Axis, AxisName, Cat, Cause, Fixed, Picked, Places, Prod, atoms_of, resolve
from chase_fx.graphs.constants import Constants
from chase_fx.graphs.tape import Slot, TapedOp
from chase_fx.graphs.unification import Axes

__all__ = ["Facts", "LabelledOp", "Labels", "Refusal", "Rule", "Rules", "Tie", "factors_of"]

Labels = tuple[Axis, ...]


@dataclass(frozen=True)
class Refusal:
    """A rule's answer when it can't say what happens to the channels: they are frozen, for this reason."""

    reason: str


@dataclass(frozen=True)
class Tie:
    """Two axes that an operator ties, as they were then: an axis of an activation names the tensor that produced it."""

    a: Axis
    b: Axis
    cause: Cause

    def edges(self) -> list[tuple[AxisName, AxisName]]:
        """Pairs of dims of tensors that this ties; only who looks at the graph needs them."""
        left, right = dict.fromkeys(_owners(self.a)), dict.fromkeys(_owners(self.b))
        if len(left) == len(right):
            pairs = list(zip(left, right, strict=True))
        else:
            pairs = [(x, y) for x in left for y in right]
        return [(x, y) for x, y in pairs if x != y]


def _owners(axis: Axis) -> Iterator[AxisName]:
    # Unresolved on purpose: the root of a group is the same for all of its members.
    if isinstance(axis, Atom):
        yield axis.owner
    elif isinstance(axis, Cat):
        for part in axis.parts:
            yield from _owners(part)
    elif isinstance(axis, Prod):
        for factor in axis.factors:
            yield from _owners(factor)
    elif isinstance(axis, Picked):
        yield from _owners(axis.base)


@dataclass
class Facts:
    """What a rule noted about one operator, for the rewrite and for the masked reference.

    Attributes:
        contracted: (slot, dim) pairs that are summed over: removed units count as zero there.
        reduced: (slot, dim) pairs that are reduced in another way (mean, variance): only kept units are seen.
        produced: output dims of a contraction, from which weights can be told to be producers of channels.
        notes: axes that are no tensor dim but a size argument, such as the groups of a convolution.
    """

    contracted: list[tuple[Slot, int]] = field(default_factory=list)
    reduced: list[tuple[Slot, int]] = field(default_factory=list)
    produced: list[Axis] = field(default_factory=list)
    notes: dict[str, Axis] = field(default_factory=dict)


class LabelledOp:
    """A taped operator together with the labels of its inputs; rules tie, freeze and note through it."""

    def __init__(
        self,
        op: TapedOp,
        axes: Axes,
        labels: Mapping[int, Labels],
        ties: list[Tie],
        facts: Facts,
        *,
        constants: Constants | None = None,
    ) -> None:
        self.op = op
        self.axes = axes
        self.constants = constants
        self.facts = facts
        self.cause = Cause(op.node, str(op.op), op.source)
        self._labels = labels
        self._ties = ties

    def __getitem__(self, slot: Slot) -> Labels:
        """The labels of an input, one axis per dim."""
        return self._labels[slot.index]

    @property
    def name(self) -> str:
        """The operator without its overload, e.g. ``"aten::add"``."""
        return str(self.op.op._schema.name)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Argument ``index`` of the schema, whichever way it was passed."""
        return self.op.arg(index, name, default)

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the schema, for operators whose overloads place it differently."""
        for i, argument in enumerate(self.op.op._schema.arguments):
            if argument.name == name:
                return self.op.arg(i, name, default)
        return default

    @property
    def out(self) -> Slot:
        """The first output."""
        return self.op.outs[0]

    def tie(self, a: Axis, b: Axis) -> None:
        """The two axes keep the same indices."""
        if a is b:
            return
        self._ties.append(Tie(a, b, self.cause))
        self.axes.unify(a, b, self.cause)

    def multiply(self, a: Axis, b: Axis) -> None:
        """The two axes are summed over together. What is no channel meets a weight, so its size is told by that."""
        for fixed, other in ((a, b), (b, a)):
            if isinstance(fixed, Fixed) and isinstance(other, Atom) and not other.weak:
                self.axes.told_by_weights.add(fixed.cause)
        self.tie(a, b)

    def freeze(self, axis: Axis, detail: str) -> None:
        """The axis keeps all of its indices."""
        self.axes.freeze(axis, self._why(detail))

    def fixed(self, size: int, detail: str = "not a channel dim") -> Axis:
        """An axis that keeps all of its indices from the start."""
        return Fixed(size, self._why(detail))

    def fresh(self, size: int, dim: int, *, weak: bool = False) -> Axis:
        """An axis that this operator makes, such as the zeros of a factory or the copies of an expand."""
        axis = self.axes.atom(size, (self.op.node, dim))
        if isinstance(axis, Atom):
            axis.weak = weak
        return axis

    def take(self, axis: Axis, start: int, stop: int) -> Axis:
        """Indices ``start:stop`` of an axis."""
        return self.axes.take(axis, start, stop, self.cause)

    def split(self, axis: Axis, p: int, q: int) -> tuple[Axis, Axis]:
        """The axis as a product of ``p`` and ``q`` indices."""
        return self.axes.split(axis, p, q, self.cause)

    def pick(self, axis: Axis, index: Places) -> Axis:
        """The axis whose index ``i`` is index ``index[i]`` of ``axis``."""
        return self.axes.pick(axis, index, self.cause)

    def told_index(self) -> Places | None:
        """The indices that the call picks, if they are the same in every call and the rewrite can replace them."""
        if self.op.own_sizes or self.constants is None:
            return None
        return self.constants.index(self.op, lambda slot, d: any(atoms_of(self._labels[slot.index][d])))

    def carry(self, axis: Axis) -> None:
        """Prefer the units of this axis where a product leaves a choice (heads)."""
        for atom in atoms_of(axis):
            atom.carrier = True

    def group(self, axis: Axis) -> None:
        """Prefer what else is in a product with this axis, the groups of a convolution."""
        for atom in atoms_of(axis):
            atom.grouping = True

    def at_least_two(self, axis: Axis) -> None:
        """A spread is measured along this axis: of a single unit there is none."""
        self.axes.require(axis, self._why("of a single unit there is no spread"), 2)

    def aligned(self, slot: Slot, dim: int) -> None:
        """The operator takes rows along ``dim`` whose length is a multiple of 16 bytes only."""
        multiple = max(16 // slot.dtype.itemsize, 1)
        self.axes.require(self[slot][dim], self._why(f"its rows have multiples of {multiple} elements"), 1, multiple)

    def contract(self, slot: Slot, dim: int) -> None:
        """Note that ``dim`` of ``slot`` is summed over."""
        self.facts.contracted.append((slot, dim))

    def reduce(self, slot: Slot, dim: int) -> None:
        """Note that ``dim`` of ``slot`` is reduced over kept units."""
        self.facts.reduced.append((slot, dim))

    def produce(self, axis: Axis) -> None:
        """Note that ``axis`` is an output dim of a contraction."""
        self.facts.produced.append(axis)

    def read_from(self) -> list[set[bool] | None]:
        """For each dim of a view: whether the dims that its size was read from are space; None where it is inferred."""
        if len(self.op.sizes) != len(self.out.shape):
            return [None] * len(self.out.shape)
        return [
            None if read is None else {self.is_space(self._labels[slot.index][d]) for slot, d in read.origins}
            for read in self.op.sizes
        ]

    def reads(self, dim: int, axis: Axis) -> bool:
        """Whether the size of dim ``dim`` of a view was computed from that of ``axis``."""
        read = self.op.sizes[dim] if len(self.op.sizes) == len(self.out.shape) else None
        return read is not None and any(self._labels[slot.index][d] is axis for slot, d in read.origins)

    def spaces_read(self, dim: int) -> int:
        """How many dims of space the size of dim ``dim`` of a view was computed from."""
        read = self.op.sizes[dim] if len(self.op.sizes) == len(self.out.shape) else None
        found = [self._labels[slot.index][d] for slot, d in read.origins] if read is not None else []
        return len({id(axis) for axis in found if self.is_space(axis)})

    def is_multiple(self, dim: int, axes: Sequence[Axis]) -> bool:
        """Whether the size of dim ``dim`` of a view is a multiple of the product of ``axes``, whatever goes in."""
        read = self.op.sizes[dim] if len(self.op.sizes) == len(self.out.shape) else None
        sizes = [] if read is None else [self._labels[slot.index][d] for slot, d in read.factors]
        factors = [factor for axis in sizes for factor in factors_of(axis)]
        for axis in (factor for given in axes for factor in factors_of(given)):
            found = next((k for k, factor in enumerate(factors) if factor is axis), None)
            if found is None:
                return False
            del factors[found]
        return True

    def is_space(self, axis: Axis) -> bool:
        """Whether an axis never was one of channels: batch, space, sequence. One that was frozen since does not count.

        Nor does a dim of an input that a weight is multiplied with: its size is that of the weight.
        """
        axis = resolve(axis)
        if isinstance(axis, Fixed):
            told = axis.frozen or axis.cause.op == "size 1" or axis.cause.detail in _TOLD_BY_CODE
            return not told and axis.cause not in self.axes.told_by_weights
        parts = axis.parts if isinstance(axis, Cat) else axis.factors if isinstance(axis, Prod) else ()
        return bool(parts) and all(map(self.is_space, parts))

    def all_fixed(self, detail: str) -> list[Labels]:
        """Freeze everything that goes in; everything that comes out is fixed."""
        for slot in self.op.inputs():
            for axis in self[slot]:
                self.freeze(axis, detail)
        return [tuple(self.fixed(n, detail) for n in out.shape) for out in self.op.outs]

    def _why(self, detail: str) -> Cause:
        return Cause(self.cause.node, self.cause.op, self.cause.source, detail)


def factors_of(axis: Axis) -> Iterator[Axis]:
    """The factors of an axis as views made them: in its normal form those of space would be one."""
    if isinstance(axis, Atom):
        axis = resolve(axis)
    if isinstance(axis, Prod):
        for factor in axis.factors:
            yield from factors_of(factor)
    else:
        yield axis


# Details of axes that are no channels and whose size the code tells, whatever goes in.
TOLD = "size 1, whatever goes in"
_TOLD_BY_CODE = frozenset({TOLD, "stacked", "a window", "pixels", "real and imaginary", "kernel size"})


Rule = Callable[[LabelledOp], "Labels | Sequence[Labels] | Refusal"]


@dataclass(frozen=True)
class Rules:
    """A table from ATen operators to rules; extended by value.

    Example:
        >>> import torch
        >>> from chase_fx.graphs.rules import DEFAULT_RULES
        >>> from chase_fx.graphs.rules.pointwise import broadcast
        >>> mine = DEFAULT_RULES.extend({torch.ops.aten.frac: broadcast})
    """

    table: Mapping[Any, Rule]

    def extend(self, more: Mapping[Any, Rule]) -> Rules:
        """A new table with ``more`` on top; keys are operators (``torch.ops.aten.cat``), their names or overloads."""
        return Rules({**self.table, **more})

    def find(self, op: torch._ops.OpOverload) -> Rule | None:
        """The rule of an operator: by overload, by operator, and for in-place and ``out=`` forms by their pure form."""
        table = self.table
        found = table.get(op) or table.get(op.overloadpacket) or table.get(op._schema.name)
        if found is not None:
            return found
        namespace, _, name = op._schema.name.partition("::")
        tags = set(op.tags)
        if name.endswith("_"):
            pure = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
            found = table.get(pure) if pure is not None else None
            same = getattr(pure, op._overloadname, None)  # torch leaves the tag out of some in-place forms
            tags |= set(same.tags) if same is not None else set()
        if found is None and torch.Tag.pointwise in tags:
            found = table.get(torch.Tag.pointwise)
        return found
