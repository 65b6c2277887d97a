"""A store of atoms: new ones, what is frozen, what an atom was found to equal, how many of its units have to stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

from chase_fx.graphs.axes import Atom, Axis, AxisName, Cat, Cause, Fixed, Picked, Prod, atoms_of, bind, resolve

__all__ = ["TRIVIAL", "Store"]

TRIVIAL = Cause("", "size 1")


class Store:
    """Atoms and what is known of each."""

    def __init__(self) -> None:
        self._serial = 0
        self.told_by_weights: set[Cause] = set()  # why dims of inputs are fixed that a weight is multiplied with

    def atom(self, size: int, owner: AxisName) -> Axis:
        """A fresh axis of ``size`` free units. A single unit can never go, since its dim would be empty: fixed."""
        if size <= 1:
            return Fixed(size, TRIVIAL)
        self._serial += 1
        return Atom(size, owner, self._serial)

    def freeze(self, axis: Axis, cause: Cause) -> None:
        """Keep every index of ``axis``, and so of all that is or will be equated with it."""
        self._fix(axis, Fixed(axis.size, cause))

    def _fix(self, axis: Axis, found: Fixed) -> None:
        """``axis`` stays like ``found``, which may be space; then what the forward makes to match it is, too."""
        for atom in atoms_of(axis):
            if atom.ref is None:
                bind(atom, Fixed(atom.size, found.cause, frozen=found.frozen or not atom.weak))

    def _bind(self, atom: Atom, axis: Axis) -> None:
        bind(atom, axis)
        if atom.grouping:
            for piece in atoms_of(axis):
                piece.grouping = True
        if atom.required is not None:
            self.require(axis, atom.required, atom.least, atom.multiple)

    def require(self, axis: Axis, cause: Cause, least: int = 1, multiple: int = 1) -> None:
        """At least ``least`` indices of ``axis`` stay, and a multiple of ``multiple`` of them; all, if it has no more.

        Of a concatenation the largest parts see to it where one index of each is too few, and every part to the
        multiple: one that is none itself stays whole. Of a product those factors do that can for all, else each for
        what it has.
        """
        axis = resolve(axis)
        if isinstance(axis, Atom):
            axis.least = max(axis.least, min(least, axis.size))
            axis.multiple = math.lcm(axis.multiple, multiple)
            axis.required = axis.required or cause
            if max(axis.least, axis.multiple) >= axis.size or axis.size % axis.multiple:
                self.freeze(axis, cause)
        elif isinstance(axis, Picked):
            self.require(axis.base, cause, least, multiple)
        elif isinstance(axis, Prod):
            for f in sorted(axis.factors, key=lambda f: (isinstance(f, Fixed), f.size % multiple == 0, f.size))[::-1]:
                stay, shared = min(least, f.size), math.gcd(f.size, multiple)
                self.require(f, cause, stay, shared)
                least, multiple = math.ceil(least / stay), multiple // shared
        elif isinstance(axis, Cat):
            short = least - sum(part.size if isinstance(part, Fixed) else 1 for part in axis.parts)
            for part in sorted(axis.parts, key=lambda p: -p.size):
                more = 0 if isinstance(part, Fixed) else max(min(short, part.size - 1), 0)
                self.require(part, cause, 1 + more, multiple)
                short -= more

    def _give_up(self, axes: Sequence[Axis], cause: Cause, detail: str) -> None:
        reason = Cause(cause.node, cause.op, cause.source, detail)
        for axis in axes:
            self.freeze(axis, reason)

    def _piece(self, atom: Atom, size: int, cause: Cause) -> Axis:
        if size == 1:
            why = Cause(cause.node, cause.op, cause.source, "a slice of length 1 can't be empty")
            return Fixed(1, why, frozen=not atom.weak)
        piece = self.atom(size, atom.owner)
        if isinstance(piece, Atom):
            piece.carrier, piece.weak = atom.carrier, atom.weak
        return piece
