"""Capture of sizes: they stay live where code computes with them."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from tests.oracle import EXACT, difference, masked_copy
from tests.two_layers import Body


class Counted(nn.Module):
    """Sizes that are computed from an image's, in ways that Python code does."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) * self.scale(y)


@pytest.mark.parametrize(
    "scale",
    [
        lambda y: 100 / y.numel(),
        lambda y: y.numel() // y.shape[0] + 0.5,
        lambda y: math.sqrt(y.shape[2]),
        lambda y: math.ceil(y.shape[2] / 3) + math.floor(y.shape[3] / 3),
        lambda y: abs(y.shape[2] - 2 * y.shape[3]) + round(y.shape[2] * 0.3) + (y.shape[3] >> 1),
    ],
)
def test_computed_sizes_stay_live(scale: Any) -> None:
    """Counts and sizes keep their dense meaning in the slim graph, at every batch and image size."""
    net = Counted(scale).double()
    traced = chase_fx.trace(net, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    dense = Counted(scale).double()
    dense.load_state_dict(net.state_dict())
    kept = slim.plan.kept_indices()["b.weight"][1]
    with torch.no_grad():
        gone = [i for i in range(8) if i not in kept.tolist()]
        dense.b.weight[:, gone] = 0
    for shape in ((4, 3, 8, 8), (1, 3, 8, 8), (6, 3, 12, 10)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slim(x), dense(x), rtol=1e-9, atol=1e-9)


def test_computed_group_counts_scale() -> None:
    """A convolution with batch x channels groups works at another batch size after pruning."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.k = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(8, 72)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            b, c, h, w = y.shape
            kernels = self.k(y.mean((2, 3))).view(b * c, 1, 3, 3)
            return self.b(F.conv2d(y.reshape(1, b * c, h, w), kernels, padding=1, groups=b * c).view(b, c, h, w))

    slim = chase_fx.prune(Net().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert slim.get_submodule("a").out_channels == 4
    assert slim(torch.randn(5, 3, 6, 6, dtype=torch.float64)).shape == (5, 4, 6, 6)


@functools.lru_cache
def heads_of(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """Sizes that are computed once for each shape, as einops does."""
    return (*shape[:-1], heads, shape[-1] // heads)


def test_cached_functions_of_sizes_keep_them_live() -> None:
    """A cache of shapes that an earlier forward filled does not tie the graph to that forward's sizes."""

    class Net(Body):
        @functools.lru_cache  # noqa: B019
        def rows(self, shape: tuple[int, ...]) -> int:
            return shape[0] * shape[1]

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y.reshape(heads_of(y.shape, 2)).softmax(-2)
            return self.b(y.reshape(self.rows(y.shape), 8))

    model = Net().double()
    small, large = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 7, 4, dtype=torch.float64)
    model(small)
    slim = chase_fx.prune(model, small)
    assert torch.equal(chase_fx.trace(model, small)(large), model(large))
    assert slim(large).shape == (35, 2)
    assert all(type(size) is int for size in heads_of((2, 3, 8), 2))


def test_a_spread_keeps_two_units() -> None:
    """A dim whose variance is taken keeps two units at any sparsity: of one there is none."""

    class Standardised(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
            )
            return F.conv1d(x, weight.reshape_as(self.weight), self.bias)

    net = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), Standardised(8, 6, 1), nn.ReLU(), nn.Conv1d(6, 2, 1)).double()
    slim = chase_fx.prune(net, torch.randn(2, 3, 5, dtype=torch.float64), channel_sparsity=0.9)
    assert slim.get_parameter("0.weight").shape[0] == 2
    assert slim.get_parameter("2.weight").shape[0] == 1


def test_tensors_as_bounds_of_slices() -> None:
    """Two halves that a tensor of one number tells apart keep the same channels."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            half = torch.tensor([4])
            x = self.a(x)
            return self.b(torch.cat([x[:, : half[0]].tanh() * x[:, half[0] :].sigmoid()] * 2, 1))

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    slim = chase_fx.prune(model, (x,))
    assert slim.plan.new_shape("a.weight") == (4, 4)
    assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT


def test_types_of_python_are_dtypes() -> None:
    """``dtype=int`` can be written to generated code."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * torch.ones(1, dtype=float) + torch.ones(2, dtype=int)

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(chase_fx.trace(model, x)(x), model(x))
