"""Multi-head attention as people write it: how q, k and v are made, split, turned, repeated and multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_nets.parts import RMSByHand, divisors

__all__ = ["Attention", "Latents", "Options", "Torch", "attention"]

PROJECTIONS = ("separate", "chunk", "unbind", "index", "split", "per head", "last")
KERNELS = ("sdpa", "softmax", "einsum", "bmm", "talking", "cosine", "relu")


@dataclass(frozen=True)
class Options:
    """How one attention is written."""

    project: str
    kernel: str
    heads: int
    width: int
    groups: int
    repeat: str
    turn: str
    bias: str
    merge: str


class Attention(nn.Module):
    """Self-attention on (N, L, C)."""

    def __init__(self, width: int, length: int, options: Options) -> None:
        super().__init__()
        self.o = o = options
        inner, shared = o.heads * o.width, o.groups * o.width
        if o.project == "separate":
            self.q, self.k, self.v = (
                nn.Linear(width, inner),
                nn.Linear(width, shared, bias=False),
                nn.Linear(width, shared),
            )
        else:
            self.qkv = nn.Linear(width, inner + 2 * shared, bias=o.turn != "half")
        self.out = nn.Linear(inner, width)
        if o.turn == "norm":
            self.q_norm, self.k_norm = RMSByHand(o.width), nn.LayerNorm(o.width)
        if o.kernel == "talking":
            self.before, self.after = nn.Linear(o.heads, o.heads), nn.Conv2d(o.heads, o.heads, 1)
        if o.kernel == "cosine":
            self.scale = nn.Parameter(torch.ones(o.heads, 1, 1))
        self._positions(length)

    def _positions(self, length: int) -> None:
        o = self.o
        place = torch.arange(length)
        if o.bias == "table":
            self.table = nn.Parameter(torch.zeros(2 * length - 1, o.heads))
        elif o.bias == "embedding":
            self.table = nn.Embedding(2 * length - 1, o.heads)
        elif o.bias == "parameter":
            self.table = nn.Parameter(torch.zeros(1, o.heads, length, length))
        self.register_buffer("relative", place[:, None] - place[None, :] + length - 1, persistent=False)
        angle = place[:, None] / 10 ** torch.arange(max(o.width // 2, 1))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def extra_repr(self) -> str:
        return str(self.o)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        q, k = self._turn(q), self._turn(k)
        if self.o.turn == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        if not (self.o.kernel == "sdpa" and self.o.repeat == "flag"):
            k, v = self._repeat(k), self._repeat(v)
        return self.out(self._merge(self._attend(q, k, v)))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k and v as (N, H, L, D)."""
        o, (n, length, _) = self.o, x.shape
        inner, shared = o.heads * o.width, o.groups * o.width
        if o.project == "separate":
            return (
                self.q(x).view(n, length, o.heads, o.width).transpose(1, 2),
                self.k(x).unflatten(-1, (o.groups, o.width)).transpose(1, 2),
                self.v(x).reshape(n, -1, o.groups, o.width).permute(0, 2, 1, 3),
            )
        y = self.qkv(x)
        if o.project == "unbind":
            return y.reshape(n, length, 3, o.heads, o.width).permute(2, 0, 3, 1, 4).unbind(0)
        if o.project == "index":
            y = y.view(n, length, 3, o.heads, -1).transpose(1, 3)
            return y[:, :, 0], y[:, :, 1], y[:, :, 2]
        if o.project == "per head":
            q, k, v = y.view(n, length, o.heads, 3 * o.width).transpose(1, 2).chunk(3, -1)
            return q, k, v
        if o.project == "last":
            y = y.reshape(n, length, o.heads, o.width, 3).permute(0, 2, 1, 3, 4)
            return y[..., 0], y[..., 1], y[..., 2]
        parts = y.chunk(3, -1) if o.project == "chunk" else y.split([inner, shared, shared], -1)
        q, k, v = (p.reshape(n, length, -1, o.width).transpose(1, 2) for p in parts)
        return q, k, v

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary positions."""
        length = x.shape[2]
        cos, sin = self.cos[:length], self.sin[:length]
        if self.o.turn == "half":
            half = x.shape[-1] // 2
            a, b = x[..., :half], x[..., half:]
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            return x * cos + torch.cat((-b, a), -1) * sin
        if self.o.turn == "pairs":
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        if self.o.turn == "complex":
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * torch.complex(cos, sin)
            return torch.view_as_real(z).flatten(3)
        return x

    def _repeat(self, x: Tensor) -> Tensor:
        """Keys and values of each group for all of its heads."""
        n, groups, length, width = x.shape
        times = self.o.heads // groups
        if times == 1 or (self.o.repeat == "broadcast" and groups == 1):
            return x
        if self.o.repeat == "expand":
            x = x[:, :, None].expand(n, groups, times, length, width)
            return x.reshape(n, groups * times, length, width)
        return x.repeat_interleave(times, 1)

    def _bias(self, length: int) -> Tensor | None:
        if self.o.bias == "causal":
            return torch.full((length, length), -1e4, dtype=self.cos.dtype, device=self.cos.device).triu(1)
        if self.o.bias == "table":
            flat = self.table[self.relative[:length, :length].reshape(-1)]
            return flat.view(length, length, -1).permute(2, 0, 1).unsqueeze(0)
        if self.o.bias == "embedding":
            return self.table(self.relative[:length, :length]).permute(2, 0, 1)[None]
        return self.table if self.o.bias == "parameter" else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, scale, bias = self.o, self.o.width**-0.5, self._bias(q.shape[2])
        if o.kernel == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=o.repeat == "flag")
        if o.kernel == "relu":
            q, k = q.relu(), k.relu()
            return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(2, keepdim=True).mT + 1)
        if o.kernel == "bmm":
            n, heads, length, width = q.shape
            q, k, v = (t.expand(n, heads, -1, -1).reshape(n * heads, length, width) for t in (q, k, v))
            start = q.new_zeros(n * heads, length, length)
            if bias is not None:
                start = start + bias.expand(n, heads, length, length).reshape(n * heads, length, length)
            scores = torch.baddbmm(start, q, k.transpose(1, 2), alpha=scale)
            return torch.bmm(scores.softmax(-1), v).view(n, heads, length, width)
        if o.kernel == "cosine":
            q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), self.scale
        if o.kernel == "einsum":
            k, v = (t.expand(-1, o.heads, -1, -1) for t in (k, v))
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
        else:
            scores = (q * scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        if o.kernel == "talking":
            scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.after(scores.softmax(-1)) @ v
        weights = F.softmax(scores, dim=-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v) if o.kernel == "einsum" else torch.matmul(weights, v)

    def _merge(self, x: Tensor) -> Tensor:
        n, heads, length, width = x.shape
        if self.o.merge == "flatten":
            return x.transpose(1, 2).flatten(2)
        if self.o.merge == "view":
            return x.permute(0, 2, 1, 3).contiguous().view(n, length, heads * width)
        return x.transpose(1, 2).reshape(n, length, -1)


def attention(draw: st.DrawFn, width: int, length: int) -> Attention:
    """A random self-attention."""
    heads = draw(st.sampled_from((1, 2, 2, 3, 4)))
    project, kernel = draw(st.sampled_from(PROJECTIONS)), draw(st.sampled_from(KERNELS))
    groups = draw(st.sampled_from(divisors(heads))) if project in ("separate", "split") else heads
    repeats = ["interleave", "expand", "broadcast"] + (["flag"] if kernel == "sdpa" and groups < heads else [])
    options = Options(
        project,
        kernel,
        heads,
        draw(st.sampled_from((2, 4, 6))),
        groups,
        draw(st.sampled_from(repeats)),
        draw(st.sampled_from(("none", "none", "half", "pairs", "complex", "norm"))),
        draw(st.sampled_from(("none", "none", "causal", "table", "embedding", "parameter"))),
        draw(st.sampled_from(("flatten", "view", "reshape"))),
    )
    return Attention(width, length, options)


class Torch(nn.Module):
    """``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int, *, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.mha(x, x, x, need_weights=self.weights)
        return y * weights.sum(-1, keepdim=True) if self.weights else y


class Latents(nn.Module):
    """Cross-attention of a few learned queries: (N, L, C) -> (N, M, C)."""

    def __init__(self, width: int, number: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(number, width))
        self.q = nn.Linear(width, heads * head_dim)
        self.kv = nn.Linear(width, 2 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.query.unsqueeze(0).expand(x.shape[0], -1, -1))
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
