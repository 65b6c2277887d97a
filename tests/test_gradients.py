"""The slim module learns what the masked dense one does: gradients, batch statistics, dropout, both modes."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from tests import gradients, nets, rule_nets
from tests.oracle import EXACT, randomise

NAMES = [*nets.NETS, *(f"rule_nets.{name}" for name in rule_nets.RULE_NETS)]
UNJUDGED = {
    "rule_nets.grouped_mm": "torch has no kernel for it in double precision",
    "rule_nets.loss": "the mean inside of a loss is hidden from a masked model, which counts removed channels too",
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNJUDGED])
def test_gradients_are_those_of_the_masked_model(name: str) -> None:
    """Parameters and inputs of the slim module get the kept slices of the masked dense model's gradients."""
    home, _, own = name.rpartition(".")
    net, x = (rule_nets if home else nets).build(own)
    traced = chase_fx.trace(net, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    assert gradients.slim_gap(net, slim, x, training=False) <= EXACT


class Net(nn.Module):
    """Batch norms, dropout, a residual, and a second head in train mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8, momentum=None)
        self.drop, self.out, self.second = nn.Dropout(p), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = F.relu(self.norm_a(self.a(x)))
        second = self.second(F.dropout(y.mean((2, 3)), self.drop.p, self.training)) if self.training else None
        y = y + F.relu(self.norm_b(self.b(y)))
        return self.out(self.drop(y.mean((2, 3)))), second


def prepared(p: float) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 6, 6, dtype=torch.float64),)
    return randomise(Net(p), x), x


@pytest.mark.parametrize("training", [False, True])
def test_statistics_and_second_heads(training: bool) -> None:
    """After a step in train mode the running statistics are the kept ones of the masked model; both heads learn."""
    net, x = prepared(0.0)
    slim = chase_fx.prune(net, x, channel_sparsity=0.5)
    before = {n: b.clone() for n, b in slim.named_buffers()}
    assert gradients.slim_gap(net, slim, x, training=training) <= EXACT
    slim.train(training)
    first, second = slim(*x)
    assert (second is not None) == training
    assert first.shape == (4, 4)
    moved = {n for n, b in slim.named_buffers() if not torch.equal(b, before[n])}
    assert moved == ({n for n in before if n.startswith("norm_")} if training else set())


class LayerDrop(nn.Module):
    """Whole layers are left out at random in train mode."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw
        self.first, self.layer, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if not (self.training and self.draw() < 0.5):
            y = y + F.relu(self.layer(y))
        return self.out(y)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand()), lambda: torch.rand([])])
def test_layers_left_out_at_random_leave_generators_alone(draw: Callable[[], float]) -> None:
    """The capture moves no generator, and the graph decides as the model does (see tests/test_layerdrop.py)."""
    net, x = randomise(LayerDrop(draw)), torch.randn(3, 6, dtype=torch.float64)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    traced = chase_fx.trace(net, x)
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(traced.eval()(x), net(x))
    for seed in range(6):
        found = []
        for root in (net, traced):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            found.append(root.train()(x))
        assert torch.equal(*found)


def test_dropout_draws_what_the_model_draws() -> None:
    """From one seed the capture drops the elements that the model drops, and learns the same."""
    net, x = prepared(0.4)
    found = []
    for root in (net, chase_fx.trace(net, x)):
        trained = copy.deepcopy(root).train()
        torch.manual_seed(3)
        found.append(gradients.learned(trained, trained(*x), x))
        found[-1]["output state"] = torch.get_rng_state().double()
    assert gradients.gap(*found) == 0.0


class Region(nn.Module):
    """A layer in the middle runs in a region without gradients."""

    def __init__(self, region: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with self.region():
            z = self.second(y.relu())
        return self.last(z.clone())


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_regions_without_gradients(region: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    """Nothing in front of one learns, and its layers shrink as others do."""
    net, x = Region(region).eval(), torch.randn(3, 6)
    slim = chase_fx.prune(net, x, channel_sparsity=0.5)
    assert (slim.second.in_features, slim.second.out_features) == (4, 4)
    for module in (net, chase_fx.trace(net, x), slim):
        module(x).sum().backward()
        learning = {name for name, p in module.named_parameters() if p.grad is not None}
        assert learning == {"last.weight", "last.bias"}


def test_a_region_of_inference_mode_that_is_off() -> None:
    """Has gradients."""
    net, x = Region(functools.partial(torch.inference_mode, mode=False)).eval(), torch.randn(3, 6)
    traced = chase_fx.trace(net, x)
    traced(x).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())
