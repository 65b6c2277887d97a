"""Hand-computed tables of initial masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chase_fx.errors import ArgumentError
from chase_fx.sparse.distribution import DISTRIBUTIONS, erk, erk_plus, random_mask, resolve, uniform

# sum(shape): 22, 38, 74, 74; sizes: 216, 1152, 4608, 640
SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (10, 64)]


def test_erk_table() -> None:
    # The sums are 17, 30, 54 and 74, together 175: at 10 % of 6616 weights, 662 = 175 eps with eps = 3.782857...
    # 17 eps = 64.31, 30 eps = 113.49, 54 eps = 204.27, 74 eps = 279.93; the one left over goes to the largest fraction.
    assert erk(SHAPES, 662) == [64, 114, 204, 280]


def test_erk_makes_a_layer_dense_and_solves_again() -> None:
    # At 4000: eps = 22.857 would put 388.6 weights in the first layer (216) and 1691 in the last (640): both become
    # dense. 3144 are left for 84 eps, eps = 37.43: 30 eps = 1122.86 (of 1152) and 54 eps = 2021.14.
    assert erk(SHAPES, 4000) == [216, 1123, 2021, 640]


def test_erk_plus_has_a_dense_classifier() -> None:
    # 1000 - 640 = 360 for 101 eps, eps = 3.5644: 60.59, 106.93, 192.48.
    assert erk_plus(SHAPES, 1000) == [61, 107, 192, 640]


def test_uniform_table() -> None:
    assert uniform(SHAPES, 662) == [22, 115, 461, 64]


@given(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=6),
    st.floats(0.001, 1),
)
def test_every_distribution_is_exact(name: str, shapes: list[list[int]], density: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    total = round(density * sum(sizes))
    counts = resolve(name)(shapes, total)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_random_masks_are_exact_and_depend_on_the_generator_alone() -> None:
    draw = [random_mask((4, 5), 7, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draw[0].sum() == 7
    assert torch.equal(*draw)


def test_unknown_distribution_is_refused() -> None:
    with pytest.raises(ArgumentError, match="erk"):
        resolve("normal")
