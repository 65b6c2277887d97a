"""Axes with the indices of others in another order: permutations, channels that are chosen or read twice."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from chase_fx.graphs.axes import Atom, Axis, Cat, Cause, Fixed, Picked, Places, Prod, resolve
from chase_fx.graphs.elements import Elements, digits
from chase_fx.graphs.store import Store

__all__ = ["Picking"]


class Picking(Store, ABC):
    """What picks indices of axes, factors what was picked, and ties units one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._picked = False  # whether any axis has the indices of another in another order

    @abstractmethod
    def take(self, axis: Axis, start: int, stop: int, cause: Cause) -> Axis:
        """Indices ``start:stop`` of ``axis``."""

    @abstractmethod
    def split(self, axis: Axis, p: int, q: int, cause: Cause) -> tuple[Axis, Axis]:
        """Two axes of ``p`` and ``q`` indices whose product is ``axis``."""

    def pick(self, axis: Axis, index: Places, cause: Cause) -> Axis:
        """The axis whose index ``i`` is index ``index[i]`` of ``axis``; those that are left out are units apart."""
        axis = resolve(axis)
        if len(index) and bool((index == index[0] + np.arange(len(index))).all()):
            return self.take(axis, int(index[0]), int(index[-1]) + 1, cause)
        if isinstance(axis, Fixed) or not len(index):
            return self._fixed_like(axis, len(index), cause)
        self._picked = True
        if isinstance(axis, Picked):
            return self.pick(axis.base, axis.index[index], cause)
        if isinstance(axis, Prod):
            return self._pick_prod(axis, index, cause)
        parts, places, start, size = list[Axis](), np.zeros(len(index), dtype=np.int64), 0, 0
        for part in axis.parts if isinstance(axis, Cat) else (axis,):
            inside = (index >= start) & (index < start + part.size)
            own = index[inside] - start
            start += part.size
            if not len(own):
                continue
            found, places[inside] = self._used(resolve(part), own, cause)
            places[inside] += size
            parts.append(found)
            size += found.size
        return resolve(Picked(Cat(parts), places))

    def _fixed_like(self, axis: Axis, size: int, cause: Cause) -> Axis:
        return Fixed(size, axis.cause, frozen=axis.frozen) if isinstance(axis, Fixed) else Fixed(size, cause)

    def _used(self, part: Axis, index: Places, cause: Cause) -> tuple[Axis, Places]:
        """The units of a part that are picked, and where each index is among them."""
        times = np.bincount(index, minlength=part.size)
        if isinstance(part, Fixed) or (isinstance(part, Prod) and bool((times != 1).any())):
            self.freeze(part, Cause(cause.node, cause.op, cause.source, "channels are picked from a product"))
            used = np.flatnonzero(times)
            return self._fixed_like(resolve(part), len(used), cause), np.searchsorted(used, index)
        if isinstance(part, Atom) and bool((times != times[0]).any()):  # as many places for each unit of an atom
            order = np.argsort(times, kind="stable")
            pieces = [self._piece(part, int(n), cause) for n in np.unique(times, return_counts=True)[1]]
            self._bind(part, Picked(Cat(pieces), np.argsort(order)))
            left_out = pieces[0].size if times.min() == 0 else 0
            used_pieces = pieces[1:] if left_out else pieces
            return Cat(used_pieces), np.argsort(order)[index] - left_out
        if isinstance(part, (Picked, Cat)):  # or refined where it stood before
            return self.pick(part, index, cause), np.arange(len(index))
        return part, index

    def _pick_prod(self, axis: Prod, index: Places, cause: Cause) -> Axis:
        """Rows and columns of a product by themselves, or all of it in any order."""
        head, rest = axis.factors[0], resolve(Prod(axis.factors[1:]))
        row, column = index // rest.size, index % rest.size
        changes = np.flatnonzero(row != row[0])
        width = int(changes[0]) if len(changes) else len(index)
        if len(index) % width == 0:
            rows, columns = row.reshape(-1, width), column.reshape(-1, width)
            if bool((rows == rows[:, :1]).all()) and bool((columns == columns[:1]).all()):
                return resolve(Prod((self.pick(head, rows[:, 0], cause), self.pick(rest, columns[0], cause))))
        if len(index) == axis.size and len(np.unique(index)) == axis.size:
            return Picked(axis, index)
        self._give_up((axis,), cause, "channels are picked from a product")
        return Fixed(len(index), Cause(cause.node, cause.op, cause.source, "picked from a product"), frozen=True)

    def _split_picked(self, axis: Picked, p: int, q: int, cause: Cause) -> tuple[Axis, Axis]:
        """Rows in another order, one order in every row, dims that changed places; else all rows are alike."""
        base, index = axis.base, axis.index
        rows = index.reshape(p, q)
        if base.size % q == 0 and bool((rows == rows[:, :1] // q * q + rows[:1] % q).all()):
            outer, inner = self.split(base, base.size // q, q, cause)
            return self.pick(outer, rows[:, 0] // q, cause), self.pick(inner, rows[0] % q, cause)
        found = digits(index) if len(index) == base.size else None
        if found is not None:
            rest, factors = base, dict[int, Axis]()
            for size, stride in sorted(found, key=lambda pair: -pair[1]):
                factors[stride], rest = self.split(rest, size, stride, cause)
            moved = resolve(Prod(factors[stride] for _, stride in found))
            return self.split(moved, p, q, cause)
        elements = Elements()
        units = elements.of(axis)
        reason = Cause(cause.node, cause.op, cause.source, f"channels in another order don't align with rows of {q}")
        if units is None or len(np.unique(index)) < len(index):
            self._give_up((axis,), cause, reason.detail)
            return Fixed(p, reason, frozen=True), Fixed(q, reason, frozen=True)
        numbers = units.reshape(p, q)
        self._equate(elements, np.broadcast_to(numbers[0], (p - 1, q)).reshape(-1), numbers[1:].reshape(-1), cause)
        return Fixed(p, reason, frozen=True), self.take(axis, 0, q, cause)

    def _equate(self, elements: Elements, a: Places, b: Places, cause: Cause) -> None:
        """Units with numbers ``a[i]`` and ``b[i]`` go together: atoms become atoms of sets of equal units."""
        least = elements.equal(a, b)
        atoms = list(elements.starts)
        parts: list[list[Axis]] = [[] for _ in atoms]
        place, before = np.zeros(elements.count, dtype=np.int64), [0] * len(atoms)
        for held, classes in elements.kinds(least):
            members = [k for k, n in enumerate(held) if n]
            piece: Axis = atoms[members[0]]
            if sum(held) > 1 or len(classes) < piece.size:
                first = min((atoms[k] for k in members), key=lambda atom: atom.serial)
                piece = self._piece(first, len(classes), cause)
                if isinstance(piece, Atom):
                    piece.carrier = any(atoms[k].carrier for k in members)
                    piece.weak = all(atoms[k].weak for k in members)
            for k in members:
                start = elements.starts[atoms[k]]
                own = least[start : start + atoms[k].size]
                row = np.minimum(np.searchsorted(classes, own), len(classes) - 1)
                inside = classes[row] == own
                place[start : start + atoms[k].size][inside] = row[inside] + before[k]
                parts[k].append(piece)
                before[k] += len(classes)
        for k, (atom, start) in enumerate(elements.starts.items()):
            if parts[k] == [atom]:
                continue
            fixed = least[start : start + atom.size] == 0
            own = place[start : start + atom.size]
            own[fixed] = before[k] + np.arange(int(fixed.sum()))
            why = Cause(cause.node, cause.op, cause.source, "equals what stays")
            stays = Fixed(int(fixed.sum()), why, frozen=not atom.weak)
            self._bind(atom, Picked(Cat([*parts[k], stays]), own))
