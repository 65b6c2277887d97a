"""A random network: a stem for its kind of input, blocks, a change of layout perhaps, more blocks, a head."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import randomise
from tests.random_nets.maps import WIDTHS, map_block, plain
from tests.random_nets.tokens import token_block

__all__ = ["Drawn", "nets"]

VOCABULARY = 7


@dataclass(frozen=True)
class Drawn:
    """A net in double precision and eval mode, and what to call it with."""

    net: nn.Module
    kind: str
    size: tuple[int, ...]

    def inputs(self, batch: int) -> Tensor:
        """Inputs of which the first are the same at every batch size."""
        generator = torch.Generator().manual_seed(7)
        if self.kind == "ids":
            return torch.randint(0, VOCABULARY, (4, *self.size), generator=generator)[:batch]
        return torch.randn(4, 3, *self.size, generator=generator, dtype=torch.float64)[:batch]


class Patches(nn.Module):
    """An image as a sequence of patches of 2 x 2 pixels."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Conv2d(3, width, 2, 2) if kind == "conv" else nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return self.project(x).flatten(2).transpose(1, 2)
        if self.kind == "unfold":
            return self.project(F.unfold(x, 2, stride=2).transpose(1, 2))
        if self.kind == "windows":
            y = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
            return self.project(y.reshape(x.shape[0], -1, 12))
        n, c, h, w = x.shape
        y = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return self.project(y.reshape(n, h * w // 4, 4 * c))


class ToTokens(nn.Module):
    """(N, C, *s) -> (N, L, C)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "permute":
            return x.movedim(1, -1).flatten(1, -2)
        if self.kind == "view":
            return x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        return x.flatten(2).transpose(1, 2)


class ToMap(nn.Module):
    """(N, L, C) -> (N, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class MapHead(nn.Module):
    def __init__(self, width: int, size: tuple[int, ...], kind: str, *, hidden: bool) -> None:
        super().__init__()
        self.kind, self.space = kind, tuple(range(2, 2 + len(size)))
        features = width * 2 ** len(size) if kind == "flatten" else width
        self.pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(size) - 1](2)
        self.hidden = nn.Linear(features, 10) if hidden else None
        self.out = nn.Linear(10 if hidden else features, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "flatten":
            x = self.pool(x).flatten(1)
        else:
            x = x.mean(self.space) if self.kind == "mean" else x.amax(self.space)
        return self.out(x if self.hidden is None else F.relu(self.hidden(x)))


class TokenHead(nn.Module):
    def __init__(self, width: int, length: int, kind: str, table: nn.Embedding | None) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1) if kind == "attention" else None
        self.out = nn.Linear(width * length if kind == "flatten" else width, 5 if table is None else VOCABULARY)
        if table is not None:
            self.out.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.kind == "first":
            x = x[:, 0]
        elif self.kind == "mean":
            x = x.mean(dim=1)
        elif self.kind == "max":
            x = x.max(1)[0]
        elif self.kind == "flatten":
            x = x.reshape(x.shape[0], -1)
        elif self.score is not None:
            x = (self.score(x).softmax(1).mT @ x).squeeze(1)
        return self.out(x)


@st.composite
def nets(draw: st.DrawFn) -> Drawn:
    """Up to six blocks between a stem and a head, for images, signals, volumes or token ids."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    kind = draw(st.sampled_from(("image", "image", "patches", "patches", "ids", "ids", "signal", "volume")))
    build = _sequence if kind in ("ids", "patches") else _map
    drawn = build(draw, kind)
    randomise(drawn.net, (drawn.inputs(4),), seed)
    return drawn


def _map(draw: st.DrawFn, kind: str) -> Drawn:
    size = {"image": (8, 8), "signal": (8,), "volume": (4, 4, 4)}[kind]
    now, width = size, draw(st.sampled_from(WIDTHS))
    layers: list[nn.Module] = [plain(draw, len(size), 3, width)]
    for _ in range(draw(st.integers(1, 5))):
        layer, width, now = map_block(draw, width, now)
        layers.append(layer)
        if width > 40:
            break
    if width % 2 == 0 and width <= 16 and len(now) < 3 and max(now) <= 8 and draw(st.booleans()):
        layers.append(ToTokens(draw(st.sampled_from(("permute", "reshape", "flatten")))))
        length = now[0] ** len(now)
        layers += _tokens(draw, width, length, None)
    else:
        head = draw(st.sampled_from(("flatten", "mean", "max")))
        layers.append(MapHead(width, now, head, hidden=draw(st.booleans())))
    return Drawn(nn.Sequential(*layers), kind, size)


def _sequence(draw: st.DrawFn, kind: str) -> Drawn:
    width, length = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from((4, 6)))
    if kind == "ids":
        table = nn.Embedding(VOCABULARY, width)
        layers = [table, *_tokens(draw, width, length, table if draw(st.booleans()) else None)]
        return Drawn(nn.Sequential(*layers), kind, (length,))
    patch = Patches(width, draw(st.sampled_from(("conv", "unfold", "windows", "view"))))
    return Drawn(nn.Sequential(patch, *_tokens(draw, width, 4, None)), "image", (4, 4))


def _tokens(draw: st.DrawFn, width: int, length: int, tied: nn.Embedding | None) -> list[nn.Module]:
    layers: list[nn.Module] = []
    first = width
    for _ in range(draw(st.integers(1, 4))):
        layer, width, length = token_block(draw, width, length)
        layers.append(layer)
    if tied is None and length > 1 and draw(st.integers(0, 5)) == 0:
        block, width, size = map_block(draw, width, (length,))
        head = draw(st.sampled_from(("flatten", "mean", "max")))
        return [*layers, ToMap(), block, MapHead(width, size, head, hidden=draw(st.booleans()))]
    if tied is not None and width != first:
        layers.append(nn.Linear(width, first))
        width = first
    kinds = ("first", "mean", "max", "attention", "all", *(("flatten",) if tied is None else ()))
    return [*layers, TokenHead(width, length, draw(st.sampled_from(kinds)), tied)]
