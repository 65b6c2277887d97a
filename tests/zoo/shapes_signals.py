"""Small nets of audio and time series: causal convolutions, packed sequences, segments, spectra, state spaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.zoo import Case
from tests.zoo.nets import TOKENS, Net, parameter, randn, shape


@shape
def lstm_packed() -> Case:
    def run(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(m.embed(x), lengths, batch_first=True, enforce_sorted=False)
        y, (h, _) = m.rnn(packed)
        y, _ = pad_packed_sequence(y, batch_first=True)
        return m.head(torch.cat([y.mean(1), h[-1]], 1))

    rnn = nn.LSTM(12, 15, batch_first=True, bidirectional=True)
    return Case(
        Net(run, embed=nn.Linear(20, 12), rnn=rnn, head=nn.Linear(45, 5)),
        (randn(3, 9, 20), torch.tensor([9, 4, 6])),
        batch=False,
    )


@shape
def lstm_projected() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        y, (h, c) = m.rnn(m.embed(x))
        return m.head(torch.cat([y.mean(1), h.transpose(0, 1).flatten(1), c.transpose(0, 1).flatten(1)], 1))

    rnn = nn.LSTM(12, 30, 2, batch_first=True, bidirectional=True, proj_size=8)
    return Case(Net(run, embed=nn.Linear(20, 12), rnn=rnn, head=nn.Linear(16 + 32 + 120, 5)), (randn(*TOKENS),))


@shape
def gru_residual() -> Case:
    def run(m: Any, x: Tensor, z: Tensor) -> Tensor:
        x = m.embed(x)
        start = m.start(z).tanh().view(-1, 2, 8).transpose(0, 1).contiguous()
        for rnn in m.rnns:
            x = x + rnn(x, start)[0]
        return m.head(m.norm(x))

    rnns = nn.ModuleList(nn.GRU(16, 8, batch_first=True, bidirectional=True) for _ in range(2))
    parts = {"embed": nn.Linear(20, 16), "start": nn.Linear(7, 16), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 5)}
    return Case(Net(run, rnns=rnns, **parts), (randn(*TOKENS), randn(2, 7)))


@shape
def wavenet() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x, skip = m.stem(F.pad(x, (1, 0))), None
        for i, (gates, out, side) in enumerate(zip(m.gates, m.outs, m.sides, strict=True)):
            a, b = gates(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = a.tanh() * b.sigmoid()
            skip = side(h) if skip is None else skip + side(h)
            x = x + out(h)
        return m.last(F.relu(m.head(F.relu(skip))))

    return Case(
        Net(
            run,
            stem=nn.Conv1d(4, 16, 2),
            gates=nn.ModuleList(nn.Conv1d(16, 40, 2, dilation=2**i) for i in range(3)),
            outs=nn.ModuleList(nn.Conv1d(20, 16, 1) for _ in range(3)),
            sides=nn.ModuleList(nn.Conv1d(20, 24, 1) for _ in range(3)),
            head=nn.Conv1d(24, 18, 1),
            last=nn.Conv1d(18, 5, 1),
        ),
        (randn(2, 4, 20),),
    )


class _Chomp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :-4].contiguous()


@shape
def temporal_convolutions() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x) + m.down(x))
        return m.head(F.relu(m.second(x) + x)[:, :, -1])

    norm = nn.utils.parametrizations.weight_norm

    def block(i: int, o: int) -> nn.Sequential:
        first, second = (norm(nn.Conv1d(k, o, 3, padding=4, dilation=2)) for k in (i, o))
        return nn.Sequential(first, _Chomp(), nn.ReLU(), nn.Dropout(0.1), second, _Chomp(), nn.ReLU())

    parts = {"first": block(4, 16), "second": block(16, 16), "down": nn.Conv1d(4, 16, 1), "head": nn.Linear(16, 5)}
    return Case(Net(run, **parts), (randn(2, 4, 20),))


@shape
def segments_both_ways() -> Case:
    """Recurrence within segments and across them, as in dual-path separation, added up by overlap."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x.transpose(1, 2))
        length = x.shape[2]
        x = x.unfold(2, 4, 2)
        b, n, s, k = x.shape
        y = m.out1(m.within(x.permute(0, 2, 3, 1).reshape(b * s, k, n))[0]).view(b, s, k, n).permute(0, 3, 1, 2)
        x = x + m.norm1(y)
        y = m.out2(m.across(x.permute(0, 3, 2, 1).reshape(b * k, s, n))[0]).view(b, k, s, n).permute(0, 3, 2, 1)
        x = x + m.norm2(y)
        x = F.fold(x.permute(0, 1, 3, 2).reshape(b, n * k, s), (1, length), (1, k), stride=(1, k // 2)).squeeze(2)
        return m.head(x)

    return Case(
        Net(
            run,
            embed=nn.Conv1d(20, 16, 1),
            within=nn.LSTM(16, 12, batch_first=True, bidirectional=True),
            out1=nn.Linear(24, 16),
            norm1=nn.GroupNorm(1, 16),
            across=nn.GRU(16, 10, batch_first=True),
            out2=nn.Linear(10, 16),
            norm2=nn.GroupNorm(1, 16),
            head=nn.Conv1d(16, 3, 1),
        ),
        (randn(2, 12, 20),),
    )


@shape
def spectral_mask() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        s = torch.stft(x, 16, 4, 16, m.window, return_complex=True)
        parts = m.net(torch.view_as_real(s).permute(0, 3, 1, 2))
        mask = torch.view_as_complex(parts.permute(0, 2, 3, 1).contiguous())
        return torch.istft(s * mask, 16, 4, 16, m.window, length=x.shape[-1])

    convs = [nn.Conv2d(2, 16, 3, padding=1), nn.PReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.PReLU(24)]
    net = nn.Sequential(*convs, nn.Conv2d(24, 2, 1))
    return Case(Net(run, window=torch.hann_window(16), net=net), (randn(2, 64),))


@shape
def statistics_pooling() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x.transpose(1, 2)).relu()
        parts, outs = x.chunk(4, 1), []
        for conv, part in zip(m.scales, parts[1:], strict=True):
            outs.append(conv(part + outs[-1] if outs else part).relu())
        x = torch.cat([parts[0], *outs], 1)
        spread = x.var(2, keepdim=True).clamp(1e-4).sqrt()
        context = torch.cat([x, x.mean(2, keepdim=True).expand_as(x), spread.expand_as(x)], 1)
        w = m.score(m.hidden(context).tanh()).softmax(2)
        mean = (x * w).sum(2)
        deviation = ((x**2 * w).sum(2) - mean**2).clamp(min=1e-4).sqrt()
        return m.head(m.norm(torch.cat([mean, deviation], 1)))

    return Case(
        Net(
            run,
            conv=nn.Conv1d(20, 24, 3, padding=1),
            scales=nn.ModuleList(nn.Conv1d(6, 6, 3, padding=1) for _ in range(3)),
            hidden=nn.Conv1d(72, 10, 1),
            score=nn.Conv1d(10, 24, 1),
            norm=nn.BatchNorm1d(48),
            head=nn.Linear(48, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def diagonal_state_space() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x).transpose(1, 2)
        length = x.shape[-1]
        a = torch.complex(-m.decay.exp(), m.turn)
        step = a * m.step.exp()[:, None]
        kernel = (step[..., None] * torch.arange(length)).exp()
        weight = torch.view_as_complex(m.c) * (step.exp() - 1) / a
        k = 2 * torch.einsum("hn,hnl->hl", weight, kernel).real
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(k, n=2 * length), n=2 * length)
        y = F.glu(m.out(F.gelu(y[..., :length] + x * m.skip[:, None])), dim=1)
        return m.head(y.transpose(1, 2))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            decay=parameter(24, 8),
            turn=parameter(24, 8),
            step=parameter(24),
            c=parameter(24, 8, 2),
            skip=parameter(24),
            out=nn.Conv1d(24, 48, 1),
            head=nn.Linear(24, 5),
        ),
        (randn(*TOKENS),),
    )


