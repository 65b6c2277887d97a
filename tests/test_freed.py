"""``Tensor.set_``, which modes of the torch API do not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import chase_fx
from chase_fx.errors import CaptureError
from tests.two_layers import Body


class _LetsGo(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
            z = y.relu()
            y.set_()
        return self.b(z) + y.numel()


class _Swaps(Body):
    def __init__(self, what: Callable[[Any, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
            self.what(self, x, y)
        return self.b(y)


def test_memory_that_is_let_go_changes_no_result() -> None:
    """A tensor without memory is an empty one; what was made of it before stays."""
    net, x = _LetsGo().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(net, x)
    torch.testing.assert_close(traced(x[:2]), net(x[:2]))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    chase_fx.verify(traced, slim)
    assert slim.get_parameter("a.weight").shape[0] == 4
    assert "set_" not in vars(Tensor)


@pytest.mark.parametrize(
    "what",
    [
        lambda _, x, y: y.set_(y * 2),
        lambda _, x, y: x.set_(),
        lambda net, x, y: net.a.bias.set_(),
    ],
)
def test_other_memory_is_refused(what: Callable[[Any, Tensor, Tensor], object]) -> None:
    """The graph would go on with the memory from before."""
    with pytest.raises(CaptureError, match=r"Tensor\.set_ at .*test_freed\.py:\d+ puts other memory"):
        chase_fx.trace(_Swaps(what).eval(), torch.randn(3, 4))
