"""The oracle that judges means by what exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from tests import kept_means
from tests.judge import EXACT, difference
from tests.nets import Net


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_losses_between_channels_are_means_of_those_that_exist(loss: Any) -> None:
    """The loss of a quantiser that a model returns, between what it encoded and its codes."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        codes = m.codes(torch.arange(len(y)))
        return m.b(codes), loss(codes.detach(), y)

    torch.manual_seed(0)
    net = Net(forward, a=nn.Linear(4, 8), codes=nn.Embedding(5, 8), b=nn.Linear(8, 2)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("a.weight").shape[0] == 4
    assert difference(kept_means.expected_output(net, slim, (x,), {}), slim(x)) <= EXACT
