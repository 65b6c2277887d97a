"""The axis algebra: whatever is asked of it, every choice of kept units that it leaves open satisfies it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chase_fx.graphs.axes import Atom, Axis, Cat, Cause, Fixed, Prod, atoms_of, keep_mask, kept_count, resolve
from chase_fx.graphs.unification import Axes

WHY = Cause("node", "aten.op", "net.py:1")


def full_mask(axis: Axis, kept: dict[Atom, np.ndarray]) -> np.ndarray:
    mask = keep_mask(axis, kept)
    return np.ones(axis.size, dtype=bool) if mask is None else mask


def live_atoms(axes: list[Axis]) -> list[Atom]:
    return list(dict.fromkeys(atom for axis in axes for atom in atoms_of(axis)))


def brute_solutions(sizes: list[int], equations: list[list[tuple[int, int]]]) -> set[tuple[bool, ...]]:
    """Every non-empty choice per leaf atom that satisfies equations between flat index pairs, by enumeration."""
    bounds = np.cumsum([0, *sizes])
    out = set()
    for bits in itertools.product((False, True), repeat=int(bounds[-1])):
        if not all(any(bits[a:b]) for a, b in itertools.pairwise(bounds)):
            continue
        if all(bits[i] == bits[j] for i, j in equations):
            out.add(bits)
    return out


def choices(axes: list[Axis]) -> set[tuple[bool, ...]]:
    """The masks of ``axes``, end to end, for every choice of non-empty kept sets of the live atoms."""
    atoms = live_atoms(axes)
    subsets = [[c for c in itertools.product((False, True), repeat=atom.size) if any(c)] for atom in atoms]
    found = set()
    for pick in itertools.product(*subsets):
        kept = {atom: np.array(c) for atom, c in zip(atoms, pick, strict=True)}
        found.add(tuple(itertools.chain.from_iterable(full_mask(axis, kept).tolist() for axis in axes)))
    return found


# -- by hand


def test_unified_atoms_are_one() -> None:
    """Two atoms that were equated have the same mask for every choice, and nothing else is lost."""
    axes = Axes()
    a, b = axes.atom(3, ("a", 0)), axes.atom(3, ("b", 0))
    axes.unify(a, b, WHY)
    assert resolve(a) is resolve(b)
    assert choices([a, b]) == {(*c, *c) for c in itertools.product((False, True), repeat=3) if any(c)}


def test_older_atom_gives_the_name() -> None:
    """Of two equated atoms the older one stays, in whichever order they are given."""
    axes = Axes()
    a, b = axes.atom(3, ("a", 0)), axes.atom(3, ("b", 0))
    axes.unify(b, a, WHY)
    assert resolve(b) is a


def test_single_unit_is_fixed() -> None:
    """An axis of one index is fixed from the start, since a dim can't be empty."""
    assert isinstance(Axes().atom(1, ("a", 0)), Fixed)


def test_take_refines_every_holder() -> None:
    """A cut through an atom is seen by whoever holds the atom, and both pieces are free."""
    axes = Axes()
    a, b = axes.atom(5, ("a", 0)), axes.atom(5, ("b", 0))
    axes.unify(a, b, WHY)
    piece = axes.take(a, 0, 2, WHY)
    assert [atom.size for atom in atoms_of(b)] == [2, 3]
    assert piece is next(iter(atoms_of(b)))


def test_slice_of_length_one_freezes_its_unit() -> None:
    """Index 0:1 of an atom is fixed, the rest of it is free."""
    axes = Axes()
    a = axes.atom(4, ("a", 0))
    piece = axes.take(a, 0, 1, WHY)
    assert isinstance(resolve(piece), Fixed)
    assert full_mask(a, {atom: np.array([False, True, False]) for atom in atoms_of(a)}).tolist() == [1, 0, 1, 0]


def test_split_is_row_major() -> None:
    """Index (i, j) of a split axis is index i * q + j of the axis."""
    axes = Axes()
    a = axes.atom(6, ("a", 0))
    p, q = axes.split(a, 2, 3, WHY)
    kept = {p: np.array([False, True]), q: np.array([True, False, True])}
    assert full_mask(a, kept).tolist() == [False, False, False, True, False, True]


def test_common_refinement() -> None:
    """An axis that is 4 x 6 and 8 x 3 is 4 x 2 x 3."""
    axes = Axes()
    a = axes.atom(24, ("a", 0))
    axes.split(a, 4, 6, WHY)
    axes.split(a, 8, 3, WHY)
    assert [f.size for f in resolve(a).factors] == [4, 2, 3]


