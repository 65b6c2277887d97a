"""Captures without arithmetic: the same graph and tape as on real values, or real values where those matter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chase_fx
from chase_fx.graphs import attempts, standins

W = 1024  # square layers of this width are large


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of a forward under the recorder was on real values."""
    found: list[bool] = []
    once = attempts._once

    def spy(model: nn.Module, inputs: Any, way: Any) -> Any:
        found.append(way.values)
        return once(model, inputs, way)

    monkeypatch.setattr(attempts, "_once", spy)
    return found


class Body(nn.Module):
    """A large layer, then ``function`` of its result."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(W, W), nn.Linear(W, 2)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, W) -> (N, 2)."""
        return self.last(self.function(self.first(x)))


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * (2 if x.abs().sum() > 0 else 3)


def _numpy(x: torch.Tensor) -> torch.Tensor:
    return x * float(np.abs(x.detach().numpy()).max())


def _swallow(x: torch.Tensor) -> torch.Tensor:
    try:
        return x * x.sum().item()
    except:  # noqa: E722  (as careless as a model can be)
        return x


class Twice(torch.autograd.Function):
    """Nobody knows what it does inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """x + x, if there is anything in it."""
        return x + x if x.numpy().any() else x.new_zeros(3)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """2 grad."""
        return 2 * grad


READING = {
    "bool": _double,
    "item": lambda x: x * x.sum().item(),
    "numpy": _numpy,
    "tolist": lambda x: x * x.sum(1).tolist()[0],
    "a mask": lambda x: x * x[x > 0].mean(),
    "nonzero": lambda x: x * x.nonzero().shape[0],
    "unique": lambda x: x * x.unique().shape[0],
    "equal": lambda x: x if torch.equal(x, x.clone().zero_()) else x * 2,
    "sparse": lambda x: x + x.to_sparse().values().shape[0],
    "swallowed": _swallow,
    "an autograd function": Twice.apply,
    "sections": lambda x: torch.cat(torch.tensor_split(x, (x.abs().sum() > 0).long().view(1) * 4, dim=1), 1),
}
BLIND = {
    "pointwise": lambda x: F.gelu(x).add_(1),
    "index": lambda x: x[:, x.argsort(1)[0]],
    "where": lambda x: torch.where(x > 0, x, 0),
    "softmax": lambda x: x.softmax(-1),
    "in place": lambda x: x.clone().masked_fill_(x > 0, 0),
    "metadata": lambda x: x if x.is_floating_point() and x.is_contiguous() and x.stride(0) else -x,
}


def _same_as_on_values(net: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chase_fx.trace(net, x)
    monkeypatch.setattr(standins, "CONTRACTIONS", {})
    monkeypatch.setattr(standins, "ELEMENTWISE", {})
    wanted = chase_fx.trace(net, x)
    assert str(found.graph) == str(wanted.graph)
    for a, b in zip(found.info.captures, wanted.info.captures, strict=True):
        assert [(op.op, [s.shape for s in op.outs]) for op in a.tape.ops] == [
            (op.op, [s.shape for s in op.outs]) for op in b.tape.ops
        ]
    torch.testing.assert_close(found(x), net.eval()(x))


@pytest.mark.parametrize("name", READING)
def test_values_are_computed_where_the_forward_reads_them(
    name: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What depends on a large layer's result is read into Python: the capture is done on real values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", chase_fx.SpecializationWarning)
        _same_as_on_values(Body(READING[name]), torch.randn(2, W), monkeypatch)
    assert runs[:2] == [False, True]


@pytest.mark.parametrize("name", BLIND)
def test_no_values_are_computed_where_nothing_reads_them(
    name: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture on stand-ins is the capture on real values."""
    _same_as_on_values(Body(BLIND[name]), torch.randn(2, W), monkeypatch)
    assert not any(runs)


TABLES: dict[int, torch.Tensor] = {}


def _table(x: torch.Tensor) -> torch.Tensor:
    if W not in TABLES:
        waves = torch.outer(torch.arange(W), torch.linspace(0, 1, W)).cos()
        TABLES[W] = waves @ waves
    return x @ TABLES[W]


def test_what_does_not_depend_on_the_inputs_is_computed(runs: list[bool]) -> None:
    """A table that outlives the forward in a cache of the model's own is the right one."""
    chase_fx.trace(Body(_table), torch.randn(2, W))
    assert not any(runs)
    assert TABLES.pop(W).abs().sum() > 0


class Initialised(nn.Module):
    """Sets a parameter from the data of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(W, W)
        self.shift = nn.Parameter(torch.zeros(W))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, W) -> (N, W)."""
        x = self.first(x)
        self.shift.data.copy_(-x.mean(0))
        return x + self.shift


def test_parameters_are_set_from_real_values(runs: list[bool]) -> None:
    """A parameter that the forward writes from activations is not written from stand-ins."""
    net, x = Initialised(), torch.randn(2, W)
    traced = chase_fx.trace(net, x)
    assert runs == [False, True]
    assert not traced.get_parameter("shift").any()
    traced(x)
    torch.testing.assert_close(traced.get_parameter("shift").data, -net.first(x).mean(0).detach())


class Cached(nn.Module):
    """Keeps what it computed in its first forward, and reads ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 4) -> (N, 4)."""
        if self.kept is None:
            self.kept = self.weight.exp()
        return F.dropout(x, 0.5, self.training) @ self.kept


def test_what_one_forward_caches_is_no_constant_of_the_next() -> None:
    """The capture in train mode computes again what the one in eval mode left in the modules."""
    traced = chase_fx.trace(Cached(), torch.randn(2, 4))
    assert not traced.info.constants
    assert traced.train_graph is None


def test_errors_are_those_of_the_forward(runs: list[bool]) -> None:
    """A model that fails on its inputs fails with torch's message about them."""
    with pytest.raises(chase_fx.errors.CaptureError, match="1024"):
        chase_fx.trace(nn.Sequential(nn.Linear(W, W), nn.Linear(W + 1, 2)), torch.randn(2, W))
    assert runs == [False, True]


class CachedAndRead(nn.Module):
    """Keeps a result of its first forward, and reads data after that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(W, W)
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, W) -> (N, W)."""
        if self.kept is None:
            self.kept = self.first(x).mean(0)
        return x * self.kept.abs().sum().item()


def test_what_a_capture_that_gave_up_caches_is_no_constant_of_the_next() -> None:
    """Each attempt starts from the model as it was given."""
    net, x = CachedAndRead(), torch.randn(2, W)
    with pytest.warns(chase_fx.SpecializationWarning):
        traced = chase_fx.trace(net, x)
    assert not traced.info.constants
    assert net.kept is None
    torch.testing.assert_close(traced(x), net(x))
