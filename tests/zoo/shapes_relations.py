"""Small nets of sets, graphs, tables and distributions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Case
from tests.zoo.nets import TOKENS, Net, conv_bn, head, parameter, randn, shape


class _Pooling(nn.Module):
    """Attention of a set to another, heads laid along the batch."""

    def __init__(self, q: int, k: int, v: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(q, v), nn.Linear(k, v), nn.Linear(k, v), nn.Linear(v, v)
        self.n0, self.n1, self.width = nn.LayerNorm(v), nn.LayerNorm(v), v

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.q(x)
        q, k, v = (torch.cat(t.split(self.width // 4, 2), 0) for t in (x, self.k(y), self.v(y)))
        a = torch.softmax(q.bmm(k.transpose(1, 2)) / self.width**0.5, 2)
        out = self.n0(torch.cat((q + a.bmm(v)).split(x.size(0), 0), 2))
        return self.n1(out + F.relu(self.o(out)))


@shape
def set_transformer() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.outer(x, m.inner(m.points.repeat(x.size(0), 1, 1), x))
        return m.head(m.pool(m.seeds.repeat(x.size(0), 1, 1), x))

    pools = {"inner": _Pooling(24, 20, 24), "outer": _Pooling(20, 24, 24), "pool": _Pooling(24, 24, 24)}
    tokens = {"points": parameter(1, 3, 24), "seeds": parameter(1, 2, 24)}
    return Case(Net(run, **pools, **tokens, head=nn.Linear(24, 5)), (randn(*TOKENS),))


@shape
def graph_edge_softmax() -> Case:
    def run(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = m.w(x).view(-1, 3, 8)
        e = F.leaky_relu((h * m.left).sum(-1)[source] + (h * m.right).sum(-1)[target], 0.2)
        top = torch.full((x.size(0), 3), -1e9, dtype=x.dtype)
        top = top.scatter_reduce(0, target[:, None].expand_as(e), e, "amax")
        e = (e - top[target]).exp()
        total = torch.zeros(x.size(0), 3, dtype=x.dtype).index_add(0, target, e)
        messages = h[source] * (e / (total[target] + 1e-16))[..., None]
        return m.head(F.elu(torch.zeros_like(h).index_add(0, target, messages).flatten(1)))

    return Case(
        Net(run, w=nn.Linear(20, 24), left=parameter(1, 3, 8), right=parameter(1, 3, 8), head=nn.Linear(24, 5)),
        (randn(8, 20), torch.randint(0, 8, (2, 20))),
        batch=False,
    )


@shape
def distances() -> Case:
    def run(m: Any, x: Tensor, places: Tensor) -> Tensor:
        basis = torch.exp(-((torch.cdist(places, places)[..., None] - m.centres) ** 2) * 4)
        x = m.embed(x)
        x = x + m.out(F.silu(torch.einsum("bijc,bjc->bic", m.filter(basis), m.inner(x))))
        return m.head(x) - torch.cdist(x, m.prototypes)

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 16),
            centres=torch.linspace(0, 3, 8),
            filter=nn.Sequential(nn.Linear(8, 18), nn.SiLU(), nn.Linear(18, 14)),
            inner=nn.Linear(16, 14),
            out=nn.Linear(14, 16),
            prototypes=parameter(5, 16),
            head=nn.Linear(16, 5),
        ),
        (randn(2, 6, 20), randn(2, 6, 3)),
    )


@shape
def product_keys() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).view(x.shape[0], x.shape[1], 2, 2, 8)
        score, index = torch.einsum("bnhpd,hpkd->bnhpk", q, m.keys).topk(3, -1)
        score = (score[..., 0, :, None] + score[..., 1, None, :]).flatten(-2)
        index = (index[..., 0, :, None] * 6 + index[..., 1, None, :]).flatten(-2)
        score, best = score.topk(3, -1)
        values = F.embedding(index.gather(-1, best), m.values)
        return m.head((values * score.softmax(-1)[..., None]).sum((-2, -3)))

    parts = {"q": nn.Linear(20, 32), "head": nn.Linear(24, 5)}
    return Case(Net(run, keys=parameter(2, 2, 6, 8), values=parameter(36, 24), **parts), (randn(*TOKENS),))


@shape
def experts_with_capacity() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        w, chosen = m.gate(x).softmax(-1).max(-1)
        hot = F.one_hot(chosen, 4).to(x.dtype)
        place = (hot.cumsum(1) - 1) * hot
        to = ((place < 3) * hot)[..., None] * F.one_hot(place.long().clamp(0, 2), 3).to(x.dtype)
        y = torch.einsum("ebcd,edh->ebch", torch.einsum("bnd,bnec->ebcd", x, to), m.up).relu()
        y = torch.einsum("ebch,ehd->ebcd", y, m.down)
        return m.head(x + torch.einsum("ebcd,bnec->bnd", y, to * w[..., None, None]))

    banks = {"up": parameter(4, 24, 30), "down": parameter(4, 30, 24)}
    return Case(
        Net(run, embed=nn.Linear(20, 24), gate=nn.Linear(24, 4), **banks, head=nn.Linear(24, 5)), (randn(*TOKENS),)
    )


@shape
def factorisation_machine() -> Case:
    def run(m: Any, ids: Tensor, dense: Tensor) -> Tensor:
        e = m.embed(ids + m.offsets)
        pairs = 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1, keepdim=True)
        d = m.bottom(dense)
        z = torch.cat([d[:, None], e], 1)
        z = torch.bmm(z, z.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        x0 = torch.cat([e.flatten(1), dense], 1)
        x = x0
        for u, v in zip(m.us, m.vs, strict=True):
            x = x0 * v(u(x)) + x
        return pairs + m.top(torch.cat([d, z[:, i, j]], 1)) + m.head(torch.cat([x, m.deep(x0)], 1))

    return Case(
        Net(
            run,
            embed=nn.Embedding(30, 12),
            offsets=torch.tensor([0, 10, 20]),
            bottom=nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 12)),
            us=nn.ModuleList(nn.Linear(40, 6) for _ in range(2)),
            vs=nn.ModuleList(nn.Linear(6, 40) for _ in range(2)),
            deep=nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 24)),
            top=nn.Linear(18, 3),
            head=nn.Linear(64, 3),
        ),
        (torch.randint(0, 10, (4, 3)), randn(4, 4)),
    )


class _Spline(nn.Module):
    """A layer of one B-spline for each pair of input and output."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.base, self.spline = parameter(o, i), parameter(o, i, 6)
        self.register_buffer("grid", torch.linspace(-2, 2, 9))

    def forward(self, x: Tensor) -> Tensor:
        z, g = x.unsqueeze(-1), self.grid
        b = ((z >= g[:-1]) & (z < g[1:])).to(x.dtype)
        for k in (1, 2):
            left = (z - g[: -(k + 1)]) / (g[k:-1] - g[: -(k + 1)]) * b[..., :-1]
            b = left + (g[k + 1 :] - z) / (g[k + 1 :] - g[1:-k]) * b[..., 1:]
        return F.linear(F.silu(x), self.base) + F.linear(b.flatten(-2), self.spline.flatten(1))


