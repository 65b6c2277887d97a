"""Loops that train the net of :mod:`tests.sparse.hand_net`, on its own and as fixtures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.sparse.hand_net import Channels, Group, Member, ResidualNet, Shrinker, channels_of, one_to_one, rewrite

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


class Run:
    """A net, its optimizer and its trainer on endless random data that depends on the step alone."""

    def __init__(
        self, method: Any, optimizer: str = "sgd", *, seed: int = 0, dtype: Any = torch.float64, **options: Any
    ):
        torch.manual_seed(seed)
        self.net = ResidualNet().to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.dtype = dtype
        options.setdefault("total_steps", 40)
        if options.get("channel_sparsity", 0.4):
            options.setdefault("channels", channels_of(self.net))
            options.setdefault("rewrite", rewrite)
        if options.get("live_shrink"):
            options.setdefault("shrink", Shrinker())
        self.trainer = method(self.net, self.optimizer, **options)
        self.steps = 0

    def step(self, count: int = 1, check: Callable[[Run], None] | None = None) -> Run:
        for _ in range(count):
            self.steps += 1
            generator = torch.Generator().manual_seed(self.steps)
            x = torch.randn(6, 3, 6, 6, generator=generator, dtype=self.dtype)
            y = torch.randint(10, (6,), generator=generator)
            self.loss = nn.functional.cross_entropy(self.net(x), y)
            self.loss.backward()
            self.optimizer.step()
            self.trainer.step()
            if check is not None:
                check(self)
            self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "trainer": self.trainer.state_dict(),
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def load(self, state: Mapping[str, Any], steps: int) -> Run:
        state = copy.deepcopy(dict(state))
        self.trainer.load_state_dict(state["trainer"])
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = steps
        return self


@pytest.fixture
def run() -> type[Run]:
    return Run


@pytest.fixture
def make_group() -> Callable[..., Group]:
    def make(name: str, size: int, *members: tuple[str, int, Tensor | None, bool]) -> Group:
        parts = (Member(t, d, one_to_one(size) if p is None else p, flag) for t, d, p, flag in members)
        return Group(name, size, tuple(parts))

    return make


@pytest.fixture
def make_channels() -> type[Channels]:
    return Channels


@pytest.fixture
def residual() -> type[ResidualNet]:
    return ResidualNet


@pytest.fixture
def residual_channels() -> Callable[[ResidualNet], Channels]:
    return channels_of
