"""Operands of a call have to fit each other whether or not what comes of them is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.oracle import EXACT, difference, masked_copy, randomise


class Net(nn.Module):
    """Two layers side by side and what ``join`` makes of them."""

    def __init__(self, join: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.c, self.b, self.d = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, self.a(x), self.c(x))


JOINS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], bool]] = {
    "one of two": (lambda m, y, z: m.b(torch.broadcast_tensors(y[:, None], z[None])[0]), True),
    "both": (lambda m, y, z: m.b(sum(torch.broadcast_tensors(y[:, None], z[None]))), True),
    "one, and the other elsewhere": (lambda m, y, z: m.b(torch.broadcast_tensors(y[:1], z)[0]) + m.d(z), True),
    "a single channel": (lambda m, y, z: m.b(torch.broadcast_tensors(y, z[:, :1])[0]), False),
    "expand_as": (lambda m, y, z: m.b(y.expand_as(z[None])), True),
    "expand_as, and the other elsewhere": (lambda m, y, z: m.b(y[:1].expand_as(z)) + m.d(z), True),
}


@pytest.mark.parametrize("name", JOINS)
def test_operands_that_are_broadcast_to_each_other(name: str) -> None:
    """They lose the same channels, so that they still fit."""
    join, tied = JOINS[name]
    model, x = randomise(Net(join)), torch.randn(3, 4, dtype=torch.float64)
    slim = chase_fx.prune(model, x)
    assert slim.get_submodule("a").out_features == 4
    if tied:
        assert torch.equal(*(slim.plan.kept_indices()[f"{name}.weight"][0] for name in "ac"))  # type: ignore[arg-type]
    for rows in (3, 5):
        x = torch.randn(rows, 4, dtype=torch.float64)
        assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT


NEW: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "numbers": lambda m, y, z: m.b(y.new(y.shape[0], 8).copy_(y)),
    "a column": lambda m, y, z: m.b(y * y.new(y.shape[0], 1).fill_(2.0)),
    "a size": lambda m, y, z: m.b(y + y.new(y.size()).zero_() + 1),
    "unpacked": lambda m, y, z: m.b(y + y.new(*y.shape).fill_(2.0)),
    "nothing": lambda m, y, z: m.b(y) + y.new().numel(),
    "data": lambda m, y, z: m.b(y) + y.new([1.0, 2.0]) + y.new(torch.ones(2).double()),
    "whole numbers": lambda m, y, z: m.b(y) + torch.arange(y.shape[0]).new(y.shape[0], 1).fill_(3),
}


@pytest.mark.parametrize("name", NEW)
def test_tensors_made_by_new(name: str) -> None:
    """``x.new(sizes)`` is ``x.new_empty(sizes)``: at other batches, and in a slim module with its sizes."""
    model, x = randomise(Net(NEW[name])), torch.randn(3, 4, dtype=torch.float64)
    traced, slim = chase_fx.trace(model, x), chase_fx.prune(model, x)
    assert slim.get_submodule("a").out_features == 4
    for rows in (3, 5):
        x = torch.randn(rows, 4, dtype=torch.float64)
        assert torch.equal(traced(x), model(x))
        assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT
