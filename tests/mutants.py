"""Ways to break any rule: it forgets to tie, to freeze, to note what it sums over, or takes the wrong order.

A mutant calls the right rule with a view of the operator on which one thing does not work, or spoils its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from chase_fx.graphs.axes import Axis, Cat, Fixed, Places, Prod, atoms_of, resolve
from chase_fx.graphs.rules.base import LabelledOp, Refusal, Rule

__all__ = ["MUTATORS", "Mutator"]

# A mutator makes a wrong rule of a right one; the wrong rule calls ``used`` where it does something else.
Mutator = Callable[[Rule, Callable[[], None]], Rule]


class _View(LabelledOp):
    """An operator of which some methods do something else."""

    def __init__(self, op: LabelledOp, used: Callable[[], None]) -> None:
        self.__dict__.update(op.__dict__)
        self.used = used


class _NothingTied(_View):
    def tie(self, a: Axis, b: Axis) -> None:
        if resolve(a) is not resolve(b) and not (_fixed(a) and _fixed(b)):
            self.used()


class _NothingFrozen(_View):
    def freeze(self, axis: Axis, detail: str) -> None:
        if not _fixed(axis):
            self.used()

    def all_fixed(self, detail: str) -> list[Any]:
        super().all_fixed(detail)
        return [tuple(self.fixed(n, detail) for n in out.shape) for out in self.op.outs]


class _OneIsEnough(_View):
    def at_least_two(self, axis: Axis) -> None:
        if not _fixed(axis):
            self.used()


class _OtherEnd(_View):
    def take(self, axis: Axis, start: int, stop: int) -> Axis:
        if not _fixed(axis) and start != axis.size - stop:
            self.used()
            start, stop = axis.size - stop, axis.size - start
        return super().take(axis, start, stop)


class _OtherFactor(_View):
    def split(self, axis: Axis, p: int, q: int) -> tuple[Axis, Axis]:
        if _fixed(axis) or 1 in (p, q):
            return super().split(axis, p, q)
        self.used()
        inner, outer = super().split(axis, q, p)
        return outer, inner


class _OtherPlaces(_View):
    def pick(self, axis: Axis, index: Places) -> Axis:
        if not _fixed(axis) and len(index) > 1:
            self.used()
            index = np.roll(index, 1)
        return super().pick(axis, index)


def _fixed(axis: Axis) -> bool:
    return isinstance(resolve(axis), Fixed)


def _through(view: type[_View]) -> Mutator:
    def mutate(rule: Rule, used: Callable[[], None]) -> Rule:
        return lambda op: rule(view(op, used))

    return mutate


def _forgets(fact: str) -> Mutator:
    """Nothing is noted of what the operator sums over, or reduces."""

    def mutate(rule: Rule, used: Callable[[], None]) -> Rule:
        def wrong(op: LabelledOp) -> Any:
            answer = rule(op)
            noted = getattr(op.facts, fact)
            if any(not _fixed(op[slot][dim]) for slot, dim in noted):
                used()
            noted.clear()
            return answer

        return wrong

    return mutate


def _spoils(spoil: Callable[[LabelledOp, Axis, int], Axis]) -> Mutator:
    """Every axis of the answer becomes another one."""

    def mutate(rule: Rule, used: Callable[[], None]) -> Rule:
        def wrong(op: LabelledOp) -> Any:
            answer = rule(op)
            if isinstance(answer, Refusal):
                return answer
            single = bool(answer) and isinstance(answer[0], Axis)
            outs = [answer] if single or answer == () else answer
            spoiled = [tuple(spoil(op, axis, d) for d, axis in enumerate(labels)) for labels in outs]
            if any(a is not b for old, new in zip(outs, spoiled, strict=True) for a, b in zip(old, new, strict=True)):
                used()
            return spoiled

        return wrong

    return mutate


def _unrelated(op: LabelledOp, axis: Axis, dim: int) -> Axis:
    return axis if _fixed(axis) or axis.size == 1 else op.fresh(axis.size, dim)


def _loose(op: LabelledOp, axis: Axis, dim: int) -> Axis:
    return op.fresh(axis.size, dim) if _fixed(axis) and axis.size > 1 else axis


def _reversed(op: LabelledOp, axis: Axis, dim: int) -> Axis:
    if not any(True for _ in atoms_of(axis)):
        return axis
    if isinstance(axis, Cat) and len(axis.parts) > 1:
        return Cat(reversed(axis.parts))
    if isinstance(axis, Prod) and len(axis.factors) > 1:
        return Prod(tuple(reversed(axis.factors)))
    return axis


MUTATORS: Mapping[str, Mutator] = {
    "nothing tied": _through(_NothingTied),
    "nothing frozen": _through(_NothingFrozen),
    "one is enough": _through(_OneIsEnough),
    "other end": _through(_OtherEnd),
    "other factor": _through(_OtherFactor),
    "other places": _through(_OtherPlaces),
    "not contracted": _forgets("contracted"),
    "not reduced": _forgets("reduced"),
    "unrelated result": _spoils(_unrelated),
    "loose result": _spoils(_loose),
    "reversed result": _spoils(_reversed),
}