@shape
def spline_layers() -> Case:
    return Case(nn.Sequential(_Spline(20, 16), _Spline(16, 12), _Spline(12, 5)), (randn(3, 20),))


@shape
def coupling_flow() -> Case:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = x.new_zeros(x.shape[0])
        for scale, shift in zip(m.scales, m.shifts, strict=True):
            a, b = x.chunk(2, -1)
            s = scale(a).tanh()
            x = torch.cat([b * s.exp() + shift(a), a], -1).flip(-1)
            volume = volume + s.sum(-1)
        return x, volume

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))

    nets = {name: nn.ModuleList(net() for _ in range(3)) for name in ("scales", "shifts")}
    return Case(Net(run, **nets), (randn(3, 20),))


@shape
def variational() -> Case:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = m.code(m.encode(x).relu()).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * spread).exp() if m.training else mean
        return m.decode(z), mean, -0.5 * (1 + spread - mean.pow(2) - spread.exp()).sum(-1)

    decode = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 20))
    return Case(Net(run, encode=nn.Linear(20, 24), code=nn.Linear(24, 16), decode=decode), (randn(3, 20),))


@shape
def complex_layers() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        z = torch.complex(m.a(x), m.b(x)) @ torch.complex(m.real, m.imaginary)
        z = torch.complex(z.real.relu(), z.imag.relu()) * torch.exp(1j * m.phase)
        return m.head(z.abs())

    weights = {"real": parameter(12, 16), "imaginary": parameter(12, 16), "phase": parameter(16)}
    layers = {"a": nn.Linear(20, 12), "b": nn.Linear(20, 12), "head": nn.Linear(16, 5)}
    return Case(Net(run, **weights, **layers), (randn(3, 20),))


class _Quaternion(nn.Module):
    """Blocks of one weight matrix that share four small ones."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.r, self.i, self.j, self.k = (parameter(i // 4, o // 4) for _ in range(4))
        self.bias = parameter(o)

    def forward(self, x: Tensor) -> Tensor:
        r, i, j, k = self.r, self.i, self.j, self.k
        rows = [(r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r)]
        return x @ torch.cat([torch.cat(row, 0) for row in rows], 1) + self.bias


@shape
def quaternion_blocks() -> Case:
    return Case(
        nn.Sequential(_Quaternion(20, 24), nn.ReLU(), _Quaternion(24, 32), nn.ReLU(), nn.Linear(32, 5)),
        (randn(3, 20),),
    )


@shape
def hyper_convolution() -> Case:
    def run(m: Any, x: Tensor, z: Tensor) -> Tensor:
        weight, bias = m.make(m.embed(z).relu()).split([16 * 12 * 9, 16], -1)
        return m.head(F.conv2d(m.stem(x), weight.view(16, 12, 3, 3), bias, padding=1).relu())

    parts = {"embed": nn.Linear(7, 10), "make": nn.Linear(10, 16 * 12 * 9 + 16)}
    return Case(Net(run, stem=conv_bn(3, 12), **parts, head=head(16)), (randn(2, 3, 8, 8), randn(7)), batch=False)


@shape
def ordinary_differential_equation() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x, h = m.embed(x), 0.25
        for step in range(3):
            t = torch.full_like(x[:, :1], step * h)
            k1 = m.field(torch.cat([x, t], 1))
            k2 = m.field(torch.cat([x + h / 2 * k1, t + h / 2], 1))
            x = x + h * (k1 + k2) / 2
        return m.head(x)

    field = nn.Sequential(nn.Linear(17, 30), nn.Tanh(), nn.Linear(30, 16))
    return Case(Net(run, embed=nn.Linear(20, 16), field=field, head=nn.Linear(16, 5)), (randn(3, 20),))
