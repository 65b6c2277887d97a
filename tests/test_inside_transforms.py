"""Sizes inside ``torch.vmap`` and ``torch.func``, where the torch API shows nothing: they are followed, or guarded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from tests.oracle import EXACT, difference, masked_copy, randomise

SIZES = ((2, 4), (4, 4), (2, 6), (3, 4), (1, 4), (4, 2), (2, 1), (1, 1))


class Between(nn.Module):
    """``inside`` between two layers, on (batch, places, channels)."""

    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.inside = nn.Linear(5, 8), nn.Linear(8, 3), inside

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.first(x).relu()))


def mask(x: Tensor) -> Tensor:
    """Made as transformers makes its masks: of factories, comparisons and what is looked up."""
    allowed = x.detach().sum(-1) > 1

    def of_places(sample: Tensor, place: Tensor, other: Tensor) -> Tensor:
        found = place.new_ones((), dtype=torch.bool) & allowed[sample, other]
        return found & (other > place - 3)

    function: Any = of_places
    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        function = torch.vmap(function, in_dims=dims)
    places = torch.arange(x.shape[1])
    found: Tensor = function(torch.arange(x.shape[0]), places, places)
    return found.to(x.dtype) @ x


def factory(x: Tensor) -> Tensor:
    """The size in front is the batch, the others are those that are asked for."""
    return torch.vmap(lambda row: row * row.new_full((4, 1), 2.0))(x)


def two_results(x: Tensor) -> Tensor:
    """The second needs a part of the first."""
    doubled, more = torch.vmap(lambda row: (row * 2, row * 2 + 1))(x)
    return doubled + more


def product(x: Tensor) -> Tensor:
    """Operands are expanded to what they are."""
    return torch.vmap(lambda row: (row @ row.transpose(0, 1)).softmax(-1) @ row)(x)


def size_read_inside(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row / row.shape[0])(x)


def size_read_outside(x: Tensor) -> Tensor:
    places = x.shape[1]
    return torch.vmap(lambda row: row / places)(x)


def size_to_infer(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.view(2, -1).sum(0).sum() + row)(x)


def dim_not_used(x: Tensor) -> Tensor:
    inner = torch.vmap(lambda _, place: place * 2.0, (None, 0))
    return x + torch.vmap(inner, (0, None))(torch.arange(x.shape[0]), torch.arange(x.shape[1]))[..., None]


def covariance(x: Tensor) -> Tensor:
    """Torch divides by the number of places."""
    return torch.vmap(lambda row: row + torch.cov(row.transpose(0, 1)).sum())(x)


def layer(x: Tensor) -> Tensor:
    """Torch merges the mapped dim with others."""
    return torch.vmap(lambda row: F.layer_norm(F.linear(row, torch.eye(8, dtype=row.dtype)), (8,)))(x)


def lookup(x: Tensor) -> Tensor:
    """Torch counts the mapped dim."""
    return torch.vmap(lambda row, i: row[i % row.shape[0]] + row)(x, torch.arange(x.shape[0]))


def gradient(x: Tensor) -> Tensor:
    """The gradient of a mean is divided by a number of elements."""
    return x + torch.func.grad(lambda y: (y * y).mean())(x)


FOLLOWED = (mask, factory, two_results, product)
GUARDED = (
    size_read_inside,
    size_read_outside,
    size_to_infer,
    dim_not_used,
    covariance,
    layer,
    lookup,
    gradient,
)


@pytest.mark.filterwarnings("ignore:cov")
@pytest.mark.parametrize("example", [(2, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("inside", FOLLOWED + GUARDED, ids=lambda f: f.__name__)
def test_other_sizes_are_right(inside: Callable[[Tensor], Tensor], example: tuple[int, int]) -> None:
    """By the graph itself, or by another one where a guard refuses them."""
    model = randomise(Between(inside))
    traced = chase_fx.trace(model, torch.randn(*example, 5, dtype=torch.float64))
    for size in SIZES:
        x = torch.randn(*size, 5, dtype=torch.float64)
        try:
            want = model(x)
        except (RuntimeError, IndexError):
            continue
        have = traced(x)
        assert have.shape == want.shape
        assert difference(have, want) <= EXACT
    if example[0] > 1:  # a batch of one leaves no trace in some views
        assert bool(traced.variants.others) == (inside in GUARDED)


@pytest.mark.parametrize("inside", [mask, two_results, dim_not_used], ids=lambda f: f.__name__)
def test_guards_of_sizes_hold_in_the_slim_graph(inside: Callable[[Tensor], Tensor]) -> None:
    model = randomise(Between(inside))
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    slim = chase_fx.prune(model, x)
    assert slim.plan.new_shape("first.weight") == (4, 5)
    assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT
