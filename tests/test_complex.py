"""Models with complex weights, as neural operators have them in the frequency domain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.magnitude import Magnitude


class Spectral(nn.Module):
    """A real layer, a mixing of frequencies by complex weights, and a real layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv1d(3, 10, 1)
        self.mix = nn.Parameter(torch.randn(10, 12, 5, dtype=torch.cfloat) * 0.2)
        self.head = nn.Conv1d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft(self.lift(x).relu())[..., :5]
        y = torch.einsum("bit,iot->bot", y, self.mix)
        return self.head(torch.fft.irfft(y, n=x.shape[-1]).relu())


@pytest.mark.parametrize("given", [False, True])
def test_complex_weights_stay_complex_in_a_file(given: bool, tmp_path: Path) -> None:
    """A loaded module equals the saved one, with its own example inputs and with others."""
    x = torch.randn(2, 3, 16)
    slim = chase_fx.prune(Spectral(), x).eval()
    assert slim.get_parameter("mix").shape == (5, 6, 5)
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    loaded = chase_fx.load(tmp_path / "slim.safetensors", Spectral(), x if given else None).eval()
    assert loaded.get_parameter("mix").dtype is torch.cfloat
    assert torch.equal(loaded(x), slim(x))


def test_complex_weights_are_scored_by_their_absolute_values() -> None:
    """A unit's energy is the sum over both parts of its weights."""
    net = Spectral()
    channels = chase_fx.analyze(chase_fx.trace(net, torch.randn(2, 3, 16)))
    group = next(g for g in channels.groups if g.size == 12)
    mix, head = net.mix.detach().abs().double(), net.head.weight.detach().double()
    energies = [mix.square().sum((0, 2)), head.square().sum((0, 2))]
    wanted = sum(e / e.mean() for e in energies).sqrt()
    torch.testing.assert_close(Magnitude(channels)(group), wanted, rtol=1e-5, atol=0)
