"""Forwards that decide by how a tensor lies in memory; another layout has a graph of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import EXACT, assert_exact, difference


def of(*sizes: int) -> Tensor:
    """Values that depend on the sizes alone."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)


class Deciding(nn.Module):
    """Doubles what is between its layers, or not."""

    def __init__(self, decides: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1).double()
        self.c = nn.Conv2d(8, 3, 1).double()
        self.decides = (decides,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3, H, W)."""
        y = self.a(x).tanh()
        return self.c(y * 2 if self.decides[0](x) else y)


LAYOUTS = (
    of(2, 3, 4, 4),
    of(2, 3, 4, 4).to(memory_format=torch.channels_last),
    of(2, 3, 8, 8)[:, :, ::2, ::2],
    of(2, 3, 4, 4).transpose(2, 3),
    of(2, 3, 1, 4).expand(2, 3, 4, 4),
    of(2, 3, 5, 5),
)


@pytest.mark.parametrize("example", range(5))
@pytest.mark.parametrize(
    "decides",
    [
        lambda x: x.is_contiguous(),
        lambda x: x.is_contiguous(memory_format=torch.channels_last),
        lambda x: x.stride(2) > 4,
    ],
    ids=["contiguous", "channels_last", "stride"],
)
def test_layouts(decides: Callable[[Tensor], bool], example: int) -> None:
    """Whichever layout the example had."""
    model = Deciding(decides).eval()
    traced, slim = chase_fx.trace(model, LAYOUTS[example]), chase_fx.prune(model, LAYOUTS[example])
    for x in LAYOUTS:
        assert difference(traced(x), model(x)) <= EXACT
        assert_exact(model, slim, (x,))


def test_addresses_are_refused() -> None:
    """They are others at every call."""
    with pytest.raises(CaptureError, match=r"address of a tensor at .*test_layouts.py:\d+"):
        chase_fx.trace(Deciding(lambda x: x.data_ptr() % 2 == 0), LAYOUTS[0])
