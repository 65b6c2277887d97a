"""The default score of units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import chase_fx
from chase_fx.graphs.magnitude import Magnitude


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_root_mean_squares_of_normalised_energies(dtype: torch.dtype) -> None:
    """On a net whose weights are larger than one block, scores equal the formula written out."""
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 300, 3), nn.Flatten(), nn.Linear(1200, 2))
    net.to(dtype)
    channels = chase_fx.analyze(chase_fx.trace(net, torch.zeros(1, 3, 6, 6, dtype=dtype)))
    score = Magnitude(channels)
    first, second, bias, last = (
        net.get_parameter(n).detach().double() for n in ("0.weight", "2.weight", "0.bias", "4.weight")
    )
    energies = [first.square().sum((1, 2, 3)), bias.square(), second.square().sum((0, 2, 3))]
    wanted = sum(e / e.mean() for e in energies).sqrt()
    torch.testing.assert_close(score(channels.groups[0]), wanted, rtol=1e-5, atol=0)
    second_bias = net.get_parameter("2.bias").detach().double()
    energies = [second.square().sum((1, 2, 3)), second_bias.square(), last.square().sum(0).view(300, 4).mean(1)]
    wanted = sum(e / e.mean() for e in energies).sqrt()
    torch.testing.assert_close(score(channels.groups[1]), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_copies_no_weights(dtype: torch.dtype) -> None:
    """Weights that the traced module shares with the model, to be copied on a write, are read only."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    net.to(dtype)
    traced = chase_fx.trace(net, torch.zeros(2, 3, 6, 6, dtype=dtype))
    shared = {name: p for name, p in traced.named_parameters() if torch._C._is_cow_tensor(p)}
    assert shared.keys() == dict(net.named_parameters()).keys()
    chase_fx.analyze(traced).plan(0.5)
    assert all(map(torch._C._is_cow_tensor, shared.values()))
