"""A small residual CNN with its channel groups written by hand, and what cuts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    least: int = 1
    multiple: int = 1


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