@shape
def weighted_recurrence() -> Case:
    """Attention without queries as a stable recurrence, with tokens mixed with the ones before them."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        before = F.pad(x, (0, 0, 1, -1))
        k, v = m.k(x * m.mix_k + before * (1 - m.mix_k)), m.v(x)
        r = m.r(x * m.mix_r + before * (1 - m.mix_r)).sigmoid()
        top, low = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        most = torch.full_like(top, -1e9)
        ys = []
        for t in range(x.shape[1]):
            now = m.bonus + k[:, t]
            p = torch.maximum(most, now)
            a, b = (most - p).exp(), (now - p).exp()
            ys.append((a * top + b * v[:, t]) / (a * low + b))
            later = most - m.decay.exp()
            p = torch.maximum(later, k[:, t])
            a, b = (later - p).exp(), (k[:, t] - p).exp()
            top, low, most = a * top + b * v[:, t], a * low + b, p
        return m.head(x + m.out(r * torch.stack(ys, 1)))

    return Case(
        Net(
            run,
            embed=nn.Linear(20, 24),
            mix_k=parameter(1, 1, 24),
            mix_r=parameter(1, 1, 24),
            k=nn.Linear(24, 32),
            v=nn.Linear(24, 32),
            r=nn.Linear(24, 32),
            decay=parameter(32),
            bonus=parameter(32),
            out=nn.Linear(32, 24),
            head=nn.Linear(24, 5),
        ),
        (randn(2, 5, 20),),
    )
