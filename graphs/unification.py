"""Equating axes: first-order unification over the terms of :mod:`chase_fx.graphs.axes`, and the cuts it needs."""

from __future__ import annotations

import math

import numpy as np

from chase_fx.graphs.axes import Atom, Axis, Cat, Cause, Fixed, Picked, Prod, atoms_of, resolve
from chase_fx.graphs.elements import Elements
from chase_fx.graphs.picking import Picking
from chase_fx.graphs.store import TRIVIAL

__all__ = ["Axes"]

# A misaligned cut of a product repeats its rows explicitly; past this many rows the axis is frozen instead.
_MAX_ROWS = 1024


class Axes(Picking):
    """A store of atoms with the four operations that rules use: ``unify``, ``take``, ``split`` and ``pick``."""

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
            self._join(*((a, b) if a.serial < b.serial else (b, a)))
        elif self._picked and (_is_within(a, b) or _is_within(b, a)):
            if not self._unify_units(a, b, cause):
                self._give_up((a, b), cause, f"no common refinement of {a!r} and {b!r}")
        elif isinstance(a, Atom):
            self._bind(a, b)
        elif isinstance(b, Atom):
            self._bind(b, a)
        else:
            self._unify_compounds(a, b, cause)

    def _join(self, old: Atom, new: Atom) -> None:
        old.carrier = old.carrier or new.carrier
        old.weak = old.weak and new.weak
        self._bind(new, old)

    def _unify_compounds(self, a: Axis, b: Axis, cause: Cause) -> None:
        if isinstance(a, Picked) or isinstance(b, Picked):
            self._unify_picked(a, b, cause)
        elif isinstance(a, Cat) and isinstance(b, Cat):
            self._unify_cats(a, b, cause)
        elif isinstance(a, Prod) and isinstance(b, Prod):
            self._unify_prods(a, b, cause)
        else:
            other, prod = (b, a) if isinstance(a, Prod) else (a, b)
            assert isinstance(prod, Prod)
            self._unify_factors(other, prod, cause)

    def _unify_factors(self, axis: Axis, prod: Prod, cause: Cause) -> None:
        head = prod.factors[0]
        first, rest = self.split(axis, head.size, axis.size // head.size, cause)
        self.unify(first, head, cause)
        self.unify(rest, Prod(prod.factors[1:]), cause)

    def _unify_picked(self, a: Axis, b: Axis, cause: Cause) -> None:
        """Equate two axes of which one has the indices of another in another order."""
        if self._unify_units(a, b, cause):
            return
        one, other = (a, b) if isinstance(a, Picked) else (b, a)
        assert isinstance(one, Picked)
        if isinstance(other, Cat):
            start = 0
            for part in other.parts:
                self.unify(part, self.take(one, start, start + part.size, cause), cause)
                start += part.size
        elif isinstance(other, Prod):
            self._unify_factors(one, other, cause)
        elif one.size == one.base.size and len(np.unique(one.index)) == one.size:
            self.unify(one.base, self.pick(other, np.argsort(one.index), cause), cause)
        else:
            self._give_up((one, other), cause, "channels are picked from a product in two ways")

    def _unify_units(self, a: Axis, b: Axis, cause: Cause) -> bool:
        """Equate two axes unit by unit; whether they are without products, so that this could be done."""
        elements = Elements()
        first, second = elements.of(a), elements.of(b)
        if first is None or second is None:
            return False
        self._equate(elements, first, second, cause)
        return True

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
        if isinstance(axis, Picked):
            return self.pick(axis.base, axis.index[start:stop], cause)
        assert isinstance(axis, Prod)
        return self._take_prod(axis, start, stop, cause)

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
            return Fixed(1, TRIVIAL), axis
        if q == 1:
            return axis, Fixed(1, TRIVIAL)
        if isinstance(axis, Fixed):
            return Fixed(p, axis.cause, frozen=axis.frozen), Fixed(q, axis.cause, frozen=axis.frozen)
        if isinstance(axis, Atom):
            first, second = self.atom(p, axis.owner), self.atom(q, axis.owner)
            self._bind(axis, Prod((first, second)))
            return first, second
        if isinstance(axis, Prod):
            return self._split_prod(axis, p, q, cause)
        if isinstance(axis, Picked):
            return self._split_picked(axis, p, q, cause)
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
        middle, tail = self._split_back(flat, back, cause) if isinstance(flat, Prod) else (flat, Fixed(1, TRIVIAL))
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


def _is_within(a: Axis, b: Axis) -> bool:
    """Whether an atom is also a part of the other axis, whose indices are its own in another order."""
    return isinstance(a, Atom) and a in atoms_of(b)
