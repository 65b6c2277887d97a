"""Where the units of each atom lie along an axis."""

from __future__ import annotations

import numpy as np

from chase_fx.graphs.axes import Atom, Axis, Cat, Picked, Prod

__all__ = ["units_along"]

Placed = list[tuple[Atom, np.ndarray, np.ndarray]]


def units_along(axis: Axis) -> dict[Atom, np.ndarray]:
    """For each atom, (m, 2) pairs of (unit, position along ``axis``), sorted by unit and position."""
    found: dict[Atom, list[tuple[np.ndarray, np.ndarray]]] = {}
    for atom, units, positions in _place(axis):
        found.setdefault(atom, []).append((units, positions))
    return {atom: _sorted(pairs) for atom, pairs in found.items()}


def _sorted(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    units, positions = pairs[0]
    if len(pairs) > 1:
        units, positions = (np.concatenate(column) for column in zip(*pairs, strict=True))
    out = np.empty((len(units), 2), dtype=np.int64)
    out[:, 0], out[:, 1] = units, positions
    if len(pairs) > 1 or (units[1:] <= units[:-1]).any():
        out = out[np.lexsort((positions, units))]
    return out


def _place(axis: Axis) -> Placed:
    """Where the units of each atom lie along an axis in normal form: (atom, units, positions) per occurrence."""
    if isinstance(axis, Atom):
        every = np.arange(axis.size)
        return [(axis, every, every)]
    out: Placed = []
    if isinstance(axis, Cat):
        offset = 0
        for part in axis.parts:
            out += [(atom, units, positions + offset) for atom, units, positions in _place(part)]
            offset += part.size
    elif isinstance(axis, Prod):
        outer, inner = 1, axis.size
        for factor in axis.factors:
            inner //= factor.size
            rows, columns = np.arange(outer)[:, None, None], np.arange(inner)
            for atom, units, positions in _place(factor):
                flat = (rows * factor.size + positions[:, None]) * inner + columns
                out.append((atom, np.broadcast_to(units[:, None], flat.shape).reshape(-1), flat.reshape(-1)))
            outer *= factor.size
    elif isinstance(axis, Picked):
        for atom, units, positions in _place(axis.base):
            row_of = np.full(axis.base.size, -1)
            row_of[positions] = np.arange(len(positions))
            rows = row_of[axis.index]
            out.append((atom, units[rows[rows >= 0]], np.flatnonzero(rows >= 0)))
    return out
