"""``verify`` goes every way of a graph that decides by data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chase_fx
from chase_fx.errors import VerificationError
from tests.test_both_ways import DATA, Either, Net, model_of

pytestmark = pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")


def test_verify_looks_at_both_ways() -> None:
    """A slim module that is wrong on the way that the example does not go is found out."""
    model = model_of(Either)
    traced = chase_fx.trace(model, DATA[0])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
    chase_fx.verify(traced, slim)
    with torch.no_grad():
        slim.get_submodule("other").weight.mul_(1.1)
    with pytest.raises(VerificationError, match=r"test_both_ways\.py:\d+"):
        chase_fx.verify(traced, slim)


def test_verify_looks_at_ways_inside_of_ways() -> None:
    """Which the opposite of all outcomes at once does not reach."""

    class Inside(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if x[0, 0] > 0:
                y = self.layer(y)
                if x[0, 1] < 0:
                    y = y + F.relu(self.other(y))
            return self.last(y)

    model = model_of(Inside)
    traced = chase_fx.trace(model, DATA[0])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
    assert chase_fx.verify(traced, slim).unseen == ()
    with torch.no_grad():
        slim.get_submodule("other").weight.mul_(1.1)
    with pytest.raises(VerificationError, match=r"test_verify_ways\.py:\d+"):
        chase_fx.verify(traced, slim)


def test_verify_says_which_way_it_could_not_go() -> None:
    """Of three rows that two channels are left of, one depends on the others: there is no Cholesky factor."""

    class Factor(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            rows = y @ y.T - 1e-6 * torch.eye(y.shape[0], dtype=y.dtype)
            if x.sum() > 1000:
                rows = torch.linalg.cholesky(rows)
            return rows

    model = model_of(Factor)
    x = DATA[0][:3]
    traced = chase_fx.trace(model, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.8))
    report = chase_fx.verify(traced, slim)
    assert len(report.unseen) == 1
    assert "test_verify_ways.py" in report.unseen[0]
    assert f"one way not compared at {report.unseen[0]}" in str(report)
