"""Blocks on feature maps, (N, C, *s) -> (N, C', *s'), with one, two or three dims of space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.random_nets.attention import attention
from tests.random_nets.order import ordered
from tests.random_nets.parts import MAP_NORMS, activation, conv, divisors, part

__all__ = ["map_block", "plain"]

WIDTHS = (4, 6, 8, 12)
Sized = tuple[nn.Module, int, tuple[int, ...]]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_LINEAR = ("linear", "bilinear", "trilinear")


class StandardConv(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean = w.mean((1, 2, 3), keepdim=True)
        w = (w - mean) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BatchNormedConv(nn.Conv2d):
    """Weight standardisation by a batch norm of the weight."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(w, None, None, weight=self.gain.view(-1), training=True, momentum=0.0, eps=1e-6)
        w = w.reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Block(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, layer: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = layer, norm, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def plain(  # noqa: PLR0917
    draw: st.DrawFn, rank: int, width: int, out: int, groups: int = 1, kernel: int = 3, stride: int = 1
) -> Block:
    """Convolution, norm and activation, each drawn."""
    kind = draw(st.sampled_from(("batch", "batch", *sorted(MAP_NORMS))))
    style = draw(st.sampled_from(("plain", "plain", "plain", "standard", "batch normed", "weight norm", "spectral")))
    options = {"padding": kernel // 2, "groups": groups, "stride": stride, "bias": kind != "batch"}
    layer: nn.Module
    if rank == 2 and style in ("standard", "batch normed") and kernel > 1:
        layer = {"standard": StandardConv, "batch normed": BatchNormedConv}[style](width, out, kernel, **options)
    else:
        layer = conv(rank, width, out, kernel, **options)
        if style == "weight norm":
            layer = parametrizations.weight_norm(layer)
        elif style == "spectral" and groups == 1:
            layer = parametrizations.spectral_norm(layer)
    return Block(layer, MAP_NORMS[kind](out, rank), activation(draw))


class Residual(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class PadShortcut(nn.Module):
    """The shortcut of a widening block is the input at every second pixel, padded with zero channels on both sides."""

    def __init__(self, width: int, body: nn.Module) -> None:
        super().__init__()
        self.pad, self.body = width // 2, body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class Concat(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Split(nn.Module):
    """Two blocks on the two parts of the channels, put together in the other order."""

    def __init__(self, first: int, a: nn.Module, b: nn.Module, *, chunk: bool) -> None:
        super().__init__()
        self.first, self.a, self.b, self.chunk = first, a, b, chunk

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.chunk else torch.split(x, [self.first, x.shape[1] - self.first], 1)
        return torch.cat([self.b(b), self.a(a)], 1)


class Partial(nn.Module):
    """Only the first channels are convolved."""

    def __init__(self, first: int, body: nn.Module, *, write: bool) -> None:
        super().__init__()
        self.first, self.body, self.write = first, body, write

    def forward(self, x: Tensor) -> Tensor:
        if self.write:
            y = x.clone()
            y[:, : self.first] = self.body(x[:, : self.first])
            return y
        return torch.cat([self.body(x[:, : self.first]), x[:, self.first :]], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int, *, own: bool) -> None:
        super().__init__()
        self.groups, self.own = groups, own

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            return F.channel_shuffle(x, self.groups)
        n, c, *s = x.shape
        return x.reshape(n, self.groups, c // self.groups, *s).transpose(1, 2).reshape(n, c, *s)


class SqueezeExcite(nn.Module):
    def __init__(self, rank: int, width: int, *, linear: bool) -> None:
        super().__init__()
        self.linear, self.space = linear, tuple(range(2, rank + 2))
        make = nn.Linear if linear else lambda a, b: conv(rank, a, b, 1)
        self.down, self.up = make(width, 4), make(4, width)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean(self.space, keepdim=not self.linear)
        gate = torch.sigmoid(self.up(F.relu(self.down(s))))
        return x * (gate.view(*gate.shape, *(1 for _ in self.space)) if self.linear else gate)


class SpaceGate(nn.Module):
    """CBAM: the mean and the maximum over channels tell where to look."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * self.conv(y).sigmoid()


class Scale(nn.Module):
    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, *(1 for _ in range(rank))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Gate(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.body(x), 1)


class UNet(nn.Module):
    """Down, something, up, and what was there before beside it."""

    def __init__(self, down: nn.Module, inner: nn.Module, up: nn.Module, join: nn.Module) -> None:
        super().__init__()
        self.down, self.inner, self.up, self.join = down, inner, up, join

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.inner(self.down(x)))
        return self.join(torch.cat([y, x], dim=1))


class Film(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.make = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.make(x.flatten(2).mean(-1))[(...,) + (None,) * (x.dim() - 2)].chunk(2, 1)
        return x * (scale + 1) + shift


class Einsum(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(out, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc...,dc->nd...", x, self.w)


class DynamicConv(nn.Module):
    """The kernels of each sample are mixed by a softmax, and the samples are the groups of one convolution."""

    def __init__(self, width: int, out: int, kernels: int) -> None:
        super().__init__()
        self.out, self.mix = out, nn.Linear(width, kernels)
        self.weight = nn.Parameter(torch.randn(kernels, out, width, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        mix = self.mix(x.mean((2, 3))).softmax(1)
        weight = (mix @ self.weight.view(self.weight.shape[0], -1)).view(n * self.out, c, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n).view(n, self.out, h, w)


class Tokens(nn.Module):
    """A block on (N, L, C) for a feature map, by windows of an image or over all of its pixels."""

    def __init__(self, body: nn.Module, window: int = 0) -> None:
        super().__init__()
        self.body, self.window = body, window

    def forward(self, x: Tensor) -> Tensor:
        if not self.window:
            return x + self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        k = self.window
        y = x.permute(0, 2, 3, 1)
        n, h, w, c = y.shape
        y = y.view(n, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, k * k, c)
        y = self.body(y).view(n, h // k, w // k, k, k, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        return x + y.permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """Channels look at channels, in each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        attend = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return self.out((attend @ v).reshape(n, c, h, w))


def map_block(draw: st.DrawFn, width: int, size: Sequence[int]) -> Sized:
    """A random block, the channels and the size that it gives."""
    size, rank = tuple(size), len(size)
    name = draw(st.sampled_from(_KEEPING + _WIDENING + (_IMAGES if rank == 2 else ())))
    if name in _WIDENING:
        return _widening(draw, name, width, size)
    if name in _IMAGES:
        return _image(draw, name, width, size)
    return _keeping(draw, name, width, size), width, size


_KEEPING = (
    "residual", "depthwise", "split", "partial", "shuffle", "excite", "pool", "scale", "unet", "film", "tokens",
    "prelu", "twice", "ordered",
)  # fmt: skip
_WIDENING = ("conv", "conv", "grouped", "concat", "pad", "up", "down", "transposed", "glu", "einsum")
_IMAGES = ("windows", "space", "shuffled", "unshuffled", "dynamic", "channels")


def _keeping(draw: st.DrawFn, name: str, width: int, size: tuple[int, ...]) -> nn.Module:
    rank = len(size)
    first = width // 2 if name == "split" and width % 2 == 0 else part(draw, width)
    pools = (_MAX,) if rank == 3 and min(size) < 3 else (_MAX, _AVERAGE)  # torch wants the window inside of a volume
    halves = all(n % 2 == 0 and n >= 4 for n in size)  # and an instance norm more than one pixel
    make: dict[str, Callable[[], nn.Module]] = {
        "residual": lambda: Residual(
            plain(draw, rank, width, width, draw(st.sampled_from(divisors(width)))), plain(draw, rank, width, width)
        ),
        "depthwise": lambda: plain(draw, rank, width, width, width),
        "split": lambda: Split(
            first,
            plain(draw, rank, first, first),
            plain(draw, rank, width - first, width - first, width - first),
            chunk=2 * first == width and draw(st.booleans()),
        ),
        "partial": lambda: Partial(first, plain(draw, rank, first, first), write=draw(st.booleans())),
        "shuffle": lambda: Shuffle(draw(st.sampled_from(divisors(width))), own=draw(st.booleans())),
        "excite": lambda: SqueezeExcite(rank, width, linear=draw(st.booleans())),
        "pool": lambda: draw(st.sampled_from(pools))[rank - 1](3, 1, 1),
        "scale": lambda: Scale(rank, width),
        "unet": lambda: _unet(draw, rank, width) if halves else plain(draw, rank, width, width),
        "film": lambda: Film(width),
        "tokens": lambda: Tokens(attention(draw, width, math.prod(size))),
        "prelu": lambda: nn.PReLU(width),
        "ordered": lambda: ordered(draw, width, plain(draw, rank, width, width)),
        "twice": lambda: _twice(plain(draw, rank, width, width)),
    }
    return make[name]()


def _twice(body: nn.Module) -> nn.Module:
    return nn.Sequential(body, nn.ReLU(), body)


def _unet(draw: st.DrawFn, rank: int, width: int) -> nn.Module:
    inner = draw(st.sampled_from(WIDTHS))
    groups = draw(st.sampled_from([g for g in divisors(inner) if width % g == 0]))
    up = draw(
        st.sampled_from(
            (
                _TRANSPOSED[rank - 1](inner, width, 2, 2, groups=groups),
                nn.Sequential(nn.Upsample(scale_factor=2, mode=_LINEAR[rank - 1]), conv(rank, inner, width, 1)),
            )
        )
    )
    return UNet(
        plain(draw, rank, width, inner, kernel=3, stride=2),
        plain(draw, rank, inner, inner),
        up,
        plain(draw, rank, 2 * width, width),
    )


def _widening(  # noqa: PLR0911
    draw: st.DrawFn, name: str, width: int, size: tuple[int, ...]
) -> Sized:
    """A random block that may give another number of channels, or another size."""
    rank, out = len(size), draw(st.sampled_from(WIDTHS))
    half, double = tuple((n + 1) // 2 for n in size), tuple(2 * n for n in size)
    if name == "concat" and width <= 16:
        more = draw(st.sampled_from((4, 6)))
        return Concat(plain(draw, rank, width, more)), width + more, size
    if name == "grouped":
        groups = draw(st.sampled_from(divisors(width)))
        out = max(groups, 2) * draw(st.sampled_from((1, 2)))
        if out % groups == 0:
            return plain(draw, rank, width, out, groups), out, size
    if name == "pad" and rank == 2 and width % 2 == 0 and width <= 12 and min(size) >= 4:
        return PadShortcut(width, plain(draw, rank, width, 2 * width, stride=2)), 2 * width, half
    if name == "down" and min(size) >= 4:
        return plain(draw, rank, width, out, stride=2), out, half
    if name == "up" and max(size) <= 4:
        return nn.Upsample(scale_factor=2), width, double
    if name == "transposed" and max(size) <= 4:
        groups = draw(st.sampled_from([g for g in divisors(width) if out % g == 0]))
        return _TRANSPOSED[rank - 1](width, out, 4, 2, 1, groups=groups), out, double
    if name == "glu":
        return Gate(plain(draw, rank, width, 2 * out)), out, size
    if name == "einsum":
        return Einsum(width, out), out, size
    return plain(draw, rank, width, out, kernel=draw(st.sampled_from((1, 3)))), out, size


def _image(draw: st.DrawFn, name: str, width: int, size: tuple[int, ...]) -> Sized:
    """A random block for images."""
    even = all(n % 2 == 0 for n in size)
    if name == "windows" and even:
        return Tokens(attention(draw, width, 4), 2), width, size
    if name == "space":
        return SpaceGate(), width, size
    if name == "shuffled" and width % 4 == 0 and max(size) <= 4:
        return nn.PixelShuffle(2), width // 4, tuple(2 * n for n in size)
    if name == "unshuffled" and even and width <= 8 and min(size) >= 4:
        return nn.PixelUnshuffle(2), 4 * width, tuple(n // 2 for n in size)
    out = draw(st.sampled_from(WIDTHS))
    if name == "channels":
        return ChannelAttention(width, draw(st.sampled_from(divisors(width)))), width, size
    return DynamicConv(width, out, draw(st.integers(2, 3))), out, size
