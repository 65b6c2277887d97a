"""Small nets of convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo import Case
from tests.zoo.nets import IMAGE, Net, conv_bn, head, parameter, randn, shape


@shape
def conv1d() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv1d(6, 24, 5),
            nn.BatchNorm1d(24),
            nn.GELU(),
            nn.Conv1d(24, 32, 3, groups=4),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(32, 32, 3, groups=32),
            nn.Conv1d(32, 20, 1),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(20, 5),
        ),
        (randn(2, 6, 40),),
    )


@shape
def conv3d() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv3d(3, 16, 3, padding=1),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(16, 24, 3, padding=1, groups=2),
            nn.InstanceNorm3d(24, affine=True),
            nn.Conv3d(24, 12, 1),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        ),
        (randn(2, 3, 8, 8, 8),),
    )


@shape
def transposed() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 16, 4, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 16, 3, groups=16),
            nn.ConvTranspose2d(16, 24, 3, groups=4),
            nn.ReLU(),
            nn.Conv2d(24, 3, 1),
        ),
        (randn(*IMAGE),),
    )


@shape
def transposed_1d_3d() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.b(m.a(x).relu()) + m.d(m.c(y).relu()).mean((2, 3))

    parts = {
        "a": nn.Conv1d(4, 12, 3),
        "b": nn.ConvTranspose1d(12, 6, 3, groups=2),
        "c": nn.Conv3d(3, 8, 3),
        "d": nn.ConvTranspose3d(8, 6, 3),
    }
    return Case(Net(run, **parts), (randn(2, 4, 8), randn(2, 3, 8, 8, 8)))


@shape
def flatten_to_linear() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(192, 28),
            nn.ReLU(),
            nn.Linear(28, 5),
        ),
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
        Net(
            run,
            d1=conv_bn(3, 12),
            d2=conv_bn(12, 20),
            d3=conv_bn(20, 28),
            u1=conv_bn(48, 24),
            up=nn.ConvTranspose2d(24, 16, 2, 2),
            u2=conv_bn(28, 14),
            out=nn.Conv2d(14, 2, 1),
        ),
        (randn(*IMAGE),),
    )


@shape
def dense_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        xs = [m.stem(x)]
        for layer in m.layers:
            xs.append(layer(torch.cat(xs, 1)))
        return m.head(torch.cat(xs, 1))

    return Case(
        Net(
            run,
            stem=conv_bn(3, 10),
            layers=nn.ModuleList([conv_bn(10, 6), conv_bn(16, 6), conv_bn(22, 6)]),
            head=head(28),
        ),
        (randn(*IMAGE),),
    )


@shape
def channel_shuffle() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = m.mix(F.channel_shuffle(x, 4))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(m.last(x))

    return Case(
        Net(run, stem=conv_bn(3, 24), mix=conv_bn(24, 24, groups=4), last=conv_bn(24, 18, groups=3), head=head(18)),
        (randn(*IMAGE),),
    )


@shape
def pixel_shuffle() -> Case:
    return Case(
        nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 20, 3, padding=1),
            nn.PReLU(20),
            nn.Conv2d(20, 64, 3, padding=1),
            nn.PixelShuffle(2),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.PixelUnshuffle(2),
            nn.Conv2d(96, 12, 1),
            nn.PixelShuffle(2),
        ),
        (randn(*IMAGE),),
    )


@shape
def squeeze_excite() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        s = m.fc2(m.fc1(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        x = x * s + x * m.eca(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid().mean(1, keepdim=True)
        return m.head(x)

    return Case(
        Net(
            run,
            stem=conv_bn(3, 24),
            fc1=nn.Linear(24, 6),
            fc2=nn.Linear(6, 24),
            eca=nn.Conv1d(1, 1, 3, padding=1),
            head=head(24),
        ),
        (randn(*IMAGE),),
    )


@shape
def film() -> Case:
    def run(m: Any, x: Tensor, z: Tensor) -> Tensor:
        gamma, beta = m.cond(m.embed(z).relu()).chunk(2, 1)
        return m.head((m.stem(x) * (1 + gamma[..., None, None]) + beta[..., None, None]).relu())

    return Case(
        Net(run, stem=conv_bn(3, 20), embed=nn.Linear(7, 14), cond=nn.Linear(14, 40), head=head(20)),
        (randn(*IMAGE), randn(2, 7)),
    )


@shape
def norms() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 24, 3),
            nn.GroupNorm(4, 24),
            nn.SiLU(),
            nn.Conv2d(24, 20, 3),
            nn.InstanceNorm2d(20, affine=True),
            nn.ReLU(),
            nn.Conv2d(20, 18, 3),
            nn.LocalResponseNorm(3),
            nn.Conv2d(18, 16, 1),
            nn.GroupNorm(1, 16),
            nn.Conv2d(16, 14, 1),
            nn.GroupNorm(14, 14),
            nn.BatchNorm2d(14, affine=False),
            nn.Conv2d(14, 12, 1),
            nn.InstanceNorm2d(12),
            *head(12),
        ),
        (randn(*IMAGE),),
    )


@shape
def layer_norm_2d() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = m.b(x)
        u = x.mean(1, keepdim=True)
        x = (x - u) / ((x - u).pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * m.g[:, None, None]
        return m.head(F.normalize(m.c(x), dim=1))

    return Case(
        Net(
            run,
            a=nn.Conv2d(3, 24, 3),
            ln=nn.LayerNorm(24),
            b=nn.Conv2d(24, 20, 1),
            g=parameter(20),
            c=nn.Conv2d(20, 16, 1),
            head=head(16),
        ),
        (randn(*IMAGE),),
    )


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

    return Case(
        Net(
            run,
            a=nn.Conv2d(3, 40, 3),
            b=nn.Conv2d(20, 28, 1),
            c=nn.Conv2d(14, 36, 1),
            d=nn.Conv2d(18, 24, 1),
            head=head(24),
        ),
        (randn(*IMAGE),),
    )


@shape
def activations() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.PReLU(12),
            nn.Conv2d(12, 14, 1),
            nn.PReLU(),
            nn.Conv2d(14, 16, 1),
            nn.RReLU(),
            nn.Conv2d(16, 18, 1),
            nn.Hardswish(),
            nn.Dropout2d(0.2),
            nn.Conv2d(18, 20, 1),
            nn.Softplus(),
            nn.AlphaDropout(0.1),
            nn.Conv2d(20, 22, 1),
            nn.CELU(),
            *head(22),
        ),
        (randn(*IMAGE),),
    )


@shape
def stack_unbind() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        ys = torch.stack([m.a(x), m.b(x), m.c(x)], 1)
        w = m.w.softmax(0)
        mixed = sum(w[i] * y for i, y in enumerate(ys.unbind(1)))
        q, k, v = m.qkv(mixed.mean((2, 3))).reshape(-1, 3, 15).unbind(1)
        return m.head(q * k.sigmoid() + v)

    return Case(
        Net(
            run,
            a=conv_bn(3, 16),
            b=conv_bn(3, 16),
            c=conv_bn(3, 16),
            w=parameter(3),
            qkv=nn.Linear(16, 45),
            head=nn.Linear(15, 5),
        ),
        (randn(*IMAGE),),
    )


@shape
def shared_modules() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(3):
            x = x + m.block(x)
        return m.head(m.tail(x) + m.tail(x * 2))

    return Case(
        Net(
            run,
            stem=conv_bn(3, 18),
            block=nn.Sequential(nn.Conv2d(18, 30, 1), nn.ReLU(), nn.Conv2d(30, 18, 1)),
            tail=conv_bn(18, 22),
            head=head(22),
        ),
        (randn(*IMAGE),),
    )


@shape
def weight_norm_old() -> Case:
    from torch.nn.utils import spectral_norm, weight_norm

    with torch.no_grad():
        net = nn.Sequential(
            weight_norm(nn.Conv2d(3, 20, 3)),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(20, 24, 3)),
            nn.ReLU(),
            weight_norm(nn.Conv2d(24, 16, 3), dim=1),
            nn.ReLU(),
            weight_norm(nn.ConvTranspose2d(16, 12, 3), dim=1),
            *head(12),
        )
    return Case(net, (randn(*IMAGE),))


@shape
def weight_norm_parametrize() -> Case:
    return Case(
        nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 20, 3)),
            nn.ReLU(),
            parametrizations.weight_norm(nn.Conv2d(20, 24, 3, groups=2)),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(24, 18)),
            nn.ReLU(),
            nn.Linear(18, 5),
        ),
        (randn(*IMAGE),),
    )


@shape
def spectral_norm_parametrize() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 20, 3),
            nn.ReLU(),
            parametrizations.spectral_norm(nn.Conv2d(20, 24, 3)),
            nn.ReLU(),
            nn.Conv2d(24, 16, 3),
            *head(16),
        ),
        (randn(*IMAGE),),
    )


@shape
def orthogonal_parametrize() -> Case:
    return Case(
        nn.Sequential(
            nn.Linear(12, 20),
            nn.ReLU(),
            parametrizations.orthogonal(nn.Linear(20, 16)),
            nn.ReLU(),
            nn.Linear(16, 24),
            nn.ReLU(),
            nn.Linear(24, 5),
        ),
        (randn(3, 12),),
    )


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@shape
def custom_parametrize() -> Case:
    net = nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 5)
    )
    nn.utils.parametrize.register_parametrization(net[2], "weight", _Symmetric())
    return Case(net, (randn(3, 12),))


class _StdConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(
            x, (w - mean) / (var + 1e-6).sqrt(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class _StdConvBN(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        )
        return self._conv_forward(x, w.reshape_as(self.weight), self.bias)


@shape
def weight_standardisation() -> Case:
    return Case(
        nn.Sequential(
            _StdConv(3, 20, 3),
            nn.GroupNorm(4, 20),
            nn.ReLU(),
            _StdConv(20, 24, 3),
            nn.GroupNorm(4, 24),
            nn.ReLU(),
            _StdConvBN(24, 16, 3),
            nn.ReLU(),
            _StdConvBN(16, 16, 3, groups=4),
            *head(16),
        ),
        (randn(*IMAGE),),
    )


@shape
def residual_mixed() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        b = m.b(a)
        b = b + F.pad(F.avg_pool2d(a, 1), (0, 0, 0, 0, 4, 4))  # parameter-free shortcut: zero channels around
        return m.head(b[:, 2:-2] + m.c(a))

    return Case(Net(run, a=conv_bn(3, 16), b=conv_bn(16, 24), c=conv_bn(16, 20), head=head(20)), (randn(*IMAGE),))
