"""The algebra of axes: what is known about which indices of a tensor's dim go or stay together.

An axis of size ``n`` is one of

``Atom``   ``n`` independent units: any non-empty subset of the indices may be kept.
``Fixed``  every index is kept (batch, spatial, outputs, whatever could not be proven); carries the reason.
``Cat``    axes laid end to end: ``cat``, ``split``, slices.
``Prod``   index ``(i, j)`` in row-major order is kept iff ``i`` is kept in the first factor *and* ``j`` in the second:
           flatten, view, groups x channels in a group, heads x head_dim.
``Picked`` index ``i`` is index ``index[i]`` of another axis: permutations, channels that are chosen or read twice.

Operators only ever *equate* axes (:mod:`chase_fx.graphs.unification`). An atom that is equated with something is bound
to it, and an atom that has to be cut (by a slice) or factored (by a view) is bound to the pieces, so
everybody who holds the atom sees the refinement. A kept set that is a product in two ways is a product of the common
refinement of both, so refining loses nothing. Where no refinement exists the axis is frozen, which always satisfies
every equation: keeping everything is the one solution that all constraints share. That is why the analysis can be too
careful but not wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

__all__ = [
    "Atom",
    "Axis",
    "BoolArray",
    "Cat",
    "Cause",
    "Fixed",
    "Picked",
    "Places",
    "Prod",
    "atoms_of",
    "bind",
    "is_reordered",
    "keep_mask",
    "kept_count",
    "resolve",
]

BoolArray = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
AxisName = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Cause:
    """Who asked for a coupling or a freeze: the FX node, the ATen operator and the user's source line."""

    node: str
    op: str
    source: str = ""
    detail: str = ""

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        what = f"{self.detail}: " if self.detail else ""
        return f"{what}{self.op} at node '{self.node}'{where}"


class Axis:
    """Base of the four kinds; ``size`` is the dense number of indices."""

    __slots__ = ("size",)
    size: int


class Atom(Axis):
    """``size`` units that nothing ties to each other. ``ref`` is what the atom was found to equal, once it was."""

    __slots__ = ("carrier", "grouping", "least", "multiple", "owner", "ref", "required", "serial", "weak")

    def __init__(self, size: int, owner: AxisName, serial: int) -> None:
        self.size = size
        self.owner = owner
        self.ref: Axis | None = None
        self.serial = serial
        self.carrier = False  # a head: the first choice of what to remove in a product
        self.grouping = False  # groups of a convolution: the channels within them are the better choice
        self.least = 1  # units that have to stay: a variance needs two
        self.multiple = 1  # the number that stays is a multiple of this: some kernels want aligned rows
        self.required: Cause | None = None  # who asked for either
        self.weak = False  # born of an expand: the last choice

    def __repr__(self) -> str:
        return f"{self.owner[0]}:{self.owner[1]}[{self.size}]"


class Fixed(Axis):
    """An axis that keeps all of its indices, and why; ``frozen`` where the model's own units were free before."""

    __slots__ = ("cause", "frozen")

    def __init__(self, size: int, cause: Cause, *, frozen: bool = False) -> None:
        self.size = size
        self.cause = cause
        self.frozen = frozen

    def joined(self, size: int, other: Fixed) -> Fixed:
        """One axis of ``size`` for two neighbours; where one of them is space, the size changes with that."""
        return Fixed(size, self.cause, frozen=self.frozen and other.frozen)

    def __repr__(self) -> str:
        return f"fixed[{self.size}]"


class _Compound(Axis):
    """An axis made of others, with its normal form and the atoms in it as of some number of bindings."""

    __slots__ = ("atoms", "known", "normal")

    def __init__(self, size: int) -> None:
        self.size = size
        self.known = -1
        self.normal: Axis = self
        self.atoms: tuple[Atom, ...] | None = None


class Cat(_Compound):
    """Axes laid end to end."""

    __slots__ = ("parts",)

    def __init__(self, parts: Iterable[Axis]) -> None:
        self.parts = tuple(parts)
        super().__init__(sum(p.size for p in self.parts))

    def __repr__(self) -> str:
        return "cat(" + ", ".join(map(repr, self.parts)) + ")"


class Prod(_Compound):
    """Row-major product of axes."""

    __slots__ = ("factors",)

    def __init__(self, factors: Iterable[Axis]) -> None:
        self.factors = tuple(factors)
        super().__init__(math.prod(f.size for f in self.factors))

    def __repr__(self) -> str:
        return "prod(" + ", ".join(map(repr, self.factors)) + ")"


class Picked(_Compound):
    """Indices of another axis in another order; each unit of an atom stands in as many places as any other of it.

    In normal form the other axis is an atom, a product, or a concatenation of such.
    """

    __slots__ = ("base", "index")

    def __init__(self, base: Axis, index: Places) -> None:
        self.base, self.index = base, index
        super().__init__(len(index))

    def __repr__(self) -> str:
        return f"picked({self.base!r}, {self.size})"


_TRIVIAL = Cause("", "size 1")
_bindings = itertools.count(1)
_bound = 0  # how many bindings were made so far: a normal form holds until the next one


def bind(atom: Atom, axis: Axis) -> None:
    """From now on ``atom`` is ``axis``."""
    global _bound  # noqa: PLW0603  (one count for every store of atoms: it only has to change)
    atom.ref = axis
    _bound = next(_bindings)


