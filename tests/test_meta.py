"""Models on the meta device: captured on zeros in no memory of their own, or on fake tensors where that does not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chase_fx
from chase_fx.errors import CaptureError, ChaseError
from chase_fx.graphs import attempts, standins
from tests import nets

W = 2304  # a square layer of this width is large


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of a forward under the recorder was on fake tensors."""
    found: list[bool] = []
    once = attempts._once

    def spy(model: nn.Module, inputs: Any, way: Any) -> Any:
        assert way.fake
        found.append(way.values)
        return once(model, inputs, way)

    monkeypatch.setattr(attempts, "_once", spy)
    return found


def described(traced: chase_fx.TracedModule) -> list[Any]:
    """All that rules and users see of a capture."""
    tapes = [capture.tape.ops for capture in traced.info.captures]
    seen = [[(str(op.op), op.node, [(s.shape, s.stride, s.dtype) for s in op.outs]) for op in ops] for ops in tapes]
    return [str(traced.graph), *seen]


def on_fake_tensors(monkeypatch: pytest.MonkeyPatch, net: nn.Module, *x: torch.Tensor) -> chase_fx.TracedModule:
    """The capture on fake tensors."""
    with monkeypatch.context() as patch:
        patch.setattr(standins.StandIns, "run", standins.StandIns.give_up)
        return chase_fx.trace(net, x)


@pytest.mark.parametrize("name", nets.NETS)
def test_captures_are_those_on_fake_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, and tapes with shapes, strides and dtypes."""
    net, x = nets.build(name)
    net, x = net.to("meta"), tuple(t.to("meta") for t in x)
    try:
        wanted = described(on_fake_tensors(monkeypatch, net, *x))
    except ChaseError as e:  # it depends on data
        with pytest.raises(type(e)):
            chase_fx.trace(net, x)
    else:
        assert described(chase_fx.trace(net, x)) == wanted


class Body(nn.Module):
    """Large layers, then ``function`` of the result and of a large weight."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(5000, W), nn.Linear(W, W), nn.Linear(W, 2)
        self.norm = nn.LayerNorm(W)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N,) -> (N, 2)."""
        return self.last(self.function(self.norm(self.first(self.words(x))), self.first.weight))


FITTING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "elementwise": lambda y, _: F.gelu(y).mul(2) + y.cos(),
    "views": lambda y, w: y @ w.t().view(W, W),
    "contraction": lambda y, w: F.linear(y, w[:, :W]).softmax(-1),
    "small": lambda y, _: y.sum(-1, keepdim=True) * y,
}
REST: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a large weight that is computed with": lambda y, w: F.linear(y, w.cos()),
    "a table without data": lambda y, _: y * torch.zeros(W, device="meta").to("cpu", copy=True),
}


@pytest.mark.parametrize("name", [*FITTING, *REST])
def test_large_layers(name: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on fake tensors; those are only used where the stand-ins do not do."""
    net, x = Body({**FITTING, **REST}[name]).to("meta"), torch.zeros(40, dtype=torch.int64, device="meta")
    found = chase_fx.trace(net, x)
    assert any(runs) == (name in REST)
    assert described(found) == described(on_fake_tensors(monkeypatch, net, x))
    assert all(p.is_meta for p in found.parameters())


class Constant(nn.Module):
    """Has a tensor of data that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8, device="meta"), nn.Linear(8, 2, device="meta")
        self.table = torch.arange(8.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 4) -> (N, 2)."""
        return self.last(self.first(x) * self.table)


def test_constants(runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Become what they become on fake tensors."""
    net, x = Constant(), torch.zeros(3, 4, device="meta")
    found, wanted = chase_fx.trace(net, x), on_fake_tensors(monkeypatch, net, x)
    assert runs[:2] == [False, True]
    assert described(found) == described(wanted)
    (a,), (b,) = ([t for name, t in m.named_buffers() if name in m.info.constants] for m in (found, wanted))
    assert type(a) is type(b)
    assert (a.shape, a.device) == (b.shape, b.device)


def test_a_decision_by_a_weight_is_no_guess() -> None:
    """Whatever memory is behind the weight: there is no data to decide by."""
    net = Body(lambda y, w: y if w[0, 0] > 0 else -y).to("meta")
    with pytest.raises(CaptureError):
        chase_fx.trace(net, torch.zeros(40, dtype=torch.int64, device="meta"))
