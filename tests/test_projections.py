"""LSTMs with projections: torch tells them from plain ones by two widths that differ, so pruning must leave them so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.oracle import randomise


class Projected(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, hidden: int, projected: int, layers: int) -> None:
        super().__init__()
        both = layers > 1
        self.first = nn.Linear(4, 6)
        self.rnn = nn.LSTM(6, hidden, layers, proj_size=projected, batch_first=True, bidirectional=both)
        self.out = nn.Linear(projected * (2 if both else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.first(x))[0])


@pytest.mark.parametrize("layers", [1, 2])
def test_wide_inputs_are_no_projections(layers: int) -> None:
    """Weights of a plain layer whose inputs are four times as wide as its hidden state look like a projection's."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(16, 4, layers, bidirectional=True, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    channels = chase_fx.analyze(chase_fx.trace(Wide(), torch.randn(2, 5, 16)))
    assert {group.least for group in channels.groups} == {1}
    assert any("rnn" in group.name or "out" in group.name for group in channels.groups)


def test_what_has_to_stay_whole_is_frozen() -> None:
    """A group that has as many units as it needs is none: it is frozen, with the reason."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y / y.std(-1, keepdim=True))

    channels = chase_fx.analyze(chase_fx.trace(Pair(), torch.randn(4, 3)))
    assert not channels.groups
    assert "no spread" in channels.frozen["first.weight", 0]


@pytest.mark.parametrize(("hidden", "projected", "layers"), [(8, 3, 1), (8, 7, 1), (8, 6, 2), (4, 3, 1), (12, 4, 2)])
def test_fewer_are_projected_than_are_hidden(hidden: int, projected: int, layers: int) -> None:
    """At any sparsity and rounding a projected LSTM stays one, and is exact."""
    net, x = randomise(Projected(hidden, projected, layers)), torch.randn(2, 5, 4, dtype=torch.float64)
    for sparsity in (0.5, 0.95):
        for round_to in (1, 4):
            slim = chase_fx.prune(net, x, channel_sparsity=sparsity, round_to=round_to)
            rnn = slim.get_submodule("rnn")
            assert rnn.get_parameter("weight_hr_l0").shape == (rnn.proj_size, rnn.hidden_size)
            assert 0 < rnn.proj_size < rnn.hidden_size
            assert round_to > 1 or rnn.proj_size < projected


class Cells(nn.Module):
    """The cell of a projected layer, in two halves or two factors."""

    def __init__(self, hidden: int, projected: int, how: str) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, hidden, proj_size=projected, batch_first=True)
        self.out, self.cell = nn.Linear(projected, 3), nn.Linear(hidden, 3)
        self.how, self.scale = how, nn.Parameter(torch.randn(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        out, (_, (c,)) = self.rnn(x)
        if self.how == "halves":
            first, last = c.chunk(2, -1)
            c = torch.cat([first.relu(), last], -1)
        else:
            c = (c.view(len(c), 2, -1) * self.scale).flatten(1)
        return self.out(out).sum(1) + self.cell(c)


@pytest.mark.parametrize("how", ["halves", "factors"])
@pytest.mark.parametrize(("hidden", "projected"), [(8, 3), (8, 6), (8, 7), (4, 3), (12, 9)])
def test_a_hidden_state_in_pieces_stays_wide_enough(hidden: int, projected: int, how: str) -> None:
    """No single half and no single factor has as many units as have to stay: several see to it."""
    net, x = randomise(Cells(hidden, projected, how)), torch.randn(2, 5, 4, dtype=torch.float64)
    channels = chase_fx.analyze(chase_fx.trace(net, x))
    least = {group.name: torch.arange(group.size) < group.least for group in channels.groups}
    kept = channels.plan_keeping(least).kept_indices()["rnn.weight_hr_l0"][1]
    assert kept is None or len(kept) > projected
    for sparsity in (0.3, 0.5, 0.95):
        slim = chase_fx.prune(net, x, channel_sparsity=sparsity)
        rnn = slim.get_submodule("rnn")
        assert 0 < rnn.proj_size < rnn.hidden_size
