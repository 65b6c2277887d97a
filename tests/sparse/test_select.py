"""Exact top-k and exact allocation."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chase_fx.sparse.select import allocate, select_each, select_global, top_mask

few_values = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, float("nan"), float("inf")]), min_size=1, max_size=40)


@given(few_values, st.integers(-2, 45))
@settings(deadline=None)
def test_top_mask_takes_exactly_k_and_the_lowest_index_wins_ties(values: list[float], k: int) -> None:
    mask = top_mask(torch.tensor(values), k).tolist()
    rank = [-math.inf if math.isnan(v) else v for v in values]
    order = sorted(range(len(values)), key=lambda i: (-rank[i], i))
    assert [i for i, taken in enumerate(mask) if taken] == sorted(order[: max(k, 0)])


def test_half_precision_scores_are_ranked_exactly() -> None:
    assert top_mask(torch.tensor([1, 2, 3], dtype=torch.bfloat16), 2).tolist() == [False, True, True]


def test_select_global_ranks_all_tensors_together_and_select_each_by_itself() -> None:
    candidates = [torch.tensor([[True, False], [True, True]]), torch.tensor([True, True])]
    scores = [torch.tensor([5.0, 1.0, 4.0]), torch.tensor([3.0, 6.0])]
    a, b = select_global(scores, candidates, 3)
    assert a.tolist() == [[True, False], [False, True]]
    assert b.tolist() == [False, True]
    a, b = select_each(scores, candidates, [1, 2])
    assert a.tolist() == [[True, False], [False, False]]
    assert b.tolist() == [True, True]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), min_size=1, max_size=12),
    st.integers(0, 700),
)
def test_allocation_adds_up_and_stays_below_capacities(places: list[tuple[float, int]], total: int) -> None:
    shares, capacities = [s for s, _ in places], [c for _, c in places]
    counts = allocate(total, shares, capacities)
    assert sum(counts) == min(total, sum(capacities))
    assert all(0 <= count <= cap for count, cap in zip(counts, capacities, strict=True))
