"""Blocks on sequences, (N, L, C) -> (N, L', C')."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_nets.attention import Latents, Torch, attention
from tests.random_nets.parts import TOKEN_NORMS, DropPath, activation, divisors, part

__all__ = ["token_block"]

Sized = tuple[nn.Module, int, int]

MLPS = ("plain", "separate", "chunk", "split", "halves", "glu")
BLOCKS = (*("residual",) * 6, "branch", "modulate", "append", "class", "place", "merge", "latents", "linear")


class Residual(nn.Module):
    """The branch is normed before or after it, scaled or not, and dropped at times in train mode."""

    def __init__(self, norm: nn.Module, branch: nn.Module, width: int, *, first: bool, scaled: bool, drop: str) -> None:
        super().__init__()
        self.norm, self.branch, self.first = norm, branch, first
        self.gamma = nn.Parameter(torch.ones(width)) if scaled else None
        self.drop = {"none": nn.Identity, "dropout": lambda: nn.Dropout(0.3), "path": DropPath}[drop]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(self.norm(x) if self.first else x)
        y = self.drop(y if self.gamma is None else self.gamma * y)
        return x + y if self.first else self.norm(x + y)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module, kind: str) -> None:
        super().__init__()
        self.kind, self.hidden, self.act = kind, hidden, act
        fused = kind in ("chunk", "glu", "split", "halves")
        self.up = nn.Linear(width, 2 * hidden if fused else hidden)
        self.gate = nn.Linear(width, hidden, bias=False) if kind == "separate" else None
        self.down = nn.Linear(hidden, width)

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.kind == "separate":
            y = self.act(self.gate(x)) * y
        elif self.kind == "chunk":
            a, b = y.chunk(2, -1)
            y = self.act(a) * b
        elif self.kind == "split":
            a, b = torch.split(y, self.hidden, dim=-1)
            y = a * self.act(b)
        elif self.kind == "halves":
            y = self.act(y[..., self.hidden :]) * y[..., : self.hidden]
        else:
            y = F.glu(y, -1) if self.kind == "glu" else self.act(y)
        return self.down(y)


class Experts(nn.Module):
    """A dense mixture: every expert, weighted by a softmax."""

    def __init__(self, width: int, number: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, number)
        self.experts = nn.ModuleList(Mlp(width, hidden, nn.ReLU(), "plain") for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return (torch.stack([e(x) for e in self.experts], -1) * weights.unsqueeze(-2)).sum(-1)


class Recurrent(nn.Module):
    def __init__(self, kind: str, width: int, hidden: int, *, both: bool) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(width, hidden, batch_first=True, bidirectional=both)
        self.out = nn.Linear(hidden * (2 if both else 1), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class MixTokens(nn.Module):
    def __init__(self, length: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(length, hidden), act, nn.Linear(hidden, length)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x.transpose(1, 2)))).transpose(1, 2)


class ConvOverTokens(nn.Module):
    def __init__(self, width: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, hidden, 3, padding=1)
        self.deep = nn.Conv1d(hidden, hidden, 3, padding=1, groups=groups)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.deep(self.conv(x.mT))).mT)


class Windows(nn.Module):
    """A block on windows of a sequence, shifted or not."""

    def __init__(self, body: nn.Module, size: int, *, shift: bool) -> None:
        super().__init__()
        self.body, self.size, self.shift = body, size, size // 2 if shift else 0

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        if self.shift:
            x = torch.roll(x, -self.shift, 1)
        y = self.body(x.view(n, length // self.size, self.size, width).reshape(-1, self.size, width))
        y = y.view(n, -1, self.size, width).reshape(n, length, width)
        return torch.roll(y, self.shift, 1) if self.shift else y


class Messages(nn.Module):
    """Tokens as nodes of a ring: each sends to its neighbour."""

    def __init__(self, width: int, length: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.send, self.out = nn.Linear(width, hidden), nn.Linear(hidden + width, width)
        self.register_buffer("source", torch.arange(length), persistent=False)
        self.register_buffer("target", (torch.arange(length) * 2 + 1) % length, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        sent = F.relu(self.send(x[:, self.source]))
        got = x.new_zeros(x.shape[0], x.shape[1], sent.shape[-1])
        if self.kind == "index_add":
            got = got.index_add(1, self.target, sent)
        elif self.kind == "scatter":
            got = got.scatter_add(1, self.target[None, :, None].expand_as(sent), sent)
        else:
            got.index_add_(1, self.target, sent)
        return self.out(torch.cat([got, x], -1))


class Modulate(nn.Module):
    """FiLM, adaptive norm: scale and shift from the mean of the sequence."""

    def __init__(self, width: int, norm: nn.Module, *, gate: bool) -> None:
        super().__init__()
        self.norm, self.parts = norm, 3 if gate else 2
        self.make = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))
        self.lin = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, *gate = self.make(x.mean(1)).chunk(self.parts, dim=1)
        y = self.lin(self.norm(x) * (1 + scale.unsqueeze(1)) + shift[:, None])
        return x + gate[0][:, None] * y if gate else x + y


class Hyper(nn.Module):
    """A linear layer whose weights are made from the sequence."""

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.hidden, self.kind = hidden, kind
        self.make, self.out = nn.Linear(width, width * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        w = self.make(x.mean(1)).view(x.shape[0], self.hidden, x.shape[2])
        y = x @ w.transpose(1, 2) if self.kind == "matmul" else torch.einsum("nlc,nhc->nlh", x, w)
        return self.out(y)


class Einsum(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(width, 2, hidden))
        self.b = nn.Parameter(torch.zeros(2, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(torch.einsum("nlc,chd->nlhd", x, self.a))
        return torch.einsum("nlhd,hdc->nlc", y, self.b)


class Append(nn.Module):
    """More features: the input and a linear function of it, side by side."""

    def __init__(self, width: int, more: int, *, before: bool) -> None:
        super().__init__()
        self.lin, self.before = nn.Linear(width, more), before

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return torch.cat([y, x] if self.before else [x, y], -1)


class Parts(nn.Module):
    """Two layers on slices of the features; the slices may overlap."""

    def __init__(self, width: int, first: int, second: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.a, self.b = nn.Linear(first, width), nn.Linear(width - second, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[..., : self.first]) + F.relu(self.b(x[:, :, self.second :]))


class ClassToken(nn.Module):
    def __init__(self, width: int, *, end: bool) -> None:
        super().__init__()
        self.cls, self.end = nn.Parameter(torch.zeros(1, 1, width)), end

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls.expand(x.shape[0], -1, -1)
        return torch.cat((x, cls) if self.end else (cls, x), dim=1)


class Positions(nn.Module):
    def __init__(self, width: int, length: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "embedding":
            self.table = nn.Embedding(length + 2, width)
        elif kind == "waves":
            angle = torch.arange(length + 2)[:, None] / 10 ** torch.arange((width + 1) // 2)
            self.register_buffer("table", torch.cat([angle.sin(), angle.cos()], 1)[None, :, :width])
        else:
            self.table = nn.Parameter(torch.zeros(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "embedding":
            return x + self.table(torch.arange(x.shape[1], device=x.device))
        return x + (self.table[:, : x.size(1)] if self.kind == "waves" else self.table)


class Merge(nn.Module):
    """Pairs of tokens become one with twice the features: strided slices or a view."""

    def __init__(self, width: int, out: int, *, view: bool) -> None:
        super().__init__()
        self.view, self.norm, self.lin = view, nn.LayerNorm(2 * width), nn.Linear(2 * width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        x = x.contiguous().view(n, length // 2, 2 * width) if self.view else torch.cat([x[:, 0::2], x[:, 1::2]], -1)
        return self.lin(self.norm(x))


class Twice(nn.Module):
    """The same module two times."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.body(x)))


