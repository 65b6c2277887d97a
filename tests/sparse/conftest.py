"""A small residual CNN with its channel groups written by hand, and loops that train it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Member:
    tensor: str
    dim: int
    positions: Tensor
    producer: bool = False


@dataclass(frozen=True)
class Group:
    name: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Channels:
    """Stands for a ChannelGraph; a plan is just the kept units."""

    groups: tuple[Group, ...]

    def plan_keeping(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert all(bool(mask.any()) for mask in kept.values())
        return dict(kept)


class ResidualNet(nn.Module):
    """stem (C) -> block (C -> M -> C) + skip -> pool -> linear."""

    def __init__(self, channels: int = 8, middle: int = 12) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv1, self.bn1 = nn.Conv2d(channels, middle, 3, padding=1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))


def one_to_one(size: int) -> Tensor:
    return torch.arange(size).view(-1, 1)


def norm(name: str, size: int) -> list[Member]:
    return [Member(f"{name}.{t}", 0, one_to_one(size)) for t in ("weight", "bias", "running_mean", "running_var")]


def channels_of(net: ResidualNet) -> Channels:
    c, m = net.stem.out_channels, net.conv1.out_channels
    stream = Group(
        "stem.weight:0",
        c,
        (
            Member("stem.weight", 0, one_to_one(c), producer=True),
            *norm("bn0", c),
            Member("conv1.weight", 1, one_to_one(c)),
            Member("conv2.weight", 0, one_to_one(c), producer=True),
            *norm("bn2", c),
            Member("fc.weight", 1, one_to_one(c)),
        ),
    )
    inner = Group(
        "conv1.weight:0",
        m,
        (
            Member("conv1.weight", 0, one_to_one(m), producer=True),
            Member("conv1.bias", 0, one_to_one(m)),
            *norm("bn1", m),
            Member("conv2.weight", 1, one_to_one(m)),
        ),
    )
    return Channels((stream, inner))


def rewrite(net: ResidualNet, kept: Mapping[str, Tensor]) -> ResidualNet:
    """A slim copy, by slicing the state dict."""
    slim = ResidualNet(*(int(kept[name].sum()) for name in ("stem.weight:0", "conv1.weight:0"))).to(net.fc.weight.dtype)
    state = dict(net.state_dict())
    for group in channels_of(net).groups:
        keep = kept[group.name].nonzero().squeeze(1)
        for member in group.members:
            state[member.tensor] = state[member.tensor].index_select(member.dim, keep)
    slim.load_state_dict(state)
    return slim.train(net.training)


class Shrinker:
    """Cuts the buffers and sizes of a ResidualNet to the kept units, given in the first numbering."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, Tensor]] = {}
        self.calls = 0

    def __call__(self, net: nn.Module, kept: Mapping[str, Tensor]) -> None:
        self.calls += 1
        before = self.before.get(id(net), {name: torch.ones_like(mask) for name, mask in kept.items()})
        for norms, name in ((("bn0", "bn2"), "stem.weight:0"), (("bn1",), "conv1.weight:0")):
            here = kept[name][before[name]].nonzero().squeeze(1)
            for attribute in norms:
                bn = getattr(net, attribute)
                bn.running_mean, bn.running_var = bn.running_mean[here], bn.running_var[here]
                bn.num_features = len(here)
        self.before[id(net)] = {name: mask.clone() for name, mask in kept.items()}


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
