"""Decisions by data before steps that have as many elements as the data says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.branches import follow
from tests.oracle import assert_exact
from tests.test_both_ways import DATA, Net, assert_same, model_of

pytestmark = pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")


class Routed(Net):
    """What is decided changes how many rows each expert gets, and nothing else behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if x.sum() > 0:
            y = y + self.other(y).relu() * x.mean()
        choice = self.router(y).argmax(-1)
        out = torch.zeros_like(y)
        for number, expert in enumerate(self.experts):
            rows = torch.where(choice == number)[0]
            out.index_add_(0, rows, F.linear(y[rows], expert).relu())
        return self.last(y + out)


class Averaged(Net):
    """The ways differ in how many rows there are, up to where they are averaged."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.first(x))
        if x.sum() > 0:
            y = y[:2]
        return self.last(y.relu().mean(0, keepdim=True) + self.other(self.first(x)).relu())


class Chosen(Net):
    """Rows that a mask chooses, of which there may be none."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if x.sum() > 0:
            y = self.layer(y)
        places = (y.sum(-1) > 0).nonzero()[:, 0]
        return self.last(y.index_select(0, places).sum(0, keepdim=True) + self.other(y))


@pytest.mark.parametrize("example", [0, 3])
@pytest.mark.parametrize("kind", [Routed, Averaged, Chosen])
def test_ways_join_before_what_data_sizes(kind: type[Net], example: int) -> None:
    torch.manual_seed(0)
    model = model_of(kind)
    traced = chase_fx.trace(model, DATA[example])
    slim = chase_fx.prune(model, DATA[example], channel_sparsity=0.5)
    assert sum(node.target is follow for node in traced.graph.nodes) == 1
    for x in DATA:
        assert_same(copy.deepcopy(model), copy.deepcopy(traced), x)
        assert_exact(copy.deepcopy(model), copy.deepcopy(slim), (x,))
