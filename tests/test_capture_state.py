"""Capture of state: buffers, parameters, inputs and modes that a forward reads or writes."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import chase_fx
from chase_fx.errors import CaptureError
from chase_fx.graphs.shadows import graph_path
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


def test_every_name_of_a_traced_or_slim_module_is_shadowed() -> None:
    """All that these have and a module of torch's has not."""
    model, x = Body(), torch.randn(3, 4)
    model.forward = lambda x: model.b(model.a(x))  # type: ignore[method-assign]
    found = {name for m in (chase_fx.trace(model, x), chase_fx.prune(model, x)) for name in dir(m)}
    found -= {*dir(nn.Module()), "a", "b", "forward"}
    assert "train_graph" in found
    assert [name for name in sorted(found) if graph_path(name) == name] == []


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


class _Holder:
    def __init__(self) -> None:
        self.tensor = torch.ones(8, dtype=torch.float64)


class _Writing(Body):
    """Writes to something before it multiplies with it."""

    def __init__(self, write: Callable[[_Writing], Tensor]) -> None:
        super().__init__()
        self.tensor, self.inner = torch.ones(8, dtype=torch.float64), [{"holder": _Holder()}]
        self.write = (write,)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.write[0](self)
        return self.b(self.a(x) * scale)


def _of_array(array: np.ndarray) -> Tensor:
    return torch.as_tensor(array).mul_(0.5)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.a.bias.mul_(0.5),
        lambda m: m.a.bias.data.mul_(0.5),
        lambda m: torch.mul(m.a.bias, 0.5, out=m.a.bias),
        lambda m: m.a.bias[:3].mul_(0.5).sum(),
        lambda m: m.tensor.mul_(0.5),
        lambda m: m.tensor.copy_(m.tensor * 0.5),
        lambda m: m.inner[0]["holder"].tensor.mul_(0.5),
    ],
    ids=["parameter", "data", "out", "view", "attribute", "attribute that is read", "attribute of an object"],
)
def test_a_capture_is_no_call(write: Callable[[_Writing], Tensor]) -> None:
    """What the forward writes to is as it was, and the graph writes to it once in a call."""
    net, x = _Writing(write).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    traced = chase_fx.trace(net, x)
    for name, value in before.items():
        assert torch.equal(traced.state_dict()[name], value)
    for _ in range(3):
        assert torch.equal(traced(x), net(x))


_GLOBAL = torch.ones(8, dtype=torch.float64)


@pytest.mark.parametrize(
    "write",
    [
        lambda _: _of_array(np.ones(8)),
        lambda _: torch.from_numpy(np.ones(8)).mul_(0.5),
        lambda _: _GLOBAL.mul_(0.5),
        lambda _: _GLOBAL.copy_(_GLOBAL * 0.5),
    ],
    ids=["array", "memory of an array", "global", "global that is read"],
)
def test_writes_to_what_nobody_holds_are_refused(write: Callable[[_Writing], Tensor]) -> None:
    """The graph would go on with what it wrote, where the model may begin anew."""
    with pytest.raises(CaptureError, match=r"writes at .*test_capture_state.py:\d+ to a tensor of shape \(8,\)"):
        chase_fx.trace(_Writing(write).double(), torch.randn(3, 4, dtype=torch.float64))


def test_a_deep_copy_is_a_clone_without_gradient() -> None:
    """A deep copy of a tensor, or of a list of tensors, is made anew in every call, and passes no gradient."""

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            (before, _), given = copy.deepcopy([y.detach(), 1]), copy.deepcopy(x)
            y = y.mul_(2)
            return self.b(y + before) + given[:, :2]

    model, x = Copying(), torch.randn(4, 3)
    traced = chase_fx.trace(model, x)
    other = torch.randn(5, 3)
    assert torch.equal(traced(other), model(other))
    for module in (model, traced):
        module(other).square().sum().backward()
    assert torch.equal(traced.a.weight.grad, model.a.weight.grad)
    slim = chase_fx.prune(model, x, channel_sparsity=0.5)
    assert slim.a.weight.shape == (4, 3)


def test_what_torch_loads_in_a_first_capture_keeps_nothing_of_it() -> None:
    """The compiler takes the methods that nn.Module has when it is loaded for those that it always has."""
    code = (
        "import gc, sys, weakref, torch, chase_fx\n"
        "from torch import nn\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "traced = chase_fx.trace(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))\n"
        "import torch._dynamo.utils as compiler\n"
        "assert compiler.unpatched_nn_module_getattr is nn.Module.__getattr__\n"
        "assert compiler.unpatched_nn_module_call is nn.Module.__call__\n"
        "found = weakref.ref(traced)\n"
        "del traced\n"
        "gc.collect()\n"
        "print(found() is None)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "True"


class _Naming(nn.Module):
    """Checks a size with a message, as layers do that embed patches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[0] > 0, f"{x.shape[0]} samples")
        return self.b(self.a(x).relu())


def test_nothing_of_a_capture_stays_when_its_module_is_gone() -> None:
    traced = chase_fx.trace(_Naming(), torch.zeros(3, 4))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
    dense = weakref.ref(traced.get_submodule("a"))
    del traced
    gc.collect()
    assert dense() is None
    assert slim(torch.zeros(5, 4)).shape == (5, 2)
