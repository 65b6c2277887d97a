"""Capture of state: buffers, parameters, inputs and modes that a forward reads or writes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import chase_fx
from chase_fx.errors import CaptureError
from tests.two_layers import Body


class _Stale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.extra = self.a.weight * 2

    def forward(self, x: Tensor, use: bool) -> Tensor:
        return F.linear(self.a(x), self.extra if use else self.a.weight)


def test_a_tensor_computed_before_the_capture_is_no_constant() -> None:
    """What was computed from parameters may be there; a forward that uses it as it is would not follow them."""
    net, x = _Stale(), torch.ones(1, 4)
    assert torch.equal(chase_fx.trace(net, (x, False))(x, False), net(x, False))
    with pytest.raises(CaptureError, match=r"'extra' .*computed from parameters before"):
        chase_fx.trace(net, (x, True))


def test_buffers_that_the_forward_assigns_are_written() -> None:
    """``self.buffer = value`` changes the state of the traced and the slim module as it changes the model's."""

    class Net(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            return self.b(y - self.mean)

    net = Net().double()
    traced = chase_fx.trace(net, torch.randn(3, 4, dtype=torch.float64))
    assert not traced.get_buffer("mean").any()
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    for _ in range(3):
        x = torch.randn(3, 4, dtype=torch.float64)
        assert torch.equal(traced(x), net(x))
        slim(x)
    assert torch.equal(traced.get_buffer("mean"), net.mean)
    kept = slim.plan.kept_indices()["mean"][0]
    torch.testing.assert_close(slim.get_buffer("mean"), net.mean[kept].detach(), rtol=1e-12, atol=1e-12)


def test_a_forward_that_writes_to_its_input() -> None:
    """The example inputs are left as they were, and the graph writes to its own input as the model does."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            x *= 3
            return self.b(self.a(x))

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = x.clone()
    traced = chase_fx.trace(model, x)
    assert torch.equal(x, before)
    assert torch.equal(traced(x), model(before))
    assert torch.equal(x, before)


def test_parameters_that_a_forward_writes_are_put_back() -> None:
    """A moving average that a training forward writes to a parameter's data is in neither the model nor its copies."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training:
                self.b.weight.data.mul_(0.9).add_(0.1 * y.detach().mean(0))
            return self.b(y)

    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    before = model.b.weight.clone()
    traced = chase_fx.trace(model, x)
    assert torch.equal(model.b.weight, before)
    assert torch.equal(traced.b.weight, before)
    assert torch.equal(traced.train()(x), model.train()(x))
    assert torch.equal(traced.b.weight, model.b.weight)


@pytest.mark.parametrize("name", ["code", "graph", "meta", "plan", "info", "recompile", "train_graph"])
def test_children_with_names_of_a_graph_module(name: str) -> None:
    """A layer or a parameter may be called what a GraphModule calls its source, and keeps its name in the state."""

    class Model(Body):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(getattr(self, name)(self.a(x)))

    class Bare(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(8)))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * getattr(self, name))

    x = torch.randn(3, 4, dtype=torch.float64)
    for model in (Model().double(), Bare().double()):
        slim = chase_fx.prune(model, x)
        assert set(slim.state_dict()) == set(model.state_dict())
        assert slim.a.out_features == 4
        again = copy.deepcopy(slim)
        assert torch.equal(again(x), slim(x))
        assert torch.equal(torch.compile(slim, backend="eager", fullgraph=True)(x), slim(x))


def test_train_mode_that_fails_is_refused_in_train_mode_only() -> None:
    """Where the model can't run in train mode, the graph works in eval mode and says why it does not train."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("no labels")
            return self.b(self.a(x))

    net, x = Net().eval(), torch.randn(3, 4)
    traced = chase_fx.trace(net, x)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(CaptureError, match="no labels"):
        traced.train()(x)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_that_of_the_model(training: bool) -> None:
    """A feature extractor, whose copies come in train mode, is captured and given back in its own mode."""
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    net = create_feature_extractor(body, ["1", "2"]).train(training)
    x = torch.randn(3, 4)
    traced = chase_fx.trace(net, x)
    assert {m.training for m in traced.modules()} == {training}
    assert torch.equal(traced(x)["2"], net(x)["2"])
