"""Equating axes: first-order unification over the terms of :mod:`chase_fx.graphs.axes`, and the cuts it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from chase_fx.graphs.axes import Atom, Axis, AxisName, Cat, Cause, Fixed, Prod, atoms_of, bind, resolve

__all__ = ["Axes"]

# A misaligned cut of a product repeats its rows explicitly; past this many rows the axis is frozen instead.
_MAX_ROWS = 1024

_TRIVIAL = Cause("", "size 1")


class Axes:
    """A store of atoms with the three operations that rules use: ``unify``, ``take`` and ``split``."""

    def __init__(self) -> None:
        self._serial = 0
        self.told_by_weights: set[Cause] = set()  # why dims of inputs are fixed that a weight is multiplied with

    def atom(self, size: int, owner: AxisName) -> Axis:
        """A fresh axis of ``size`` free units. A single unit can never go, since its dim would be empty: fixed."""
        if size <= 1:
            return Fixed(size, _TRIVIAL)
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

    def unify(self, a: Axis, b: Axis, cause: Cause) -> None:
        """From now on index ``i`` of ``a`` is kept iff index ``i`` of ``b`` is. Sizes must agree."""
        if a is b:
            return
        a, b = resolve(a), resolve(b)
        if a is b:
            return
        if a.size != b.size:
            raise AssertionError(f"axes of {a.size} and {b.size} indices can't be equated: {a!r}, {b!r} by {cause}")
        if isinstance(a, Fixed):
            self._fix(b, a)
        elif isinstance(b, Fixed):
            self._fix(a, b)
        elif isinstance(a, Atom) and isinstance(b, Atom):
            old, new = (a, b) if a.serial < b.serial else (b, a)
            old.carrier = old.carrier or new.carrier
            old.weak = old.weak and new.weak
            old.least = max(old.least, new.least)
            old.multiple = math.lcm(old.multiple, new.multiple)
            bind(new, old)
        elif isinstance(a, Atom):
            self._bind(a, b)
        elif isinstance(b, Atom):
            self._bind(b, a)
        elif isinstance(a, Cat) and isinstance(b, Cat):
            self._unify_cats(a, b, cause)
        elif isinstance(a, Prod) and isinstance(b, Prod):
            self._unify_prods(a, b, cause)
        else:
            cat, prod = (a, b) if isinstance(a, Cat) else (b, a)
            assert isinstance(prod, Prod)
            head = prod.factors[0]
            first, rest = self.split(cat, head.size, cat.size // head.size, cause)
            self.unify(first, head, cause)
            self.unify(rest, Prod(prod.factors[1:]), cause)

    def _bind(self, atom: Atom, axis: Axis) -> None:
        bind(atom, axis)
        if atom.least > 1 or atom.multiple > 1:
            self.require(axis, atom.least, atom.multiple)

    def require(self, axis: Axis, least: int, multiple: int = 1) -> None:
        """At least ``least`` indices of ``axis`` stay, and a multiple of ``multiple`` of them.

        The largest piece sees to it where one index of each is too few; every part of a concatenation and one factor
        of a product sees to the multiple.
        """
        axis = resolve(axis)
        if isinstance(axis, Atom):
            axis.least = max(axis.least, min(least, axis.size))
            axis.multiple = math.lcm(axis.multiple, multiple)
        elif isinstance(axis, Prod):
            self.require(max(axis.factors, key=lambda f: (f.size % multiple == 0, f.size)), least, multiple)
        elif isinstance(axis, Cat):
            largest = max(axis.parts, key=lambda p: p.size)
            for part in axis.parts:
                self.require(part, max(least - len(axis.parts) + 1, 1) if part is largest else 1, multiple)

    def _unify_cats(self, a: Cat, b: Cat, cause: Cause) -> None:
        cuts = sorted(set(np.cumsum([p.size for p in a.parts])) | set(np.cumsum([p.size for p in b.parts])))
        start = 0
        for stop in map(int, cuts):
            self.unify(self.take(a, start, stop, cause), self.take(b, start, stop, cause), cause)
            start = stop

    def _unify_prods(self, a: Prod, b: Prod, cause: Cause) -> None:
        """Equate what the two have in common at the front, else at the back; what is left in between has to stay."""
        front = math.gcd(a.factors[0].size, b.factors[0].size)
        back = math.gcd(a.factors[-1].size, b.factors[-1].size)
        if front > 1:
            (head_a, rest_a), (head_b, rest_b) = (self._split_front(x, front, cause) for x in (a, b))
            self.unify(head_a, head_b, cause)
        elif back > 1:
            (rest_a, tail_a), (rest_b, tail_b) = (self._split_back(x, back, cause) for x in (a, b))
            self.unify(tail_a, tail_b, cause)
        else:
            self._give_up((a, b), cause, f"no common refinement of {a!r} and {b!r}")
            return
        self.unify(rest_a, rest_b, cause)

    def _split_front(self, axis: Prod, size: int, cause: Cause) -> tuple[Axis, Axis]:
        """The first ``size`` of the first factor, which it divides, and all that follows."""
        first = axis.factors[0]
        head, rest = self.split(first, size, first.size // size, cause)
        return head, Prod((rest, *axis.factors[1:]))

    def _split_back(self, axis: Prod, size: int, cause: Cause) -> tuple[Axis, Axis]:
        """All that comes before, and the last ``size`` of the last factor, which it divides."""
        last = axis.factors[-1]
        rest, tail = self.split(last, last.size // size, size, cause)
        return Prod((*axis.factors[:-1], rest)), tail

    def _give_up(self, axes: Sequence[Axis], cause: Cause, detail: str) -> None:
        reason = Cause(cause.node, cause.op, cause.source, detail)
        for axis in axes:
            self.freeze(axis, reason)

    def take(self, axis: Axis, start: int, stop: int, cause: Cause) -> Axis:
        """Indices ``start:stop`` of ``axis``; atoms that the cut runs through are refined."""
        axis = resolve(axis)
        if not 0 <= start <= stop <= axis.size:
            raise AssertionError(f"cut {start}:{stop} outside {axis!r}")
        if start == 0 and stop == axis.size:
            return axis
        if start == stop:
            return Fixed(0, cause)
        if isinstance(axis, Fixed):
            return Fixed(stop - start, axis.cause, frozen=axis.frozen)
        if isinstance(axis, Atom):
            bounds = [(0, start), (start, stop), (stop, axis.size)]
            parts = [self._piece(axis, hi - lo, cause) for lo, hi in bounds]
            self._bind(axis, Cat(p for p in parts if p.size))
            return parts[1]
        if isinstance(axis, Cat):
            return self._take_cat(axis, start, stop, cause)
        assert isinstance(axis, Prod)
        return self._take_prod(axis, start, stop, cause)

    def _piece(self, atom: Atom, size: int, cause: Cause) -> Axis:
        if size == 1:
            return Fixed(1, Cause(cause.node, cause.op, cause.source, "a slice of length 1 can't be empty"))
        piece = self.atom(size, atom.owner)
        if isinstance(piece, Atom):
            piece.carrier, piece.weak = atom.carrier, atom.weak
        return piece

    def _take_cat(self, axis: Cat, start: int, stop: int, cause: Cause) -> Axis:
        out: list[Axis] = []
        offset = 0
        for part in axis.parts:
            lo, hi = max(start - offset, 0), min(stop - offset, part.size)
            if lo < hi:
                out.append(self.take(part, lo, hi, cause))
            offset += part.size
        return resolve(Cat(out))

    def _take_prod(self, axis: Prod, start: int, stop: int, cause: Cause) -> Axis:
        head, rest = axis.factors[0], resolve(Prod(axis.factors[1:]))
        row = rest.size
        if start % row == 0 and stop % row == 0:
            return resolve(Prod((self.take(head, start // row, stop // row, cause), rest)))
        # The cut runs through a row, so rows are no longer alike for the head: all of its rows stay.
        self._give_up((head,), cause, f"cut {start}:{stop} through rows of {row}")
        first, last = start // row, (stop - 1) // row
        if first == last:
            return self.take(rest, start - first * row, stop - first * row, cause)
        out: list[Axis] = []
        if start % row:
            out.append(self.take(rest, start % row, row, cause))
            first += 1
        whole = stop // row - first
        if whole:
            out.append(Prod((Fixed(whole, cause), rest)))
        if stop % row:
            out.append(self.take(rest, 0, stop % row, cause))
        return resolve(Cat(out))

    def split(self, axis: Axis, p: int, q: int, cause: Cause) -> tuple[Axis, Axis]:
        """Two axes of ``p`` and ``q`` indices whose product is ``axis`` (``p * q`` indices)."""
        axis = resolve(axis)
        if axis.size != p * q:
            raise AssertionError(f"{axis!r} can't be split into {p} x {q}")
        if p == 1:
            return Fixed(1, _TRIVIAL), axis
        if q == 1:
            return axis, Fixed(1, _TRIVIAL)
        if isinstance(axis, Fixed):
            return Fixed(p, axis.cause, frozen=axis.frozen), Fixed(q, axis.cause, frozen=axis.frozen)
        if isinstance(axis, Atom):
            first, second = self.atom(p, axis.owner), self.atom(q, axis.owner)
            self._bind(axis, Prod((first, second)))
            return first, second
        if isinstance(axis, Prod):
            return self._split_prod(axis, p, q, cause)
        assert isinstance(axis, Cat)
        return self._split_cat(axis, p, q, cause)

    def _split_prod(self, axis: Prod, p: int, q: int, cause: Cause) -> tuple[Axis, Axis]:
        done = 1
        for k, factor in enumerate(axis.factors):
            if done == p:
                return resolve(Prod(axis.factors[:k])), resolve(Prod(axis.factors[k:]))
            if done * factor.size > p:
                need = p // done
                if p % done or factor.size % need:
                    break
                a, b = self.split(factor, need, factor.size // need, cause)
                return resolve(Prod((*axis.factors[:k], a))), resolve(Prod((b, *axis.factors[k + 1 :])))
            done *= factor.size
        return self._split_misaligned(axis, p, q, cause)

    def _split_misaligned(self, axis: Prod, p: int, q: int, cause: Cause) -> tuple[Axis, Axis]:
        """No factor ends at ``p``: what divides both at the front and at the back stays free, the middle is frozen."""
        front, back = math.gcd(axis.factors[0].size, p), math.gcd(axis.factors[-1].size, q)
        head, rest = self._split_front(axis, front, cause)
        flat = resolve(rest)
        middle, tail = self._split_back(flat, back, cause) if isinstance(flat, Prod) else (flat, Fixed(1, _TRIVIAL))
        self._give_up((middle,), cause, f"no factors {p} x {q}")
        reason = Cause(cause.node, cause.op, cause.source, f"no factors {p} x {q}")
        return resolve(Prod((head, Fixed(p // front, reason)))), resolve(Prod((Fixed(q // tail.size, reason), tail)))

    def _split_cat(self, axis: Cat, p: int, q: int, cause: Cause) -> tuple[Axis, Axis]:
        if all(part.size % q == 0 for part in axis.parts):
            pairs = [self.split(part, part.size // q, q, cause) for part in axis.parts]
            row = pairs[0][1]
            for _, other in pairs[1:]:
                self.unify(row, other, cause)
            return resolve(Cat(first for first, _ in pairs)), resolve(row)
        if p > _MAX_ROWS:
            self._give_up((axis,), cause, f"{p} rows of {q} don't align with {axis!r}")
            reason = Cause(cause.node, cause.op, cause.source, f"no factors {p} x {q}")
            return Fixed(p, reason), Fixed(q, reason)
        # The boundaries lie inside rows: all rows stay, and they have to look alike.
        row = self.take(axis, 0, q, cause)
        for k in range(1, p):
            self.unify(row, self.take(axis, k * q, (k + 1) * q, cause), cause)
        reason = Cause(cause.node, cause.op, cause.source, f"parts don't align with rows of {q}")
        return Fixed(p, reason), resolve(row)