def resolve(axis: Axis) -> Axis:
    """The normal form of ``axis`` under the bindings made so far.

    Chains are followed, nested ``Cat`` and ``Prod`` are flattened, neighbouring ``Fixed`` are merged, and empty parts
    and unit factors are dropped.
    """
    if isinstance(axis, Atom):
        if axis.ref is None:
            return axis
        root = resolve(axis.ref)
        axis.ref = root
        return root
    if not isinstance(axis, _Compound):
        return axis
    if axis.known != _bound:
        if isinstance(axis, Cat):
            normal = _resolve_cat(axis)
        else:
            normal = _resolve_prod(axis) if isinstance(axis, Prod) else _resolve_picked(cast("Picked", axis))
        for found in (axis, normal) if isinstance(normal, _Compound) else (axis,):
            found.known, found.normal, found.atoms = _bound, normal, None
    return axis.normal


def _resolve_cat(axis: Cat) -> Axis:
    parts: list[Axis] = []
    changed = False
    for part in axis.parts:
        new = resolve(part)
        changed = changed or new is not part or isinstance(new, Cat)
        for p in new.parts if isinstance(new, Cat) else (new,):
            if p.size == 0:
                changed = True
            elif parts and isinstance(p, Fixed) and isinstance(parts[-1], Fixed):
                parts[-1] = parts[-1].joined(parts[-1].size + p.size, p)
                changed = True
            else:
                parts.append(p)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Fixed(0, _TRIVIAL)
    return Cat(parts) if changed else axis


def _resolve_prod(axis: Prod) -> Axis:
    factors: list[Axis] = []
    changed = False
    for factor in axis.factors:
        new = resolve(factor)
        changed = changed or new is not factor or isinstance(new, Prod)
        for f in new.factors if isinstance(new, Prod) else (new,):
            if f.size == 1:
                changed = True
            elif factors and isinstance(f, Fixed) and isinstance(factors[-1], Fixed):
                factors[-1] = factors[-1].joined(factors[-1].size * f.size, f)
                changed = True
            else:
                factors.append(f)
    if len(factors) == 1:
        return factors[0]
    if not factors:
        return Fixed(1, _TRIVIAL)
    return Prod(factors) if changed else axis


def _resolve_picked(axis: Picked) -> Axis:
    base, index = resolve(axis.base), axis.index
    if isinstance(base, Fixed):
        return Fixed(axis.size, base.cause, frozen=base.frozen)
    if isinstance(base, Picked):
        index = base.index[index]
        base = base.base
    elif isinstance(base, Cat) and any(isinstance(part, Picked) for part in base.parts):
        parts, places, offset = list[Axis](), list[Places](), 0
        for part in base.parts:
            inner, own = (part.base, part.index) if isinstance(part, Picked) else (part, np.arange(part.size))
            parts.append(inner)
            places.append(own + offset)
            offset += inner.size
        base, index = resolve(Cat(parts)), np.concatenate(places)[index]
    if len(index) == base.size and bool((index == np.arange(base.size)).all()):
        return base
    return axis if base is axis.base and index is axis.index else Picked(base, index)


def atoms_of(axis: Axis) -> Sequence[Atom]:
    """Every live atom of the normal form, left to right, repeated where it occurs twice."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return (axis,)
    if not isinstance(axis, _Compound):
        return ()
    if axis.atoms is None:
        axis.atoms = tuple(atom for piece in _pieces(axis) for atom in atoms_of(piece))
    return axis.atoms


def _pieces(axis: Axis) -> tuple[Axis, ...]:
    """What a normal form is made of."""
    if isinstance(axis, Cat):
        return axis.parts
    return axis.factors if isinstance(axis, Prod) else (axis.base,) if isinstance(axis, Picked) else ()


def is_reordered(axis: Axis) -> bool:
    """Whether indices of another axis are in another order anywhere in it."""
    axis = resolve(axis)
    return isinstance(axis, Picked) or any(map(is_reordered, _pieces(axis)))


def fixed_of(axis: Axis) -> Iterator[Fixed]:
    """Every frozen piece of the normal form, left to right."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        yield axis
    for piece in _pieces(axis):
        yield from fixed_of(piece)


def keep_mask(axis: Axis, kept: Mapping[Atom, BoolArray]) -> BoolArray | None:
    """Which of the ``size`` indices stay, given the kept units of each atom; ``None`` stands for all of them."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return kept.get(axis)
    if isinstance(axis, Cat):
        masks = [keep_mask(p, kept) for p in axis.parts]
        if all(m is None for m in masks):
            return None
        full = [np.ones(p.size, dtype=np.bool_) if m is None else m for p, m in zip(axis.parts, masks, strict=True)]
        return np.concatenate(full)
    if isinstance(axis, Prod):
        masks = [keep_mask(f, kept) for f in axis.factors]
        if all(m is None for m in masks):
            return None
        out = np.ones(1, dtype=np.bool_)
        for factor, mask in zip(axis.factors, masks, strict=True):
            m = np.ones(factor.size, dtype=np.bool_) if mask is None else mask
            out = np.logical_and.outer(out, m).reshape(-1)
        return out
    if isinstance(axis, Picked):
        found = keep_mask(axis.base, kept)
        return None if found is None else found[axis.index]
    return None


def kept_count(axis: Axis, kept: Mapping[Atom, int]) -> int:
    """How many indices stay, given the number of kept units of each atom (missing: all)."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return kept.get(axis, axis.size)
    if isinstance(axis, Cat):
        return sum(kept_count(p, kept) for p in axis.parts)
    if isinstance(axis, Prod):
        return math.prod(kept_count(f, kept) for f in axis.factors)
    if isinstance(axis, Picked):
        parts = axis.base.parts if isinstance(axis.base, Cat) else (axis.base,)
        ends = np.cumsum([part.size for part in parts])
        times = np.bincount(np.searchsorted(ends, axis.index, side="right"), minlength=len(parts)).tolist()
        return sum(
            n if isinstance(part, Fixed) else kept_count(part, kept) * n // part.size
            for part, n in zip(parts, times, strict=True)
        )
    return axis.size
