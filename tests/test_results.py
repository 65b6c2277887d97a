"""Results of all kinds: what holds sizes has those of each call, and what a graph can't give is refused."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError


def sequence(length: int) -> Tensor:
    """(2, length, 4) of float64."""
    return torch.randn(2, length, 4, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


class Returning(nn.Module):
    """A layer, and what ``result`` makes of its value and of the input."""

    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3).double()
        self.result = (result,)

    def forward(self, x: Tensor) -> Any:
        """(N, L, 4) to a pair."""
        y = self.a(x)
        return y, self.result[0](y, x)


class Cache:
    """An object that can be called."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, y: Tensor) -> Cache:
        self.seen += y.shape[1]
        return self


@pytest.mark.parametrize(
    "result",
    [
        lambda _, x: {1, x.shape[1]},
        lambda _, x: frozenset({x.shape[1]}),
        lambda _, x: f"{x.shape[1]} places",
        lambda _, x: {"text": [str(x.shape[1])]},
        lambda _, x: collections.deque([x.shape[1], 2], maxlen=3),
        lambda _, x: collections.defaultdict(list, n=x.shape[1]),
        lambda _, x: collections.Counter(n=x.shape[1]),
        lambda _, x: range(x.shape[1]),
        lambda _, x: slice(0, x.shape[1]),
    ],
    ids=["set", "frozenset", "text", "text inside", "deque", "defaultdict", "counter", "range", "slice"],
)
def test_sizes_in_results(result: Callable[[Tensor, Tensor], Any]) -> None:
    """They were those of the example, or code that does not run."""
    model = Returning(result)
    traced = chase_fx.trace(model, sequence(8))
    for length in (8, 5, 11):
        want, found = model(sequence(length)), traced(sequence(length))
        assert torch.equal(want[0], found[0])
        assert type(found[1]) is type(want[1])
        assert found[1] == want[1]


def test_objects_that_can_be_called() -> None:
    """They are built again, like any other object."""
    traced = chase_fx.trace(Returning(lambda y, _: Cache()(y)), sequence(8))
    assert type(traced(sequence(5))[1]) is Cache
    assert traced(sequence(5))[1].seen == 5


def test_tensors_in_a_deque_keep_their_shape() -> None:
    """They are outputs."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()

        def forward(self, given: Any) -> Any:
            y = self.a(given[0])
            return self.c(y * given[1]), collections.deque([y])

    model, scale = Two(), torch.ones(1, dtype=torch.float64)
    traced = chase_fx.trace(model, (collections.deque([sequence(8), scale]),))
    assert not any(group.name.startswith("a.") for group in chase_fx.analyze(traced).groups)
    want, found = (m(collections.deque([sequence(5), scale * 3])) for m in (model, traced))
    assert torch.equal(want[0], found[0])
    assert torch.equal(want[1][0], found[1][0])


@pytest.mark.parametrize("result", [lambda y, _: {y}, lambda y, _: (y for _ in range(2))], ids=["set", "generator"])
def test_results_that_no_graph_gives(result: Callable[[Tensor, Tensor], Any]) -> None:
    """What has no order, and what is computed after the forward."""
    with pytest.raises(CaptureError, match=r"the forward returns a (set of tensors|generator)"):
        chase_fx.trace(Returning(result), sequence(8))
