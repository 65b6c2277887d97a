"""Nets over sequences whose code depends on the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chase_fx.graphs.traced import TracedModule
from tests.oracle import randomise


class Net(nn.Module):
    """Normalised features of a sequence, between two layers; ``rule`` decides by the length."""

    def __init__(self, rule: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.other = nn.Linear(4, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(12, 3)
        self.rule = rule

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.norm(self.first(x).mT).mT)
        y = self.rule(self, y)
        out = self.last(y)
        return (out, y.mean()) if self.training else out


def branch(net: Net, y: Tensor) -> Tensor:
    """A table as long as the sequence, for short ones."""
    z = net.other(y)
    return z + torch.linspace(0, 1, y.shape[1], dtype=y.dtype)[:, None] if y.shape[1] < 6 else z.relu()


def loop(net: Net, y: Tensor) -> Tensor:
    """A recurrence."""
    state = torch.zeros_like(y[:, 0])
    for t in range(y.shape[1]):
        state = torch.tanh(net.other(state) + y[:, t])
    return y + state[:, None]


def padded(_: Net, y: Tensor) -> Tensor:
    """To whole windows, and back."""
    extra = -y.shape[1] % 4
    if extra:
        y = F.pad(y, (0, 0, 0, extra))
    y = y.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)
    return y[:, :-extra] if extra else y


def sequence(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def model_of(rule: Callable[[Net, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return randomise(Net(rule), (sequence(8),))


def others(module: TracedModule) -> int:
    return len(module.variants.others)