def test_no_common_refinement_freezes() -> None:
    """An axis that is 4 x 9 and 9 x 4 has no refinement, so it is frozen, with the cause."""
    axes = Axes()
    a = axes.atom(36, ("a", 0))
    axes.split(a, 4, 9, WHY)
    p, q = axes.split(a, 9, 4, WHY)
    assert not live_atoms([a, p, q])
    assert isinstance(resolve(a), Fixed)
    assert "9 x 4" in str(resolve(a).cause)


def test_only_what_has_no_refinement_freezes() -> None:
    """An axis that is 4 x 9 and 6 x 6 keeps the 2 at its front and the 3 at its back free."""
    axes = Axes()
    a = axes.atom(36, ("a", 0))
    axes.split(a, 4, 9, WHY)
    p, q = axes.split(a, 6, 6, WHY)
    assert [atom.size for atom in live_atoms([a])] == [2, 3]
    assert [atom.size for atom in live_atoms([p])] == [2]
    assert [atom.size for atom in live_atoms([q])] == [3]


def test_misaligned_rows_are_kept_alike() -> None:
    """A concatenation of 2 + 4 that is viewed as 2 rows of 3 keeps rows whole and columns alike."""
    axes = Axes()
    a, b = axes.atom(2, ("a", 0)), axes.atom(4, ("b", 0))
    joined = Cat((a, b))
    rows, columns = axes.split(joined, 2, 3, WHY)
    for kept in _all_kept([joined, rows, columns]):
        mask = full_mask(joined, kept).reshape(2, 3)
        assert full_mask(rows, kept).all()
        assert (mask == full_mask(columns, kept)).all()


def test_shuffled_concatenation_ties_parts() -> None:
    """cat(a, b) equated with cat(b, a) leaves one choice for both."""
    axes = Axes()
    a, b = axes.atom(3, ("a", 0)), axes.atom(3, ("b", 0))
    axes.unify(Cat((a, b)), Cat((b, a)), WHY)
    assert resolve(a) is resolve(b)


def test_frozen_partner_freezes() -> None:
    """What is equated with a fixed axis is fixed, for the same reason."""
    axes = Axes()
    a, b = axes.atom(3, ("a", 0)), axes.atom(3, ("b", 0))
    axes.unify(a, b, WHY)
    reason = Cause("n", "op", "", "because")
    axes.unify(b, Fixed(3, reason), WHY)
    assert isinstance(resolve(a), Fixed)
    assert resolve(a).cause is reason


def test_different_sizes_are_refused() -> None:
    """Axes of different sizes can't be equated."""
    axes = Axes()
    with pytest.raises(AssertionError, match="3 and 4"):
        axes.unify(axes.atom(3, ("a", 0)), axes.atom(4, ("b", 0)), WHY)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_cut_outside_is_refused(start: int, stop: int) -> None:
    """A cut must lie inside the axis."""
    axes = Axes()
    with pytest.raises(AssertionError, match="outside"):
        axes.take(axes.atom(4, ("a", 0)), start, stop, WHY)


def test_weak_and_carrier_follow_a_merge() -> None:
    """A merged atom is a carrier if either was, and weak only if both were."""
    axes = Axes()
    a, b = axes.atom(3, ("a", 0)), axes.atom(3, ("b", 0))
    a.weak, b.carrier = True, True
    axes.unify(a, b, WHY)
    assert resolve(b).carrier
    assert not resolve(b).weak


# -- brute force on tiny sizes


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((4,), (4,)),
        ((2, 2), (4,)),
        ((2, 2), (2, 2)),
        ((3, 2), (2, 3)),
        ((2, 4), (4, 2)),
        ((2, 3, 2), (4, 3)),
        ((6,), (2, 4)),
    ],
)
def test_concatenations_lose_nothing(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """Equating two concatenations leaves all the solutions whose pieces of every cut are non-empty, and no other."""
    axes = Axes()
    parts = [axes.atom(n, ("a", i)) for i, n in enumerate((*left, *right))]
    axes.unify(Cat(parts[: len(left)]), Cat(parts[len(left) :]), WHY)
    n = sum(left)
    cuts = sorted({0, *np.cumsum(left).tolist(), *np.cumsum(right).tolist()})
    expected = set()
    for bits in brute_solutions([n, n], [(i, n + i) for i in range(n)]):
        if all(any(bits[a:b]) for a, b in itertools.pairwise(cuts)):
            expected.add(bits)
    assert choices(parts) == expected


@pytest.mark.parametrize(("p", "q", "r", "s"), [(2, 3, 2, 3), (2, 4, 4, 2), (4, 2, 2, 4), (2, 6, 4, 3), (3, 4, 6, 2)])
def test_products_lose_nothing(p: int, q: int, r: int, s: int) -> None:
    """The masks of an axis that is a product in two ways are all the masks that are products in both."""
    axes = Axes()
    a = axes.atom(p * q, ("a", 0))
    axes.split(a, p, q, WHY)
    axes.split(a, r, s, WHY)

    def is_product(bits: tuple[bool, ...], rows: int) -> bool:
        grid = np.array(bits).reshape(rows, -1)
        return bool((grid == np.logical_and.outer(grid.any(1), grid.any(0))).all())

    every = itertools.product((False, True), repeat=p * q)
    assert choices([a]) == {bits for bits in every if any(bits) and is_product(bits, p) and is_product(bits, r)}


# -- soundness of random programs


class Program:
    """Runs random operations, and remembers as plain index equations what each of them promises."""

    def __init__(self) -> None:
        self.axes = Axes()
        self.pool: list[Axis] = []
        self.equal: list[tuple[Axis, Axis]] = []
        self.cuts: list[tuple[Axis, int, int, Axis]] = []
        self.products: list[tuple[Axis, Axis, Axis]] = []
        self.frozen: list[Axis] = []

    def step(self, draw: st.DataObject) -> None:
        kind = draw.draw(
            st.sampled_from(("atom", "cat", "prod", "unify", "take", "split", "freeze", "unify", "take", "split"))
        )
        if kind == "atom" or not self.pool:
            self.pool.append(self.axes.atom(draw.draw(st.sampled_from((2, 3, 4, 6, 8, 12))), ("atom", len(self.pool))))
            return
        axis = draw.draw(st.sampled_from(self.pool))
        if kind == "unify":
            same = [other for other in self.pool if other.size == axis.size]
            other = draw.draw(st.sampled_from(same))
            self.axes.unify(axis, other, WHY)
            self.equal.append((axis, other))
        elif kind == "take":
            start = draw.draw(st.integers(0, axis.size))
            stop = draw.draw(st.integers(start, axis.size))
            piece = self.axes.take(axis, start, stop, WHY)
            assert piece.size == stop - start
            self.cuts.append((axis, start, stop, piece))
            if piece.size:
                self.pool.append(piece)
        elif kind == "split":
            p = draw.draw(st.sampled_from([d for d in range(1, axis.size + 1) if axis.size % d == 0]))
            first, second = self.axes.split(axis, p, axis.size // p, WHY)
            assert (first.size, second.size) == (p, axis.size // p)
            self.products.append((axis, first, second))
            self.pool += [first, second]
        elif kind == "freeze" and len(self.frozen) < 2:
            self.axes.freeze(axis, WHY)
            self.frozen.append(axis)
        elif axis.size <= 12 and kind in ("cat", "prod"):
            other = draw.draw(st.sampled_from(self.pool))
            if kind == "cat":
                self.pool.append(Cat((axis, other)))
            elif axis.size * other.size <= 48:
                self.pool.append(Prod((axis, other)))

    def check(self, kept: dict[Atom, np.ndarray]) -> None:
        counts = {atom: int(mask.sum()) for atom, mask in kept.items()}
        for axis in self.pool:
            mask = full_mask(axis, kept)
            assert mask.shape == (axis.size,)
            assert mask.any()
            assert mask.sum() == kept_count(axis, counts)
        for a, b in self.equal:
            assert (full_mask(a, kept) == full_mask(b, kept)).all()
        for axis, start, stop, piece in self.cuts:
            assert (full_mask(axis, kept)[start:stop] == full_mask(piece, kept)).all()
        for axis, first, second in self.products:
            product = np.logical_and.outer(full_mask(first, kept), full_mask(second, kept)).reshape(-1)
            assert (full_mask(axis, kept) == product).all()
        for axis in self.frozen:
            assert full_mask(axis, kept).all()


def _all_kept(axes: list[Axis]) -> list[dict[Atom, np.ndarray]]:
    atoms = live_atoms(axes)
    subsets = [[c for c in itertools.product((False, True), repeat=atom.size) if any(c)] for atom in atoms]
    return [{a: np.array(c) for a, c in zip(atoms, pick, strict=True)} for pick in itertools.product(*subsets)]


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_random_programs_are_sound(data: st.DataObject, seed: int) -> None:
    """After any sequence of operations, any choice of kept units satisfies every equation that was asked for."""
    program = Program()
    for _ in range(data.draw(st.integers(2, 14))):
        program.step(data)
    rng = np.random.default_rng(seed)
    atoms = live_atoms(program.pool)
    for _ in range(4):
        kept = {}
        for atom in atoms:
            mask = rng.random(atom.size) < 0.5
            mask[rng.integers(atom.size)] = True
            kept[atom] = mask
        program.check(kept)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_keeping_everything_is_always_a_solution(data: st.DataObject) -> None:
    """After any sequence of operations, keeping everything satisfies every equation."""
    program = Program()
    for _ in range(data.draw(st.integers(2, 14))):
        program.step(data)
    program.check({})
