"""Small nets of recurrence and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Case
from tests.zoo.nets import IMAGE, TOKENS, Net, parameter, randn, shape


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        y, _ = m.rnn(m.embed(x))
        return m.head(y[:, -1].relu())

    wide = 15 * (2 if options.get("bidirectional") else 1)
    return Case(
        Net(run, embed=nn.Linear(20, 12), rnn=kind(12, 15, batch_first=True, **options), head=nn.Linear(wide, 5)),
        (randn(*TOKENS),),
    )


@shape
def lstm() -> Case:
    return _recurrent(nn.LSTM)


@shape
def lstm_deep() -> Case:
    return _recurrent(nn.LSTM, num_layers=2, bidirectional=True)


@shape
def gru() -> Case:
    return _recurrent(nn.GRU, num_layers=2)


@shape
def rnn() -> Case:
    return _recurrent(nn.RNN, bidirectional=True)


@shape
def lstm_cell() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 14)
        g = x.new_zeros(x.shape[0], 10)
        for t in range(x.shape[1]):
            h, c = m.cell(x[:, t], (h, c))
            g = m.gru(h, g)
        return m.head(g)

    return Case(Net(run, cell=nn.LSTMCell(20, 14), gru=nn.GRUCell(14, 10), head=nn.Linear(10, 5)), (randn(*TOKENS),))


def _mha(need_weights: bool, **options: Any) -> Case:
    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        kdim, vdim = m.att.kdim, m.att.vdim
        y, w = m.att(x, x if kdim == 24 else m.k(x), x if vdim == 24 else m.v(x), need_weights=need_weights)
        y = m.head((x + y).relu())
        return (y, w) if need_weights else y

    parts: dict[str, nn.Module] = {"k": nn.Linear(24, options["kdim"])} if "kdim" in options else {}
    if "vdim" in options:
        parts["v"] = nn.Linear(24, options["vdim"])
    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            att=nn.MultiheadAttention(24, 4, batch_first=True, **options),
            head=nn.Linear(24, 5),
            **parts,
        ),
        (randn(*TOKENS),),
    )


@shape
def mha() -> Case:
    return _mha(need_weights=False)


@shape
def mha_weights() -> Case:
    return _mha(need_weights=True)


@shape
def mha_kdim_vdim() -> Case:
    return _mha(need_weights=True, kdim=14, vdim=18)


@shape
def mha_bias_kv() -> Case:
    return _mha(need_weights=False, add_bias_kv=True, add_zero_attn=True)


@shape
def transformer() -> Case:
    def run(m: Any, src: Tensor, tgt: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], dtype=tgt.dtype)
        return m.head(m.net(m.embed(src), m.embed(tgt), tgt_mask=mask))

    net = nn.Transformer(24, 4, 2, 2, 36, batch_first=True)
    return Case(Net(run, embed=nn.Linear(20, 24), net=net, head=nn.Linear(24, 5)), (randn(*TOKENS), randn(2, 6, 20)))


@shape
def transformer_encoder() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= 7
        return m.head(m.net(m.embed(x), src_key_padding_mask=padding.expand(x.shape[0], -1)))

    layer = nn.TransformerEncoderLayer(24, 4, 36, activation="gelu", norm_first=True, batch_first=True)
    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            net=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            head=nn.Linear(24, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def embedding_bag() -> Case:
    def run(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.hidden(torch.cat([m.mean(ids), m.top(ids)], 1)).relu())

    parts = {"mean": nn.EmbeddingBag(40, 14, mode="mean"), "top": nn.EmbeddingBag(40, 10, mode="sum")}
    return Case(Net(run, **parts, hidden=nn.Linear(24, 18), head=nn.Linear(18, 5)), (torch.randint(0, 40, (3, 6)),))


@shape
def tied_embeddings() -> Case:
    def run(m: Any, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        x = x + m.down(m.up(m.norm(x)).relu())
        return F.linear(m.last(x), m.embed.weight)

    return Case(
        Net(
            run,
            embed=nn.Embedding(40, 24),
            norm=nn.LayerNorm(24),
            up=nn.Linear(24, 36),
            down=nn.Linear(36, 24),
            last=nn.LayerNorm(24),
        ),
        (torch.randint(0, 40, (2, 7)),),
    )


def _heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    positions = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    angles = positions[:, None] * 10000 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@shape
def rotary_gqa() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = _rotate(_heads(m.q(x), 6)), _rotate(_heads(m.k(x), 2)), _heads(m.v(x), 2)
        b, g, n, d = k.shape
        k = k[:, :, None].expand(b, g, 3, n, d).reshape(b, g * 3, n, d)
        v = v[:, :, None].expand(b, g, 3, n, d).reshape(b, g * 3, n, d)
        return m.head(x + m.o(_merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 26),
            q=nn.Linear(26, 48),
            k=nn.Linear(26, 16),
            v=nn.Linear(26, 16),
            o=nn.Linear(48, 26),
            head=nn.Linear(26, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def sdpa_enable_gqa() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        y = F.scaled_dot_product_attention(_heads(m.q(x), 6), _heads(m.k(x), 2), _heads(m.v(x), 2), enable_gqa=True)
        return m.head(x + m.o(_merge_heads(y)))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 26),
            q=nn.Linear(26, 48),
            k=nn.Linear(26, 16),
            v=nn.Linear(26, 20),
            o=nn.Linear(60, 26),
            head=nn.Linear(26, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def mqa_broadcast() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, kv = m.q(x).unflatten(-1, (4, 10)), m.kv(x)
        k, v = kv.split([10, 14], -1)
        a = torch.einsum("bnhd,bmd->bhnm", q, k).mul(10**-0.5).softmax(-1)
        return m.head(x + m.o(torch.einsum("bhnm,bmd->bnhd", a, v).flatten(2)))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 26),
            q=nn.Linear(26, 40),
            kv=nn.Linear(26, 24),
            o=nn.Linear(56, 26),
            head=nn.Linear(26, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def talking_heads() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 9).permute(2, 0, 3, 1, 4)
        a = (q * 9**-0.5) @ k.transpose(-2, -1)
        a = m.before(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        a = m.after(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.head(x + m.o(_merge_heads(a @ v)))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 26),
            qkv=nn.Linear(26, 108),
            before=nn.Linear(4, 4),
            after=nn.Linear(4, 4),
            o=nn.Linear(36, 26),
            head=nn.Linear(26, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def window_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        qkv = m.qkv(m.norm(y)).reshape(-1, 16, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = m.table[m.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        y = ((q @ k.transpose(-2, -1)) * (c // 4) ** -0.5 + bias.unsqueeze(0)).softmax(-1) @ v
        y = m.o(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return m.head(x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2))

    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
    offsets = (grid[:, :, None] - grid[:, None, :]) + 3
    return Case(
        Net(
            run,
            patch=nn.Conv2d(3, 28, 2, 2),
            norm=nn.LayerNorm(28),
            qkv=nn.Linear(28, 84),
            table=parameter(49, 4),
            index=offsets[0] * 7 + offsets[1],
            o=nn.Linear(28, 28),
            head=nn.Linear(28, 5),
        ),
        (randn(*IMAGE),),
    )


@shape
def cosine_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = (_heads(part, 4) for part in m.qkv(x).chunk(3, -1))
        a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.clamp(max=4.6).exp()
        return m.head(x + m.o(_merge_heads(a.softmax(-1) @ v)))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 26),
            qkv=nn.Linear(26, 96),
            scale=parameter(4, 1, 1),
            o=nn.Linear(32, 26),
            head=nn.Linear(26, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def linear_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = (_heads(part, 3) for part in m.qkv(x).split(24, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
        y = y / torch.einsum("bhnd,bhd->bhn", q, k.sum(2)).unsqueeze(-1)
        return m.head(x + m.o(_merge_heads(y)))

    return Case(
        Net(run, embed=nn.Linear(20, 26), qkv=nn.Linear(26, 72), o=nn.Linear(24, 26), head=nn.Linear(26, 5)),
        (randn(*TOKENS),),
    )


@shape
def channel_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = (_heads(part, 4) for part in m.qkv(x).chunk(3, -1))
        a = (q.transpose(-1, -2) @ k / x.shape[1] ** 0.5).softmax(-1)
        return m.head(x + m.o(_merge_heads((a @ v.transpose(-1, -2)).transpose(-1, -2))))

    return Case(
        Net(run, embed=nn.Linear(20, 26), qkv=nn.Linear(26, 96), o=nn.Linear(32, 26), head=nn.Linear(26, 5)),
        (randn(*TOKENS),),
    )


@shape
def mlp_mixer() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.tokens(m.n1(x).transpose(1, 2)).transpose(1, 2)
        return m.head((x + m.channels(m.n2(x))).mean(1))

    tokens = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 9))
    channels = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            n1=nn.LayerNorm(24),
            tokens=tokens,
            n2=nn.LayerNorm(24),
            channels=channels,
            head=nn.Linear(24, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def gmlp() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        u, v = m.up(x).chunk(2, -1)
        v = m.space(m.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return m.head(x + m.down(u * v))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            up=nn.Linear(24, 64),
            norm=nn.LayerNorm(32),
            space=nn.Linear(9, 9),
            down=nn.Linear(32, 24),
            head=nn.Linear(24, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def swiglu() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        gate, up = m.gate_up(x).chunk(2, -1)
        return m.head(x + m.down(F.silu(gate) * up))

    return Case(
        Net(run, embed=nn.Linear(20, 24), gate_up=nn.Linear(24, 72), down=nn.Linear(36, 24), head=nn.Linear(24, 5)),
        (randn(*TOKENS),),
    )


@shape
def einsum() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.einsum("bnc,co->bno", x, m.a).relu()
        x = torch.einsum("bno,ohd->bnhd", x, m.b)
        x = torch.einsum("bnhd,hde->bne", x.tanh(), m.c)
        return torch.einsum("bne,be,ek->bk", x, x.mean(1), m.d)

    return Case(
        Net(run, a=parameter(20, 24), b=parameter(24, 4, 6), c=parameter(4, 6, 18), d=parameter(18, 5)),
        (randn(*TOKENS),),
    )


@shape
def bilinear() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.head(m.mix(m.a(x).relu(), m.b(y).relu()).relu())

    return Case(
        Net(run, a=nn.Linear(8, 14), b=nn.Linear(9, 12), mix=nn.Bilinear(14, 12, 16), head=nn.Linear(16, 5)),
        (randn(3, 8), randn(3, 9)),
    )


@shape
def experts() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x).relu()
        weights, chosen = m.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(m.experts):
            gate = (weights * (chosen == i)).sum(-1, keepdim=True)
            y = y + gate * expert(x)
        stacked = torch.einsum("bnc,eco->bneo", x, m.up).relu()
        return m.head(y + torch.einsum("bneo,eoc->bnc", stacked, m.down))

    nets = nn.ModuleList(nn.Sequential(nn.Linear(24, 14), nn.ReLU(), nn.Linear(14, 24)) for _ in range(3))
    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            router=nn.Linear(24, 3),
            experts=nets,
            up=parameter(3, 24, 10),
            down=parameter(3, 10, 24),
            head=nn.Linear(24, 5),
        ),
        (randn(*TOKENS),),
    )