def _branch(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    """A random block that keeps the shape."""
    hidden = draw(st.sampled_from((4, 6, 8)))
    act = activation(draw)
    even = [d for d in divisors(length) if d > 1]
    heads = draw(st.sampled_from(divisors(width)))

    def one_of(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    make: dict[str, Callable[[], nn.Module]] = {
        "attention": lambda: attention(draw, width, length),
        "torch": lambda: Torch(width, heads, weights=draw(st.booleans())),
        "mlp": lambda: Mlp(width, hidden, act, one_of(*MLPS)),
        "experts": lambda: Experts(width, draw(st.integers(2, 3)), hidden),
        "recurrent": lambda: Recurrent(one_of("GRU", "LSTM", "RNN"), width, hidden, both=one_of(True, False)),
        "mix": lambda: MixTokens(length, hidden, act),
        "conv": lambda: ConvOverTokens(width, hidden, draw(st.sampled_from(divisors(hidden)))),
        "messages": lambda: Messages(width, length, hidden, one_of("index_add", "index_add_", "scatter")),
        "hyper": lambda: Hyper(width, hidden, one_of("matmul", "einsum")),
        "einsum": lambda: Einsum(width, hidden),
        "parts": lambda: Parts(width, part(draw, width), part(draw, width)),
        "twice": lambda: Twice(nn.Linear(width, width)),
    }  # fmt: skip
    if even:
        size = draw(st.sampled_from(even))
        make["windows"] = lambda: Windows(attention(draw, width, size), size, shift=draw(st.booleans()))
    return make[draw(st.sampled_from(("attention", "attention", "attention", "mlp", "mlp", *make)))]()


def token_block(draw: st.DrawFn, width: int, length: int) -> Sized:  # noqa: PLR0911
    """A random block, the features and the number of tokens that it gives."""
    name = draw(st.sampled_from(BLOCKS))
    if name == "append" and width <= 12:
        more = draw(st.sampled_from((2, 4)))
        return Append(width, more, before=draw(st.booleans())), width + more, length
    if name == "class":
        return ClassToken(width, end=draw(st.booleans())), width, length + 1
    if name == "place":
        return Positions(width, length, draw(st.sampled_from(("embedding", "parameter", "waves")))), width, length
    if name == "merge" and length % 2 == 0:
        out = draw(st.sampled_from((6, 8)))
        return Merge(width, out, view=draw(st.booleans())), out, length // 2
    if name == "latents":
        number = draw(st.integers(2, 4))
        return Latents(width, number, draw(st.integers(1, 3)), draw(st.sampled_from((2, 4)))), width, number
    if name == "linear":
        out = draw(st.sampled_from((4, 6, 8)))
        return nn.Sequential(nn.Linear(width, out), activation(draw)), out, length
    norm = TOKEN_NORMS[draw(st.sampled_from(sorted(TOKEN_NORMS)))](width)
    if name == "modulate":
        return Modulate(width, norm, gate=draw(st.booleans())), width, length
    branch = _branch(draw, width, length)
    if name == "branch":
        return branch, width, length
    options = {"first": draw(st.booleans()), "scaled": draw(st.booleans())}
    drop = draw(st.sampled_from(("none", "none", "dropout", "path")))
    return Residual(norm, branch, width, drop=drop, **options), width, length
