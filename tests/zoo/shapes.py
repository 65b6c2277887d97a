"""Small nets, one for each shape of network that the model collections lack or hide.

Each ends in a head of fixed width; widths in between differ, so that dims that are not the same thing do not look alike.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo import Case

__all__ = ["NAMES", "build"]

_BUILDERS: dict[str, Callable[[], Case]] = {}


def shape(make: Callable[[], Case]) -> Callable[[], Case]:
    """Put a builder into the corpus under its own name."""
    _BUILDERS[make.__name__.strip("_")] = make
    return make


def randn(*size: int) -> Tensor:
    """Inputs in single precision; the judge makes them double."""
    return torch.randn(*size)


class _Net(nn.Module):
    def __init__(self, parts: dict[str, nn.Module | Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


def Net(run: Callable[..., Any], **parts: nn.Module | Tensor) -> nn.Module:  # noqa: N802
    """A module from parts, and a function of it and its inputs for its forward."""
    return type("Net", (_Net,), {"forward": run})(parts)


def parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size) * 0.2)


def conv_bn(i: int, o: int, k: int = 3, **kw: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


def head(width: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


IMAGE = (2, 3, 16, 16)
TOKENS = (2, 9, 20)

# -- convolutions -------------------------------------------------------------------------------------------------------


@shape
def conv1d() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv1d(6, 24, 5), nn.BatchNorm1d(24), nn.GELU(), nn.Conv1d(24, 32, 3, groups=4), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(32, 32, 3, groups=32), nn.Conv1d(32, 20, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(20, 5),
        ),
        (randn(2, 6, 40),),
    )  # fmt: skip


@shape
def conv3d() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(16, 24, 3, padding=1, groups=2),
            nn.InstanceNorm3d(24, affine=True), nn.Conv3d(24, 12, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 5),
        ),
        (randn(2, 3, 8, 8, 8),),
    )  # fmt: skip


@shape
def transposed() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(24, 16, 4, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 16, 3, groups=16), nn.ConvTranspose2d(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 3, 1),
        ),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def transposed_1d_3d() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.b(m.a(x).relu()) + m.d(m.c(y).relu()).mean((2, 3))

    parts = {"a": nn.Conv1d(4, 12, 3), "b": nn.ConvTranspose1d(12, 6, 3, groups=2), "c": nn.Conv3d(3, 8, 3), "d": nn.ConvTranspose3d(8, 6, 3)}
    return Case(Net(run, **parts), (randn(2, 4, 8), randn(2, 3, 8, 8, 8)))


@shape
def flatten_to_linear() -> Case:
    return Case(
        nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(192, 28), nn.ReLU(), nn.Linear(28, 5)),
        (randn(*IMAGE),),
    )


@shape
def unet() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.d1(x)
        b = m.d2(F.max_pool2d(a, 2))
        c = m.d3(F.max_pool2d(b, 2))
        y = m.u1(torch.cat([F.interpolate(c, scale_factor=2, mode="nearest"), b], 1))
        return m.out(m.u2(torch.cat([m.up(y), a], 1)))

    return Case(
        Net(run, d1=conv_bn(3, 12), d2=conv_bn(12, 20), d3=conv_bn(20, 28), u1=conv_bn(48, 24), up=nn.ConvTranspose2d(24, 16, 2, 2),
            u2=conv_bn(28, 14), out=nn.Conv2d(14, 2, 1)),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def dense_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        xs = [m.stem(x)]
        for layer in m.layers:
            xs.append(layer(torch.cat(xs, 1)))
        return m.head(torch.cat(xs, 1))

    return Case(Net(run, stem=conv_bn(3, 10), layers=nn.ModuleList([conv_bn(10, 6), conv_bn(16, 6), conv_bn(22, 6)]), head=head(28)), (randn(*IMAGE),))


@shape
def channel_shuffle() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = m.mix(F.channel_shuffle(x, 4))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(m.last(x))

    return Case(Net(run, stem=conv_bn(3, 24), mix=conv_bn(24, 24, groups=4), last=conv_bn(24, 18, groups=3), head=head(18)), (randn(*IMAGE),))


@shape
def pixel_shuffle() -> Case:
    return Case(
        nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 20, 3, padding=1), nn.PReLU(20), nn.Conv2d(20, 64, 3, padding=1), nn.PixelShuffle(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(96, 12, 1), nn.PixelShuffle(2),
        ),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def squeeze_excite() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        s = m.fc2(m.fc1(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        x = x * s + x * m.eca(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid().mean(1, keepdim=True)
        return m.head(x)

    return Case(Net(run, stem=conv_bn(3, 24), fc1=nn.Linear(24, 6), fc2=nn.Linear(6, 24), eca=nn.Conv1d(1, 1, 3, padding=1), head=head(24)), (randn(*IMAGE),))


@shape
def film() -> Case:
    def run(m: Any, x: Tensor, z: Tensor) -> Tensor:
        gamma, beta = m.cond(m.embed(z).relu()).chunk(2, 1)
        return m.head((m.stem(x) * (1 + gamma[..., None, None]) + beta[..., None, None]).relu())

    return Case(Net(run, stem=conv_bn(3, 20), embed=nn.Linear(7, 14), cond=nn.Linear(14, 40), head=head(20)), (randn(*IMAGE), randn(2, 7)))


@shape
def norms() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 24, 3), nn.GroupNorm(4, 24), nn.SiLU(), nn.Conv2d(24, 20, 3), nn.InstanceNorm2d(20, affine=True), nn.ReLU(),
            nn.Conv2d(20, 18, 3), nn.LocalResponseNorm(3), nn.Conv2d(18, 16, 1), nn.GroupNorm(1, 16), nn.Conv2d(16, 14, 1), nn.GroupNorm(14, 14),
            nn.BatchNorm2d(14, affine=False), nn.Conv2d(14, 12, 1), nn.InstanceNorm2d(12), *head(12),
        ),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def layer_norm_2d() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = m.b(x)
        u = x.mean(1, keepdim=True)
        x = (x - u) / ((x - u).pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * m.g[:, None, None]
        return m.head(F.normalize(m.c(x), dim=1))

    return Case(Net(run, a=nn.Conv2d(3, 24, 3), ln=nn.LayerNorm(24), b=nn.Conv2d(24, 20, 1), g=parameter(20), c=nn.Conv2d(20, 16, 1), head=head(16)), (randn(*IMAGE),))


@shape
def gates() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.glu(m.a(x), 1)
        x = m.b(x)
        x = x.view(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).amax(2)  # maxout
        a, b = m.c(x).chunk(2, 1)
        a = a.tanh() * b.sigmoid()
        x, y, z = m.d(a).split([8, 12, 4], 1)
        return m.head(torch.cat([z, x, y], 1))

    return Case(Net(run, a=nn.Conv2d(3, 40, 3), b=nn.Conv2d(20, 28, 1), c=nn.Conv2d(14, 36, 1), d=nn.Conv2d(18, 24, 1), head=head(24)), (randn(*IMAGE),))


@shape
def activations() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 14, 1), nn.PReLU(), nn.Conv2d(14, 16, 1), nn.RReLU(), nn.Conv2d(16, 18, 1),
            nn.Hardswish(), nn.Dropout2d(0.2), nn.Conv2d(18, 20, 1), nn.Softplus(), nn.AlphaDropout(0.1), nn.Conv2d(20, 22, 1), nn.CELU(), *head(22),
        ),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def stack_unbind() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        ys = torch.stack([m.a(x), m.b(x), m.c(x)], 1)
        w = m.w.softmax(0)
        mixed = sum(w[i] * y for i, y in enumerate(ys.unbind(1)))
        q, k, v = m.qkv(mixed.mean((2, 3))).reshape(-1, 3, 15).unbind(1)
        return m.head(q * k.sigmoid() + v)

    return Case(Net(run, a=conv_bn(3, 16), b=conv_bn(3, 16), c=conv_bn(3, 16), w=parameter(3), qkv=nn.Linear(16, 45), head=nn.Linear(15, 5)), (randn(*IMAGE),))


@shape
def shared_modules() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(3):
            x = x + m.block(x)
        return m.head(m.tail(x) + m.tail(x * 2))

    return Case(Net(run, stem=conv_bn(3, 18), block=nn.Sequential(nn.Conv2d(18, 30, 1), nn.ReLU(), nn.Conv2d(30, 18, 1)), tail=conv_bn(18, 22), head=head(22)), (randn(*IMAGE),))


@shape
def weight_norm_old() -> Case:
    from torch.nn.utils import spectral_norm, weight_norm

    with torch.no_grad():
        net = nn.Sequential(
            weight_norm(nn.Conv2d(3, 20, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(20, 24, 3)), nn.ReLU(), weight_norm(nn.Conv2d(24, 16, 3), dim=1),
            nn.ReLU(), weight_norm(nn.ConvTranspose2d(16, 12, 3), dim=1), *head(12),
        )  # fmt: skip
    return Case(net, (randn(*IMAGE),))


@shape
def weight_norm_parametrize() -> Case:
    return Case(
        nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 20, 3)), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(20, 24, 3, groups=2)), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), parametrizations.weight_norm(nn.Linear(24, 18)), nn.ReLU(), nn.Linear(18, 5),
        ),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def spectral_norm_parametrize() -> Case:
    return Case(
        nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), parametrizations.spectral_norm(nn.Conv2d(20, 24, 3)), nn.ReLU(), nn.Conv2d(24, 16, 3), *head(16)),
        (randn(*IMAGE),),
    )


@shape
def orthogonal_parametrize() -> Case:
    return Case(
        nn.Sequential(nn.Linear(12, 20), nn.ReLU(), parametrizations.orthogonal(nn.Linear(20, 16)), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)),
        (randn(3, 12),),
    )


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@shape
def custom_parametrize() -> Case:
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    nn.utils.parametrize.register_parametrization(net[2], "weight", _Symmetric())
    return Case(net, (randn(3, 12),))


class _StdConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (w - mean) / (var + 1e-6).sqrt(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class _StdConvBN(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, w.reshape_as(self.weight), self.bias)


@shape
def weight_standardisation() -> Case:
    return Case(
        nn.Sequential(_StdConv(3, 20, 3), nn.GroupNorm(4, 20), nn.ReLU(), _StdConv(20, 24, 3), nn.GroupNorm(4, 24), nn.ReLU(), _StdConvBN(24, 16, 3), nn.ReLU(),
                      _StdConvBN(16, 16, 3, groups=4), *head(16)),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def residual_mixed() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        b = m.b(a)
        b = b + F.pad(F.avg_pool2d(a, 1), (0, 0, 0, 0, 4, 4))  # parameter-free shortcut: zero channels around
        return m.head(b[:, 2:-2] + m.c(a))

    return Case(Net(run, a=conv_bn(3, 16), b=conv_bn(16, 24), c=conv_bn(16, 20), head=head(20)), (randn(*IMAGE),))


# -- sequences ----------------------------------------------------------------------------------------------------------


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        y, _ = m.rnn(m.embed(x))
        return m.head(y[:, -1].relu())

    wide = 15 * (2 if options.get("bidirectional") else 1)
    return Case(Net(run, embed=nn.Linear(20, 12), rnn=kind(12, 15, batch_first=True, **options), head=nn.Linear(wide, 5)), (randn(*TOKENS),))


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
    return Case(Net(run, embed=nn.Linear(20, 24), att=nn.MultiheadAttention(24, 4, batch_first=True, **options), head=nn.Linear(24, 5), **parts), (randn(*TOKENS),))


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
    return Case(Net(run, embed=nn.Linear(20, 24), net=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), head=nn.Linear(24, 5)), (randn(*TOKENS),))


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

    return Case(Net(run, embed=nn.Embedding(40, 24), norm=nn.LayerNorm(24), up=nn.Linear(24, 36), down=nn.Linear(36, 24), last=nn.LayerNorm(24)), (torch.randint(0, 40, (2, 7)),))


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

    return Case(Net(run, embed=nn.Linear(20, 26), q=nn.Linear(26, 48), k=nn.Linear(26, 16), v=nn.Linear(26, 16), o=nn.Linear(48, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


@shape
def sdpa_enable_gqa() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        y = F.scaled_dot_product_attention(_heads(m.q(x), 6), _heads(m.k(x), 2), _heads(m.v(x), 2), enable_gqa=True)
        return m.head(x + m.o(_merge_heads(y)))

    return Case(Net(run, embed=nn.Linear(20, 26), q=nn.Linear(26, 48), k=nn.Linear(26, 16), v=nn.Linear(26, 20), o=nn.Linear(60, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


@shape
def mqa_broadcast() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, kv = m.q(x).unflatten(-1, (4, 10)), m.kv(x)
        k, v = kv.split([10, 14], -1)
        a = torch.einsum("bnhd,bmd->bhnm", q, k).mul(10**-0.5).softmax(-1)
        return m.head(x + m.o(torch.einsum("bhnm,bmd->bnhd", a, v).flatten(2)))

    return Case(Net(run, embed=nn.Linear(20, 26), q=nn.Linear(26, 40), kv=nn.Linear(26, 24), o=nn.Linear(56, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


@shape
def talking_heads() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 9).permute(2, 0, 3, 1, 4)
        a = (q * 9**-0.5) @ k.transpose(-2, -1)
        a = m.before(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        a = m.after(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.head(x + m.o(_merge_heads(a @ v)))

    return Case(Net(run, embed=nn.Linear(20, 26), qkv=nn.Linear(26, 108), before=nn.Linear(4, 4), after=nn.Linear(4, 4), o=nn.Linear(36, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


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
        Net(run, patch=nn.Conv2d(3, 28, 2, 2), norm=nn.LayerNorm(28), qkv=nn.Linear(28, 84), table=parameter(49, 4), index=offsets[0] * 7 + offsets[1],
            o=nn.Linear(28, 28), head=nn.Linear(28, 5)),
        (randn(*IMAGE),),
    )  # fmt: skip


@shape
def cosine_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = (_heads(part, 4) for part in m.qkv(x).chunk(3, -1))
        a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.clamp(max=4.6).exp()
        return m.head(x + m.o(_merge_heads(a.softmax(-1) @ v)))

    return Case(Net(run, embed=nn.Linear(20, 26), qkv=nn.Linear(26, 96), scale=parameter(4, 1, 1), o=nn.Linear(32, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


@shape
def linear_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = (_heads(part, 3) for part in m.qkv(x).split(24, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
        y = y / torch.einsum("bhnd,bhd->bhn", q, k.sum(2)).unsqueeze(-1)
        return m.head(x + m.o(_merge_heads(y)))

    return Case(Net(run, embed=nn.Linear(20, 26), qkv=nn.Linear(26, 72), o=nn.Linear(24, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


@shape
def channel_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        q, k, v = (_heads(part, 4) for part in m.qkv(x).chunk(3, -1))
        a = (q.transpose(-1, -2) @ k / x.shape[1] ** 0.5).softmax(-1)
        return m.head(x + m.o(_merge_heads((a @ v.transpose(-1, -2)).transpose(-1, -2))))

    return Case(Net(run, embed=nn.Linear(20, 26), qkv=nn.Linear(26, 96), o=nn.Linear(32, 26), head=nn.Linear(26, 5)), (randn(*TOKENS),))


@shape
def mlp_mixer() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.tokens(m.n1(x).transpose(1, 2)).transpose(1, 2)
        return m.head((x + m.channels(m.n2(x))).mean(1))

    tokens = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 9))
    channels = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    return Case(Net(run, embed=nn.Linear(20, 24), n1=nn.LayerNorm(24), tokens=tokens, n2=nn.LayerNorm(24), channels=channels, head=nn.Linear(24, 5)), (randn(*TOKENS),))


@shape
def gmlp() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        u, v = m.up(x).chunk(2, -1)
        v = m.space(m.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return m.head(x + m.down(u * v))

    return Case(Net(run, embed=nn.Linear(20, 24), up=nn.Linear(24, 64), norm=nn.LayerNorm(32), space=nn.Linear(9, 9), down=nn.Linear(32, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),))


@shape
def swiglu() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        gate, up = m.gate_up(x).chunk(2, -1)
        return m.head(x + m.down(F.silu(gate) * up))

    return Case(Net(run, embed=nn.Linear(20, 24), gate_up=nn.Linear(24, 72), down=nn.Linear(36, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),))


@shape
def einsum() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.einsum("bnc,co->bno", x, m.a).relu()
        x = torch.einsum("bno,ohd->bnhd", x, m.b)
        x = torch.einsum("bnhd,hde->bne", x.tanh(), m.c)
        return torch.einsum("bne,be,ek->bk", x, x.mean(1), m.d)

    return Case(Net(run, a=parameter(20, 24), b=parameter(24, 4, 6), c=parameter(4, 6, 18), d=parameter(18, 5)), (randn(*TOKENS),))


@shape
def bilinear() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.head(m.mix(m.a(x).relu(), m.b(y).relu()).relu())

    return Case(Net(run, a=nn.Linear(8, 14), b=nn.Linear(9, 12), mix=nn.Bilinear(14, 12, 16), head=nn.Linear(16, 5)), (randn(3, 8), randn(3, 9)))


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
    return Case(Net(run, embed=nn.Linear(20, 24), router=nn.Linear(24, 3), experts=nets, up=parameter(3, 24, 10), down=parameter(3, 10, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),))


# -- everything else ----------------------------------------------------------------------------------------------------


@shape
def hyper_network() -> Case:
    def run(m: Any, x: Tensor, z: Tensor) -> Tensor:
        w = m.make(m.embed(z).relu()).view(-1, 16, 12)
        y = torch.bmm(w, m.a(x).relu().unsqueeze(-1)).squeeze(-1)
        return m.head(y.relu())

    return Case(Net(run, embed=nn.Linear(7, 10), make=nn.Linear(10, 192), a=nn.Linear(8, 12), head=nn.Linear(16, 5)), (randn(3, 8), randn(3, 7)))


@shape
def dynamic_convolution() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        a = m.route(x.mean((2, 3))).softmax(-1)
        b, c, h, w = x.shape
        weight = (a @ m.bank.flatten(1)).view(b * 18, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return m.head(y.view(b, 18, h, w))

    return Case(Net(run, stem=conv_bn(3, 14), route=nn.Linear(14, 4), bank=parameter(4, 18, 14, 3, 3), head=head(18)), (randn(*IMAGE),))


def _time_embedding(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


class _ResBlock(nn.Module):
    def __init__(self, i: int, o: int, t: int) -> None:
        super().__init__()
        self.n1, self.c1, self.t = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1), nn.Linear(t, o)
        self.n2, self.c2, self.skip = nn.GroupNorm(2, o), nn.Conv2d(o, o, 3, padding=1), nn.Conv2d(i, o, 1) if i != o else nn.Identity()

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
        Net(run, t1=nn.Linear(16, 22), t2=nn.Linear(22, 26), stem=nn.Conv2d(3, 12, 3, padding=1), b1=_ResBlock(12, 12, 26), down=nn.Conv2d(12, 12, 3, 2, 1),
            b2=_ResBlock(12, 20, 26), att=_SpatialAttention(20, 2), mid=_ResBlock(20, 20, 26), b3=_ResBlock(40, 16, 26), up=nn.Conv2d(16, 16, 3, padding=1),
            b4=_ResBlock(28, 14, 26), norm=nn.GroupNorm(2, 14), out=nn.Conv2d(14, 3, 3, padding=1)),
        (randn(*IMAGE), torch.tensor([3, 40])),
    )  # fmt: skip


@shape
def graph_index_add() -> Case:
    def run(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        x = m.embed(x).relu()
        messages = m.message(torch.cat([x[source], x[target]], -1)).relu()
        pooled = torch.zeros(x.shape[0], messages.shape[-1], dtype=x.dtype).index_add(0, target, messages)
        x = m.update(torch.cat([x, pooled], -1)).relu()
        return m.head(x)

    edges = torch.randint(0, 12, (2, 30))
    return Case(Net(run, embed=nn.Linear(20, 18), message=nn.Linear(36, 22), update=nn.Linear(40, 16), head=nn.Linear(16, 5)), (randn(12, 20), edges[0], edges[1]), batch=False)


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
    return Case(Net(run, embed=nn.Linear(20, 18), message=nn.Linear(18, 22), head=nn.Linear(22, 5)), (randn(12, 20), edges[0], edges[1]), batch=False)


@shape
def graph_attention() -> Case:
    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        h = m.w(x).view(x.shape[0], 4, 7)
        scores = F.leaky_relu((h * m.left).sum(-1)[:, None] + (h * m.right).sum(-1)[None], 0.2)
        a = scores.masked_fill(adjacency[..., None] < 0, -1e9).softmax(1)
        return m.head(torch.einsum("ijh,jhd->ihd", a, h).flatten(1).relu())

    return Case(Net(run, w=nn.Linear(20, 28), left=parameter(1, 4, 7), right=parameter(1, 4, 7), head=nn.Linear(28, 5)), (randn(12, 20), randn(12, 12) + torch.eye(12) * 9), batch=False)


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

    return Case(Net(run, stem=conv_bn(3, 12), w=parameter(12, 14, 5, 2), mix=conv_bn(14, 20, 1), head=head(20)), (randn(*IMAGE),))


@torch.library.custom_op("chase_zoo::scaled_square", mutates_args=())
def scaled_square(x: Tensor, scale: float) -> Tensor:
    """An operator that no table knows."""
    return x * x * scale


@scaled_square.register_fake
def _(x: Tensor, scale: float) -> Tensor:  # noqa: ARG001
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

    return Case(Net(run, a=nn.Linear(20, 16), b=nn.Linear(16, 24), head=nn.Linear(24, 5)), (randn(*TOKENS),), batch=False)


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

    return Case(Net(run, a=nn.Linear(20, 16), token=parameter(16), low=parameter(16), head=nn.Linear(16, 5)), (randn(*TOKENS), randn(2, 9)))


@dataclass
class _Result:
    logits: Tensor
    features: list[Tensor]
    note: str = "kept"


@shape
def outputs_dict() -> Case:
    def run(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        b = m.b(a)
        return OrderedDict(out=m.head(b), features={"low": a.mean((2, 3)), "size": a.shape[0]}, extra=(b, None))

    return Case(Net(run, a=conv_bn(3, 12), b=conv_bn(12, 20), head=head(20)), (randn(*IMAGE),))


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

    return Case(Net(run, stem=conv_bn(3, 18), blocks=nn.ModuleList([conv_bn(18, 18), conv_bn(18, 18)]), head=head(18)), (randn(*IMAGE),))


@shape
def keyword_inputs() -> Case:
    def run(m: Any, x: Tensor, *, scale: Tensor, extra: dict[str, Tensor], flag: bool = True) -> Tensor:
        return m.head(m.a(x).relu() * scale[..., None] + m.b(extra["y"])) if flag else x

    return Case(Net(run, a=nn.Linear(20, 16), b=nn.Linear(6, 16), head=nn.Linear(16, 5)), (randn(*TOKENS),), {"scale": randn(2, 9), "extra": {"y": randn(2, 9, 6)}})


@shape
def variadic() -> Case:
    def run(m: Any, *xs: Tensor, **more: Tensor) -> Tensor:
        return m.head(torch.cat([m.a(x).relu() for x in xs], -1) + m.b(more["z"]))

    return Case(Net(run, a=nn.Linear(20, 8), b=nn.Linear(6, 16), head=nn.Linear(16, 5)), (randn(*TOKENS), randn(*TOKENS)), {"z": randn(2, 9, 6)})


@shape
def siamese_topk() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = m.f(x), m.f(y)
        values, index = (a @ b.transpose(1, 2)).topk(4, -1)
        picked = b.gather(1, index[..., :1].expand(-1, -1, b.shape[-1]))
        return m.head(torch.cat([a, picked, a - picked], -1)) + values.sum(-1, keepdim=True)

    return Case(Net(run, f=nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 14)), head=nn.Linear(42, 5)), (randn(*TOKENS), randn(*TOKENS)))


@shape
def grid_sample() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        theta = m.loc(x.mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        patches = F.unfold(x, 3, padding=1)
        return m.head(F.fold(patches, x.shape[-2:], 3, padding=1) + m.one(x))

    return Case(Net(run, stem=conv_bn(3, 14), loc=nn.Linear(14, 6), one=conv_bn(14, 14), head=head(14)), (randn(*IMAGE),))


@shape
def unfold_linear() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        p = F.unfold(x, 2, stride=2).transpose(1, 2)
        y = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(2).transpose(1, 2)
        return m.head(m.mix(p).relu().mean(1) + m.other(y).mean(1))

    return Case(Net(run, stem=conv_bn(3, 10), mix=nn.Linear(40, 22), other=nn.Linear(10, 22), head=nn.Linear(22, 5)), (randn(*IMAGE),))


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
        Net(run, embed=nn.Linear(20, 18), up=nn.Linear(18, 56), conv=nn.Conv1d(28, 28, 4, groups=28, padding=3), proj=nn.Linear(28, 16), dt=nn.Linear(4, 28),
            log_a=parameter(28, 6), d=parameter(28), down=nn.Linear(28, 18), head=nn.Linear(18, 5)),
        (randn(*TOKENS),),
    )  # fmt: skip


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

    return Case(Net(run, a=nn.Linear(20, 6), b=nn.Linear(20, 8), mix=nn.Linear(48, 14), head=nn.Linear(14, 5)), (randn(*TOKENS),), batch=False)


NAMES = tuple(_BUILDERS)


def build(name: str) -> Case:
    """A net by name."""
    case = _BUILDERS[name]()
    case.model.eval()
    return case
