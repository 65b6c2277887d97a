"""What a forward before the capture left in the modules does not tie the graph to its sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx


class Detector(nn.Module):
    """Keeps the places of the last image's pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 2, 1)
        self.shape: Any = None
        self.calls = 0

    def remember(self, shape: Any) -> None:
        rows = torch.arange(shape[2], dtype=self.head.weight.dtype) / shape[2]
        self.places = rows[:, None] + torch.arange(shape[3], dtype=self.head.weight.dtype)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        y = self.head(self.conv(x).relu())
        if self.shape != y.shape:
            self.remember(y.shape)
        return y + self.places


def _quietly(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def wrapped(*args: Any) -> None:
        with torch.no_grad():
            method(*args)

    return wrapped


class ByList(Detector):
    """Keeps the sizes in a list, and what belongs to them by a method that is wrapped."""

    @_quietly
    def remember(self, shape: Any) -> None:
        self.places = torch.ones(shape[2:], dtype=self.head.weight.dtype).cumsum(0)
        self.shape = list(shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x).relu())
        if self.shape != list(y.shape):
            self.remember(y.shape)
        return y + self.places


class ByMask(Detector):
    """Has no sizes but those of what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x).relu())
        if self.shape is None or self.shape.size(0) != y.shape[2]:
            self.shape = torch.ones(y.shape[2], y.shape[2], dtype=y.dtype).tril()
        return self.shape @ y


@pytest.mark.parametrize("make", [Detector, ByList, ByMask])
def test_what_is_made_again_for_other_sizes_is_made_in_every_call(make: Callable[[], nn.Module]) -> None:
    """Images of other sizes, and more of them, go through the graph as they go through the model."""
    model = make().double().eval()
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    model(image)
    traced = chase_fx.trace(model, image)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    chase_fx.verify(traced, slim)
    for size in ((1, 3, 8, 8), (2, 3, 8, 8), (1, 3, 12, 8), (3, 3, 6, 10)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(traced(x), model(x))
        assert slim(x).shape == model(x).shape


def test_what_differs_from_what_is_made_again_is_kept() -> None:
    """Places that were written by hand are part of the model at these sizes, so the graph is one for these sizes."""
    model = Detector().eval()
    image = torch.randn(1, 3, 8, 8)
    model(image)
    model.places = model.places + 1
    traced = chase_fx.trace(model, image)
    torch.testing.assert_close(traced(image), model(image))
    more = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(traced(more), model(more))
    assert len(traced.variants.others) == 1
