"""Small nets of every other shape."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Case
from tests.zoo.nets import IMAGE, TOKENS, Net, conv_bn, head, parameter, randn, shape


@shape
def hyper_network() -> Case:
    def run(m: Any, x: Tensor, z: Tensor) -> Tensor:
        w = m.make(m.embed(z).relu()).view(-1, 16, 12)
        y = torch.bmm(w, m.a(x).relu().unsqueeze(-1)).squeeze(-1)
        return m.head(y.relu())

    return Case(
        Net(run, embed=nn.Linear(7, 10), make=nn.Linear(10, 192), a=nn.Linear(8, 12), head=nn.Linear(16, 5)),
        (randn(3, 8), randn(3, 7)),
    )


@shape
def dynamic_convolution() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        a = m.route(x.mean((2, 3))).softmax(-1)
        b, c, h, w = x.shape
        weight = (a @ m.bank.flatten(1)).view(b * 18, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return m.head(y.view(b, 18, h, w))

    return Case(
        Net(run, stem=conv_bn(3, 14), route=nn.Linear(14, 4), bank=parameter(4, 18, 14, 3, 3), head=head(18)),
        (randn(*IMAGE),),
    )


def _time_embedding(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


class _ResBlock(nn.Module):
    def __init__(self, i: int, o: int, t: int) -> None:
        super().__init__()
        self.n1, self.c1, self.t = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1), nn.Linear(t, o)
        self.n2, self.c2, self.skip = (
            nn.GroupNorm(2, o),
            nn.Conv2d(o, o, 3, padding=1),
            nn.Conv2d(i, o, 1) if i != o else nn.Identity(),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.c1(F.silu(self.n1(x))) + self.t(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.c2(F.silu(self.n2(h)))


class _SpatialAttention(nn.Module):
    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.o, self.heads = nn.GroupNorm(2, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1), heads

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b * self.heads, 3 * c // self.heads, h * w).chunk(3, 1)
        a = torch.einsum("bct,bcs->bts", q * (c // self.heads) ** -0.25, k * (c // self.heads) ** -0.25).softmax(-1)
        return x + self.o(torch.einsum("bts,bcs->bct", a, v).reshape(b, c, h, w))


@shape
def diffusion_unet() -> Case:
    def run(m: Any, x: Tensor, t: Tensor) -> Tensor:
        t = m.t2(F.silu(m.t1(_time_embedding(t, 16).to(x.dtype))))
        a = m.b1(m.stem(x), t)
        b = m.att(m.b2(m.down(a), t))
        c = m.mid(b, t)
        c = m.b3(torch.cat([c, b], 1), t)
        c = m.up(F.interpolate(c, scale_factor=2.0, mode="nearest"))
        return m.out(F.silu(m.norm(m.b4(torch.cat([c, a], 1), t))))

    return Case(
        Net(
            run,
            t1=nn.Linear(16, 22),
            t2=nn.Linear(22, 26),
            stem=nn.Conv2d(3, 12, 3, padding=1),
            b1=_ResBlock(12, 12, 26),
            down=nn.Conv2d(12, 12, 3, 2, 1),
            b2=_ResBlock(12, 20, 26),
            att=_SpatialAttention(20, 2),
            mid=_ResBlock(20, 20, 26),
            b3=_ResBlock(40, 16, 26),
            up=nn.Conv2d(16, 16, 3, padding=1),
            b4=_ResBlock(28, 14, 26),
            norm=nn.GroupNorm(2, 14),
            out=nn.Conv2d(14, 3, 3, padding=1),
        ),
        (randn(*IMAGE), torch.tensor([3, 40])),
    )


@shape
def graph_index_add() -> Case:
    def run(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        x = m.embed(x).relu()
        messages = m.message(torch.cat([x[source], x[target]], -1)).relu()
        pooled = torch.zeros(x.shape[0], messages.shape[-1], dtype=x.dtype).index_add(0, target, messages)
        x = m.update(torch.cat([x, pooled], -1)).relu()
        return m.head(x)

    edges = torch.randint(0, 12, (2, 30))
    return Case(
        Net(run, embed=nn.Linear(20, 18), message=nn.Linear(36, 22), update=nn.Linear(40, 16), head=nn.Linear(16, 5)),
        (randn(12, 20), edges[0], edges[1]),
        batch=False,
    )


@shape
def graph_scatter_add() -> Case:
    def run(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        x = m.embed(x).relu()
        messages = m.message(x).index_select(0, source)
        index = target[:, None].expand_as(messages)
        added = torch.zeros(x.shape[0], messages.shape[1], dtype=x.dtype).scatter_add_(0, index, messages)
        top = torch.zeros_like(added).scatter_reduce(0, index, messages, "amax", include_self=False)
        degree = torch.zeros(x.shape[0], dtype=x.dtype).index_add_(0, target, torch.ones_like(target, dtype=x.dtype))
        return m.head(added / degree.clamp(min=1)[:, None] + top)

    edges = torch.randint(0, 12, (2, 30))
    return Case(
        Net(run, embed=nn.Linear(20, 18), message=nn.Linear(18, 22), head=nn.Linear(22, 5)),
        (randn(12, 20), edges[0], edges[1]),
        batch=False,
    )


@shape
def graph_attention() -> Case:
    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        h = m.w(x).view(x.shape[0], 4, 7)
        scores = F.leaky_relu((h * m.left).sum(-1)[:, None] + (h * m.right).sum(-1)[None], 0.2)
        a = scores.masked_fill(adjacency[..., None] < 0, -1e9).softmax(1)
        return m.head(torch.einsum("ijh,jhd->ihd", a, h).flatten(1).relu())

    return Case(
        Net(run, w=nn.Linear(20, 28), left=parameter(1, 4, 7), right=parameter(1, 4, 7), head=nn.Linear(28, 5)),
        (randn(12, 20), randn(12, 12) + torch.eye(12) * 9),
        batch=False,
    )


@shape
def fourier() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = torch.fft.rfft2(x, norm="ortho")
        y = torch.view_as_complex(torch.view_as_real(y) * m.gain[None, :, None, None, None])
        return m.head(m.mix(x + torch.fft.irfft2(y, s=x.shape[-2:], norm="ortho")))

    return Case(Net(run, stem=conv_bn(3, 16), gain=parameter(16), mix=conv_bn(16, 20), head=head(20)), (randn(*IMAGE),))


@shape
def fourier_operator() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = torch.fft.rfft(x.mean(3))[..., :5]
        y = torch.einsum("bct,cot->bot", y, torch.view_as_complex(m.w))
        return m.head(m.mix(torch.fft.irfft(y, n=16).relu().unsqueeze(-1)))

    return Case(
        Net(run, stem=conv_bn(3, 12), w=parameter(12, 14, 5, 2), mix=conv_bn(14, 20, 1), head=head(20)),
        (randn(*IMAGE),),
    )


@torch.library.custom_op("chase_zoo::scaled_square", mutates_args=())
def scaled_square(x: Tensor, scale: float) -> Tensor:
    """An operator that no table knows."""
    return x * x * scale


@scaled_square.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


scaled_square.register_autograd(
    lambda ctx, grad: (grad * 2 * ctx.saved_tensors[0] * ctx.scale, None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "scale", inputs[1]))[1],
)


@shape
def custom_operator() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(scaled_square(m.a(x), 0.5)).relu())

    return Case(Net(run, a=nn.Linear(20, 16), b=nn.Linear(16, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign() * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


@shape
def autograd_function() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(_Sign.apply(m.a(x))).relu())

    return Case(Net(run, a=nn.Linear(20, 16), b=nn.Linear(16, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),))


@shape
def data_dependent() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        if x.abs().max().item() > 0.0:
            x = m.b(x) * float(x.shape[0])
        return m.head(x.relu())

    return Case(
        Net(run, a=nn.Linear(20, 16), b=nn.Linear(16, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),), batch=False
    )


@shape
def in_place() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = torch.zeros_like(x)
        y[:, :, 2:6] = x[:, :, 2:6] * 2
        y[:, 1:] += x[:, :-1]
        y.add_(x).clamp_(min=-3)
        return m.head(F.relu(y, inplace=True))

    return Case(Net(run, a=nn.Linear(20, 16), head=nn.Linear(16, 5)), (randn(*TOKENS),))


@shape
def masked_fill_where() -> Case:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = m.a(x)
        x = torch.where(mask[..., None] > 0, x, m.token)
        x = x.masked_fill((x > 2) & (mask[..., None] > 1), 0.5)
        return m.head(x.clamp(min=m.low).cumsum(1))

    return Case(
        Net(run, a=nn.Linear(20, 16), token=parameter(16), low=parameter(16), head=nn.Linear(16, 5)),
        (randn(*TOKENS), randn(2, 9)),
    )


@dataclass
class _Result:
    logits: Tensor
    features: list[Tensor]
    note: str = "kept"


@shape
def outputs_dict() -> Case:
    def run(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        b = m.b(m.c(a))
        return OrderedDict(out=m.head(b), features={"low": a.mean((2, 3)), "size": a.shape[0]}, extra=(b, None))

    return Case(Net(run, a=conv_bn(3, 12), c=conv_bn(12, 16), b=conv_bn(16, 20), head=head(20)), (randn(*IMAGE),))


@shape
def outputs_dataclass() -> Case:
    def run(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        return _Result(m.head(m.b(a)), [a, a.sum((2, 3))])

    return Case(Net(run, a=conv_bn(3, 12), b=conv_bn(12, 20), head=head(20)), (randn(*IMAGE),))


@shape
def outputs_hidden() -> Case:
    def run(m: Any, x: Tensor) -> Any:
        return [m.head(m.b(m.a(x))), m.aux(m.a(x))] if m.training else m.head(m.b(m.a(x)))

    return Case(Net(run, a=conv_bn(3, 12), b=conv_bn(12, 20), head=head(20), aux=head(12, 7)), (randn(*IMAGE),))


@shape
def layer_drop() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            keep = 0.8
            y = block(x)
            if m.training:
                y = y * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep
            x = x + y
        return m.head(F.dropout(x, 0.1, m.training))

    return Case(
        Net(run, stem=conv_bn(3, 18), blocks=nn.ModuleList([conv_bn(18, 18), conv_bn(18, 18)]), head=head(18)),
        (randn(*IMAGE),),
    )


@shape
def keyword_inputs() -> Case:
    def run(m: Any, x: Tensor, *, scale: Tensor, extra: dict[str, Tensor], flag: bool = True) -> Tensor:
        return m.head(m.a(x).relu() * scale[..., None] + m.b(extra["y"])) if flag else x

    return Case(
        Net(run, a=nn.Linear(20, 16), b=nn.Linear(6, 16), head=nn.Linear(16, 5)),
        (randn(*TOKENS),),
        {"scale": randn(2, 9), "extra": {"y": randn(2, 9, 6)}},
    )


@shape
def variadic() -> Case:
    def run(m: Any, *xs: Tensor, **more: Tensor) -> Tensor:
        return m.head(torch.cat([m.a(x).relu() for x in xs], -1) + m.b(more["z"]))

    return Case(
        Net(run, a=nn.Linear(20, 8), b=nn.Linear(6, 16), head=nn.Linear(16, 5)),
        (randn(*TOKENS), randn(*TOKENS)),
        {"z": randn(2, 9, 6)},
    )


@shape
def siamese_topk() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = m.f(x), m.f(y)
        values, index = (a @ b.transpose(1, 2)).topk(4, -1)
        picked = b.gather(1, index[..., :1].expand(-1, -1, b.shape[-1]))
        return m.head(torch.cat([a, picked, a - picked], -1)) + values.sum(-1, keepdim=True)

    return Case(
        Net(run, f=nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 14)), head=nn.Linear(42, 5)),
        (randn(*TOKENS), randn(*TOKENS)),
    )


@shape
def grid_sample() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        theta = m.loc(x.mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        patches = F.unfold(x, 3, padding=1)
        return m.head(m.tail(F.fold(patches, x.shape[-2:], 3, padding=1) + m.one(x)))

    return Case(
        Net(run, stem=conv_bn(3, 14), loc=nn.Linear(14, 6), one=conv_bn(14, 14), tail=conv_bn(14, 18), head=head(18)),
        (randn(*IMAGE),),
    )


@shape
def unfold_linear() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        p = F.unfold(x, 2, stride=2).transpose(1, 2)
        y = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(2).transpose(1, 2)
        return m.head(m.mix(p).relu().mean(1) + m.other(y).mean(1))

    return Case(
        Net(run, stem=conv_bn(3, 10), mix=nn.Linear(40, 22), other=nn.Linear(10, 22), head=nn.Linear(22, 5)),
        (randn(*IMAGE),),
    )


@shape
def state_space() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        u, gate = m.up(x).chunk(2, -1)
        u = F.silu(m.conv(u.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
        dt, b, c = m.proj(u).split([4, 6, 6], -1)
        dt, a = F.softplus(m.dt(dt)), -m.log_a.exp()
        h = u.new_zeros(u.shape[0], u.shape[2], 6)
        ys = []
        for t in range(u.shape[1]):
            h = (dt[:, t, :, None] * a).exp() * h + dt[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return m.head(x + m.down((torch.stack(ys, 1) + u * m.d) * F.silu(gate)))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 18),
            up=nn.Linear(18, 56),
            conv=nn.Conv1d(28, 28, 4, groups=28, padding=3),
            proj=nn.Linear(28, 16),
            dt=nn.Linear(4, 28),
            log_a=parameter(28, 6),
            d=parameter(28),
            down=nn.Linear(28, 18),
            head=nn.Linear(18, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def vector_quantiser() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        d = (z.pow(2).sum(-1, keepdim=True) - 2 * z @ m.book.t()) + m.book.pow(2).sum(-1)
        q = F.embedding(d.argmin(-1), m.book)
        return m.head(z + (q - z).detach())

    return Case(Net(run, a=nn.Linear(20, 16), book=parameter(30, 16), head=nn.Linear(16, 5)), (randn(*TOKENS),))


@shape
def tensor_product() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).tanh(), m.b(x).tanh()
        outer = (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
        return m.head(m.mix(outer).relu() + torch.kron(a[0, 0], b[0, 0]).mean())

    return Case(
        Net(run, a=nn.Linear(20, 6), b=nn.Linear(20, 8), mix=nn.Linear(48, 14), head=nn.Linear(14, 5)),
        (randn(*TOKENS),),
        batch=False,
    )
