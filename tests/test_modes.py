"""Train and eval mode: the traced module does what the model does in each, also where modules are in different ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError, OtherPathError

X = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Taken apart in a graph, and deciding by its mode: by a constant, or by another structure."""

    def __init__(self, channels: int, *, other_structure: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other_structure = other_structure

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.norm(self.conv(x)), 0.5, self.training)
        if self.other_structure and self.training:
            y = y.sin() + 1
        return torch.relu(y)


class Net(nn.Module):
    def __init__(self, *, other_structure: bool = False) -> None:
        super().__init__()
        self.stem = Block(3, other_structure=other_structure)
        self.body = Block(8, other_structure=other_structure)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x))).mean((2, 3))


class Frozen(Net):
    """The idiom of detectors: the stem never trains."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.stem.eval()
        for parameter in self.stem.parameters():
            parameter.requires_grad = False
        return self


def same(model: nn.Module, traced: nn.Module) -> None:
    """Both give the same result and leave the same buffers, drawing the same numbers."""
    outs = []
    for module in (model, traced):
        torch.manual_seed(1)
        outs.append(module(X))
    assert torch.equal(*outs)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, traced.get_buffer(name))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is traced.get_parameter(name).requires_grad


@pytest.mark.parametrize("cls", [Net, Frozen])
@pytest.mark.parametrize("other_structure", [False, True])
def test_train_and_eval_are_those_of_the_model(cls: type[Net], other_structure: bool) -> None:
    """``train()`` and ``eval()`` of the traced module do what those of the model do, in copies and pickles too."""
    model = cls(other_structure=other_structure).double().eval()
    traced = chase_fx.trace(model, X)
    slim = chase_fx.prune(model, X)
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        reference = copy.deepcopy(model)
        same(reference, module)
        for mode in (True, False, True):
            same(reference.train(mode), module.train(mode))
    slim.train()
    assert slim.get_submodule("stem.norm").training is (cls is Net)
    assert slim.get_parameter("stem.conv.weight").requires_grad is (cls is Net)
    before = slim.get_buffer("stem.norm.running_mean").clone()
    slim(X)
    assert torch.equal(before, slim.get_buffer("stem.norm.running_mean")) is (cls is Frozen)


@pytest.mark.parametrize("other_structure", [False, True])
def test_modes_as_the_model_has_them(other_structure: bool) -> None:
    """A model in train mode is captured with the modes that its modules have; others are refused."""
    model = Net(other_structure=other_structure).double().train()
    model.stem.eval()
    traced = chase_fx.trace(model, X)
    same(model, traced)
    same(model.eval(), traced.eval())
    traced.train()
    with pytest.raises(OtherPathError, match="mode of 'stem'"):
        traced(X)
    traced.stem.eval()
    model.train().stem.eval()
    same(model, traced)
    for module in (model, traced):
        module.eval()
        module.body.train()
    same(model, traced)  # what is read is as in train mode
    traced.stem.train()
    traced.body.eval()
    with pytest.raises(OtherPathError, match="mode of 'stem'"):
        traced(X)


def test_leaves_have_a_mode_of_their_own() -> None:
    """The mode of a layer that stays a call of the graph can be set at any time."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 1)).double().eval()
    traced = chase_fx.trace(model, X)
    for module in (model, traced):
        module.train()
        module.get_submodule("1").eval()
    same(model, traced)


def test_a_train_that_changes_values_is_refused() -> None:
    """Layers that merge weights when they are put in eval mode do more than a graph can."""

    class Merging(Net):
        def train(self, mode: bool = True) -> Any:
            with torch.no_grad():
                self.head.weight.mul_(2 if mode else 0.5)
            return super().train(mode)

    with pytest.raises(CaptureError, match=r"Merging.train\(\) changes the values"):
        chase_fx.trace(Merging().double(), X)


def test_modes_compile() -> None:
    """A graph that looks at the modes of its modules compiles as a whole."""
    traced = chase_fx.trace(Net().double().eval(), X)
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), traced(X))


@pytest.mark.parametrize("kind", ["branch", "dropout", "norm"])
def test_the_mode_of_a_layer_that_its_parent_reads(kind: str) -> None:
    """A layer that stays a call of the graph has a mode that the code around it may decide by."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.drop, self.bn = nn.Linear(4, 6), nn.Linear(6, 2), nn.Dropout(0.4), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if kind == "branch" and self.drop.training:
                y = y.tanh()
            if kind == "norm":
                bn = self.bn
                y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)
            return self.c(F.dropout(y, 0.5, self.drop.training) if kind == "dropout" else self.drop(y))

    model, x = Reads().double(), torch.randn(5, 4, dtype=torch.float64)
    traced = chase_fx.trace(model, x)
    for mode in (True, False):
        results = []
        for module in (model.train(mode), traced.train(mode)):
            torch.manual_seed(0)
            results.append(module(x))
        assert torch.equal(*results)


class _Unset(nn.Module):
    """A default that is not equal to itself, beside what depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, fill: float = float("nan")) -> torch.Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))


def test_a_default_that_is_no_number_is_the_same_in_both_modes() -> None:
    model, x = _Unset(), torch.ones(3, 4)
    slim = chase_fx.prune(model.eval(), x)
    assert torch.equal(slim(x), slim.b(slim.a(x)))
    torch.manual_seed(0)
    want = slim.b(nn.functional.dropout(slim.a(x), 0.5))
    torch.manual_seed(0)
    assert torch.equal(slim.train()(x), want)
