"""Random small CNNs, judged by the library's masked reference and by the oracle that knows no labels."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import chase_fx
from tests.oracle import EXACT, UninformativeError, assert_exact, randomise

WIDTHS = (4, 6, 8, 12)


class ChannelsLastNorm(nn.Module):
    """Layer norm over the channels of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(kind: str, width: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(2 if width % 2 == 0 else 1, width)
    if kind == "layer":
        return ChannelsLastNorm(width)
    return nn.BatchNorm2d(width) if kind == "batch" else nn.Identity()


ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "leaky": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "none": nn.Identity,
}


class Conv(nn.Module):
    """Convolution, norm, activation."""

    def __init__(
        self, width: int, out: int, kind: str, act: str, *, groups: int = 1, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=kind in ("none", "layer"))
        self.norm = norm(kind, out)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, width: int, kind: str, act: str, groups: int) -> None:
        super().__init__()
        self.first = Conv(width, width, kind, act, groups=groups)
        self.second = Conv(width, width, kind, "none")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class PadShortcut(nn.Module):
    """The shortcut of a widening block is the input at every second pixel, padded with zero channels on both sides."""

    def __init__(self, width: int, kind: str, act: str) -> None:
        super().__init__()
        self.pad = width // 2
        self.conv = Conv(width, 2 * width, kind, act, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class Concat(nn.Module):
    def __init__(self, width: int, out: int, kind: str, act: str) -> None:
        super().__init__()
        self.conv = Conv(width, out, kind, act)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], 1)


class Split(nn.Module):
    """A convolution and a depthwise convolution on the two parts, put together in the other order."""

    def __init__(self, width: int, first: int, kind: str, act: str, *, chunk: bool) -> None:
        super().__init__()
        self.chunk = chunk
        self.first = width // 2 if chunk else first
        self.a = Conv(self.first, self.first, kind, act)
        self.b = Conv(width - self.first, width - self.first, kind, act, groups=width - self.first)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.chunk else torch.split(x, [self.first, x.shape[1] - self.first], 1)
        return torch.cat([self.b(b), self.a(a)], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        make = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.down, self.up = make(width, 4), make(4, width)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.up(F.relu(self.down(s))))
        return x * (gate[:, :, None, None] if self.linear else gate)


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Head(nn.Module):
    def __init__(self, width: int, *, flatten: bool, hidden: bool) -> None:
        super().__init__()
        self.flatten = flatten
        features = width * 4 if flatten else width
        self.hidden = nn.Linear(features, 10) if hidden else None
        self.out = nn.Linear(10 if hidden else features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 2).flatten(1) if self.flatten else x.mean((2, 3))
        return self.out(x if self.hidden is None else F.relu(self.hidden(x)))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


BLOCKS = (
    "conv", "grouped", "depthwise", "residual", "concat", "split", "shuffle", "excite", "pool", "pad", "scale", "up"
)  # fmt: skip


def block(draw: st.DrawFn, width: int) -> tuple[nn.Module, int]:
    """A random layer for ``width`` channels, and how many it gives."""
    kind = draw(st.sampled_from(("batch", "batch", "group", "layer", "none")))
    act = draw(st.sampled_from(sorted(ACTIVATIONS)))
    name = draw(st.sampled_from(BLOCKS))
    if name in ("conv", "concat", "grouped", "pad"):
        return widening(draw, name, width, kind, act)
    if name == "split":
        first = 2 * draw(st.integers(1, width // 2 - 1)) if width > 3 else 1
        return Split(width, first, kind if width % 4 == 0 else "batch", act, chunk=draw(st.booleans())), width
    make = {
        "residual": lambda: Residual(width, kind, act, draw(st.sampled_from(divisors(width)))),
        "depthwise": lambda: Conv(width, width, kind, act, groups=width),
        "shuffle": lambda: Shuffle(draw(st.sampled_from(divisors(width)))),
        "excite": lambda: SqueezeExcite(width, linear=draw(st.booleans())),
        "pool": lambda: draw(st.sampled_from((nn.MaxPool2d, nn.AvgPool2d)))(3, 1, 1),
        "scale": lambda: Scale(width),
        "up": lambda: nn.Upsample(scale_factor=2),
    }
    return make[name](), width


def widening(draw: st.DrawFn, name: str, width: int, kind: str, act: str) -> tuple[nn.Module, int]:
    """A random layer that may give another number of channels."""
    if name == "concat":
        out = draw(st.sampled_from((4, 6)))
        return Concat(width, out, kind, act), width + out
    if name == "grouped":
        groups = draw(st.sampled_from(divisors(width)))
        out = groups * draw(st.sampled_from((1, 2)))
        out = width if out < 4 else out
        return Conv(width, out, "none" if out % 2 else kind, act, groups=groups), out
    if name == "pad" and width % 2 == 0 and width <= 12:
        return PadShortcut(width, kind, act), 2 * width
    out = draw(st.sampled_from(WIDTHS))
    return Conv(width, out, kind, act, kernel=draw(st.sampled_from((1, 3)))), out


@st.composite
def nets(draw: st.DrawFn) -> nn.Module:
    """Up to six random blocks between a stem and a head."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    width = draw(st.sampled_from(WIDTHS))
    layers: list[nn.Module] = [Conv(3, width, "batch", "relu")]
    for _ in range(draw(st.integers(1, 6))):
        layer, width = block(draw, width)
        layers.append(layer)
        if width > 40:
            break
    layers.append(Head(width, flatten=draw(st.booleans()), hidden=draw(st.booleans())))
    net = nn.Sequential(*layers)
    return randomise(net, (torch.randn(4, 3, 8, 8, dtype=torch.float64),), seed)


def judge(net: nn.Module, sparsity: float, score: str, round_to: int) -> None:
    args = (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64),)
    traced = chase_fx.trace(net, args)
    channels = chase_fx.analyze(traced)
    assume(channels.groups)  # cuts that don't align with rows can freeze a small net as a whole
    plan = channels.plan(sparsity, score, round_to)
    slim = chase_fx.rewrite(traced, plan)
    assert not channels.unknown
    assert chase_fx.verify(traced, slim).difference <= EXACT
    for kept in plan.kept_indices().values():
        assert all(k is None or len(k) > 0 for k in kept)
    if sparsity >= 0.5 and round_to == 1:
        assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in net.parameters())
    alone = chase_fx.analyze(chase_fx.trace(net, (args[0][:1],))).plan(sparsity, score, round_to)
    assert list(plan.differences(alone)) == []
    try:
        assert_exact(net, slim, args)
    except UninformativeError:
        assume(False)  # a net whose few units are all dead tells nothing


OPTIONS = {
    "net": nets(),
    "sparsity": st.sampled_from((0.2, 0.5, 0.75, 0.95)),
    "score": st.sampled_from(("magnitude", "random")),
    "round_to": st.sampled_from((1, 1, 1, 2, 4)),
}
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@given(**OPTIONS)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=CHECKS)
def test_random_nets_are_exact(net: nn.Module, sparsity: float, score: str, round_to: int) -> None:
    """Any small CNN, pruned at any sparsity, equals its masked dense self, whatever the batch size of the capture."""
    judge(net, sparsity, score, round_to)


@pytest.mark.matrix
@given(**OPTIONS)
@settings(max_examples=2000, deadline=None, suppress_health_check=CHECKS)
def test_many_random_nets_are_exact(net: nn.Module, sparsity: float, score: str, round_to: int) -> None:
    """The same on two thousand nets."""
    judge(net, sparsity, score, round_to)
