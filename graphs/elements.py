"""Axes unit by unit, for what cuts and factors can't say: which units an axis has where, and which have to be equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from chase_fx.graphs.axes import Atom, Axis, Cat, Fixed, Picked, Places, resolve

__all__ = ["Elements", "digits"]


@dataclass
class Elements:
    """A number for every unit of some atoms; whatever is fixed is 0.

    Attributes:
        starts: the number of the first unit of each atom.
        count: of all numbers.
    """

    starts: dict[Atom, int] = field(default_factory=dict)
    count: int = 1

    def of(self, axis: Axis) -> Places | None:
        """The number at each index of an axis; None where there is a product, whose indices belong to several units."""
        axis = resolve(axis)
        if isinstance(axis, Fixed):
            return np.zeros(axis.size, dtype=np.int64)
        if isinstance(axis, Atom):
            if axis not in self.starts:
                self.starts[axis] = self.count
                self.count += axis.size
            return np.arange(axis.size) + self.starts[axis]
        if isinstance(axis, Picked):
            base = self.of(axis.base)
            return None if base is None else base[axis.index]
        parts = [self.of(part) for part in axis.parts] if isinstance(axis, Cat) else [None]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) else None

    def equal(self, a: Places, b: Places) -> Places:
        """For each number the least of those that it has to equal, where ``a[i]`` and ``b[i]`` have to."""
        least = np.arange(self.count)
        while True:
            low = np.minimum(least[a], least[b])
            new = least.copy()
            for side in (a, b):
                np.minimum.at(new, least[side], low)
                np.minimum.at(new, side, low)
            new = new[new]
            if bool((new == least).all()):
                return least
            least = new

    def kinds(self, least: Places) -> Iterator[tuple[tuple[int, ...], Places]]:
        """Sets of equal units, as their least numbers, by how many units of each atom they have; not what is fixed."""
        classes, at = np.unique(least, return_inverse=True)
        held = np.zeros((len(classes), len(self.starts)), dtype=np.int64)
        for k, (atom, start) in enumerate(self.starts.items()):
            np.add.at(held[:, k], at[start : start + atom.size], 1)
        kinds, kind_of = np.unique(held[1:], axis=0, return_inverse=True)
        kind_of = kind_of.reshape(-1)
        for kind in dict.fromkeys(kind_of.tolist()):  # in the order of their first units
            yield tuple(kinds[kind].tolist()), classes[1:][kind_of == kind]


def digits(index: Places) -> list[tuple[int, int]] | None:
    """The sizes and strides of a permutation that is a transposition of dims, such as a channel shuffle.

    One pair for each dim, outermost first: ``index[(i, j)] == i * stride_i + j * stride_j``.
    """
    found: list[tuple[int, int]] = []
    rest = index - index[0]
    while len(rest) > 1:
        stride = int(rest[1])
        away = np.flatnonzero(rest != np.arange(len(rest)) * stride)
        run = int(away[0]) if len(away) else len(rest)
        if stride <= 0 or len(rest) % run:
            return None
        rows = rest.reshape(-1, run)
        if bool((rows != rows[:, :1] + np.arange(run) * stride).any()):
            return None
        found.append((run, stride))
        rest = rows[:, 0]
    size = 1
    for run, stride in sorted(found, key=lambda pair: pair[1]):
        if stride != size:
            return None
        size *= run
    return found[::-1] if size == len(index) and index[0] == 0 else None
