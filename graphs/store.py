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
        if atom.required is not None:
            self.require(axis, atom.required, atom.least, atom.multiple)

    def require(self, axis: Axis, cause: Cause, least: int = 1, multiple: int = 1) -> None:
        """At least ``least`` indices of ``axis`` stay, and a multiple of ``multiple`` of them; all, if it has no more.

        The largest piece sees to it where one index of each is too few; every part of a concatenation and one factor
        of a product sees to the multiple.
        """
        axis = resolve(axis)
        if isinstance(axis, Atom):
            axis.least = max(axis.least, min(least, axis.size))
            axis.multiple = math.lcm(axis.multiple, multiple)
            axis.required = axis.required or cause
            if max(axis.least, axis.multiple) >= axis.size:
                self.freeze(axis, cause)
        elif isinstance(axis, Picked):
            self.require(axis.base, cause, least, multiple)
        elif isinstance(axis, Prod):
            self.require(max(axis.factors, key=lambda f: (f.size % multiple == 0, f.size)), cause, least, multiple)
        elif isinstance(axis, Cat):
            largest = max(axis.parts, key=lambda p: p.size)
            for part in axis.parts:
                self.require(part, cause, max(least - len(axis.parts) + 1, 1) if part is largest else 1, multiple)

    def _give_up(self, axes: Sequence[Axis], cause: Cause, detail: str) -> None:
        reason = Cause(cause.node, cause.op, cause.source, detail)
        for axis in axes:
            self.freeze(axis, reason)

    def _piece(self, atom: Atom, size: int, cause: Cause) -> Axis:
        if size == 1:
            return Fixed(1, Cause(cause.node, cause.op, cause.source, "a slice of length 1 can't be empty"))
        piece = self.atom(size, atom.owner)
        if isinstance(piece, Atom):
            piece.carrier, piece.grouping, piece.weak = atom.carrier, atom.grouping, atom.weak
        return piece
