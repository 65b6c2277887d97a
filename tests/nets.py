"""Small nets, at least one per family of operator rules, on images of 3 x 4 x 4."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import randomise


class Net(nn.Module):
    """A module from a forward and its layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(a: int, b: int, groups: int = 1, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, padding=kernel // 2, groups=groups)


def concat_net() -> nn.Module:
    return Net(lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 8), b=conv(3, 4), out=conv(12, 2))


def residual_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.a(x) + m.b(x)), a=conv(3, 8), b=conv(3, 8), out=conv(8, 2))


def chain_net() -> nn.Module:
    return Net(lambda m, x: m.out(F.relu(m.a(x))), a=conv(3, 8), out=conv(8, 2))


def batch_norm_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.norm(m.a(x))), a=conv(3, 8), norm=nn.BatchNorm2d(8), out=conv(8, 2))


def group_norm_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.norm(m.a(x))), a=conv(3, 8), norm=nn.GroupNorm(2, 8), out=conv(8, 2))


def layer_norm_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.norm(m.a(x.mean((2, 3)))))

    return Net(forward, a=nn.Linear(3, 8), norm=nn.LayerNorm(8), out=nn.Linear(8, 2))


def rms_norm_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.norm(m.a(x.mean((2, 3)))))

    return Net(forward, a=nn.Linear(3, 8), norm=nn.RMSNorm(8), out=nn.Linear(8, 2))


def grouped_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 16, groups=4), out=conv(16, 2))


def split_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = torch.split(m.a(x), [4, 8], 1)
        return m.out(m.b(a)) + m.tail(b)

    return Net(forward, a=conv(3, 12), b=conv(4, 6), out=conv(6, 2), tail=conv(8, 2))


def slice_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y[:, 2:8]) + m.rest(y)

    return Net(forward, a=conv(3, 12), out=conv(6, 2), rest=conv(12, 2))


def permute_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.a(x).permute(0, 2, 3, 1))

    return Net(forward, a=conv(3, 8), out=nn.Linear(8, 2))


def transpose_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.a(x).flatten(2).transpose(1, 2))

    return Net(forward, a=conv(3, 16), out=nn.Linear(16, 2))


def flatten_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.a(x).flatten(1)), a=conv(3, 8), out=nn.Linear(8 * 16, 2))


def shuffle_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y.view(x.shape[0], 2, 4, 4, 4).transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
        return m.out(y + m.b(x))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), out=conv(8, 2))


def excite_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))))

    return Net(forward, a=conv(3, 8), gate=conv(8, 8), out=conv(8, 2))


def channel_mean_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y) + y.mean(1, keepdim=True)

    return Net(forward, a=conv(3, 8), out=conv(8, 2))


def channel_max_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y)) + y.amax(1, keepdim=True)

    return Net(forward, a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))


def softmax_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.b(m.a(x)).softmax(1))

    return Net(forward, a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))


def pad_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.a(x) + F.pad(m.b(x), (0, 0, 0, 0, 2, 4)))

    return Net(forward, a=conv(3, 12), b=conv(3, 6), out=conv(12, 2))


def glu_net() -> nn.Module:
    return Net(lambda m, x: m.out(F.glu(m.a(x), 1)), a=conv(3, 16), out=conv(8, 2))


def attention_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        q, k, v = (p(y).view(x.shape[0], 16, 2, 8).transpose(1, 2) for p in (m.q, m.k, m.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return m.out(out.transpose(1, 2).reshape(x.shape[0], 16, 16))

    return Net(forward, q=nn.Linear(3, 16), k=nn.Linear(3, 16), v=nn.Linear(3, 16), out=nn.Linear(16, 2))


def matmul_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        return m.out((m.a(y) @ m.b(y).transpose(1, 2)) @ m.c(y))

    return Net(forward, a=nn.Linear(3, 8), b=nn.Linear(3, 8), c=nn.Linear(3, 8), out=nn.Linear(8, 2))


def embedding_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        place = torch.arange(4, device=x.device)
        return m.out(m.a(x).mean(2).transpose(1, 2) + m.place(place))

    return Net(forward, a=conv(3, 8), place=nn.Embedding(4, 8), out=nn.Linear(8, 2))


def sum_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y) + y.sum(1, keepdim=True)

    return Net(forward, a=conv(3, 8), out=conv(8, 2))


def cumulative_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.b(m.a(x)).cumsum(1)), a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))


def flip_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.b(m.a(x)).flip(1)), a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))


def roll_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.b(m.a(x)).roll(3, 1)), a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))


def gather_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        picked = torch.tensor([7, 3, 5, 1, 0, 2], device=x.device)
        return m.out(m.b(m.a(x)).index_select(1, picked))

    return Net(forward, a=conv(3, 8), b=conv(8, 8), out=conv(6, 2))


def topk_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.b(m.a(x)).topk(4, 1).values), a=conv(3, 8), b=conv(8, 8), out=conv(4, 2))


def select_net() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return m.out(y) + y.select(1, 6).unsqueeze(1)

    return Net(forward, a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))


def repeat_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 8), out=conv(16, 2))


def interleave_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.a(x).repeat_interleave(2, 1)), a=conv(3, 8), out=conv(16, 2))


def pixel_shuffle_net() -> nn.Module:
    return Net(lambda m, x: m.out(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 16), out=conv(4, 2))


def transposed_net() -> nn.Module:
    return Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 12, 2, groups=2), out=conv(12, 2))


NETS = {name.removesuffix("_net"): make for name, make in list(globals().items()) if name.endswith("_net")}


def build(name: str, batch: int = 3) -> tuple[nn.Module, tuple[Tensor]]:
    """A randomised net and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = (torch.randn(batch, 3, 4, 4, dtype=torch.float64),)
        return randomise(NETS[name](), x), x
