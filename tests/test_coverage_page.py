"""What the page says of a model whose oracle does not agree to the last digit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.coverage_page import complaints, judged_by_oracle
from tests.judge import _oracle, _rounding
from tests.nets import Net


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"oracle 0.5": 1e-12}, "exact"),
        ({"oracle 0.5": 1e-12, "oracle 0.9": "no way to tell"}, "unjudged"),
        ({"oracle 0.5": 2e-9}, "differs"),
        ({"oracle 0.5": 2e-9, "rounding 0.5": 1e-9}, "exact but for rounding"),
        ({"oracle 0.5": 2e-8, "rounding 0.5": 1e-9}, "differs"),
        ({"oracle 0.5": 2e-9, "rounding 0.5": 1e-9, "oracle 0.9": 2e-9}, "differs"),
        ({"oracle 0.5": 1e-3, "rounding 0.5": 1.0}, "differs"),
    ],
)
def test_rounding_excuses_what_it_explains(found: dict[str, Any], verdict: str) -> None:
    record = {"state": "exact", **found}
    assert judged_by_oracle(record) == verdict
    assert bool(complaints(record)) == (verdict == "differs")


@pytest.mark.parametrize(("gain", "low", "high"), [(1.0, 0.0, 1e-14), (1e7, 1e-10, 1e-6)])
def test_rounding_is_what_the_masked_model_makes_of_it(gain: float, low: float, high: float) -> None:
    """A difference of two sums that are nearly equal shows the last digits of both."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y + gain) - m.b(y * 0 + gain)

    torch.manual_seed(0)
    net, x = Net(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 4)).double().eval(), torch.randn(3, 6).double()
    slim = chase_fx.prune(net, x).eval()
    assert low <= _rounding(net, (x,), {}, slim) <= high
    gap = _oracle(net, (x,), {}, slim)
    assert isinstance(gap, float)
    assert gap <= 10 * high
