"""What blocks are made of: activations, and norms of feature maps and of sequences, from torch and written by hand."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "MAP_NORMS", "TOKEN_NORMS", "DropPath", "activation", "conv", "divisors", "part"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "leaky": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "none": nn.Identity,
}


def activation(draw: st.DrawFn) -> nn.Module:
    return ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]()


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def part(draw: st.DrawFn, width: int) -> int:
    """A random proper part of ``width``."""
    return draw(st.integers(1, width - 1))


def conv(rank: int, *args: int, **options: object) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](*args, **options)


class DropPath(nn.Module):
    """Stochastic depth, written by hand: some samples lose the branch in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
        return x * mask / 0.7


# -- norms of feature maps, (N, C, *s) --------------------------------------------------------------------------------


class LayerNormByPermute(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class LayerNormByHand(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.view = (-1, *(1 for _ in range(rank)))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(spread + 1e-6)
        return self.weight.view(self.view) * x + self.shift.view(self.view)


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.space = tuple(range(2, rank + 2))
        self.gamma = nn.Parameter(torch.ones(1, width, *(1 for _ in self.space)))
        self.beta = nn.Parameter(torch.zeros(1, width, *(1 for _ in self.space)))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=self.space, keepdim=True)
        return self.gamma * (x * (size / (size.mean(1, keepdim=True) + 1e-6))) + self.beta + x


class Length(nn.Module):
    """Nearly unit length. (Vectors of one element at unit length would all tie in a maximum.)"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.linalg.vector_norm(x, dim=self.dim, keepdim=True) + 1)


_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

MAP_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda width, rank: _BATCH[rank - 1](width),
    "group": lambda width, rank: nn.GroupNorm(2 if width % 2 == 0 else 1, width),
    "one group": lambda width, rank: nn.GroupNorm(1, width),
    "instance": lambda width, rank: _INSTANCE[rank - 1](width, affine=True),
    "layer": lambda width, rank: LayerNormByPermute(width),
    "layer by hand": LayerNormByHand,
    "response": ResponseNorm,
    "length": lambda width, rank: Length(1),
    "none": lambda width, rank: nn.Identity(),
}

# -- norms of sequences, (N, L, C) ------------------------------------------------------------------------------------


class RMSByHand(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class MomentsByHand(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (spread + 1e-5).sqrt() * self.weight + self.bias


class Plain(nn.Module):
    """Layer norm without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class BatchOfTokens(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


TOKEN_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "rms by hand": RMSByHand,
    "layer by hand": MomentsByHand,
    "plain": lambda width: Plain(),
    "batch": BatchOfTokens,
    "length": lambda width: Length(-1),
    "none": lambda width: nn.Identity(),
}
