"""How far grouped convolutions shrink: within their groups first, and as near to what is asked for as factors allow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.traced import TracedModule
from tests.nets import Net, conv
from tests.oracle import assert_exact, randomise


def pruned(net: nn.Module, sparsity: float, round_to: int = 1) -> TracedModule:
    """The slim module, which was judged by an oracle that knows no labels."""
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slim = chase_fx.prune(randomise(net, (x,)), x, channel_sparsity=sparsity, round_to=round_to).eval()
    assert_exact(net, slim, (x,))
    return slim


def between(*layers: nn.Conv2d) -> nn.Module:
    """The layers between two plain convolutions."""
    first, last = layers[0], layers[-1]
    ends = {"a": conv(3, first.in_channels), "out": conv(last.out_channels, 2)}
    inner = {f"b{i}": layer for i, layer in enumerate(layers)}

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.get_submodule("a")(x)
        for name in inner:
            x = F.gelu(net.get_submodule(name)(x))
        return net.get_submodule("out")(x)

    return Net(forward, **ends, **inner)


def widths_of(slim: nn.Module, name: str = "b0") -> tuple[int, int, int]:
    """Inputs, outputs and groups of a convolution."""
    layer = slim.get_submodule(name)
    out, within = layer.get_parameter("weight").shape[:2]
    return within * layer.groups, out, layer.groups


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "sparsity", "expected"),
    [
        (32, 32, 8, 0.5, (16, 16, 8)),
        (32, 32, 8, 0.9, (3, 3, 3)),
        (6, 6, 2, 0.5, (3, 3, 1)),  # two of three channels in both groups would be two thirds
        (10, 30, 2, 0.5, (5, 15, 1)),
        (12, 8, 4, 0.3, (9, 6, 3)),  # three of four groups are nearer to 0.7 than one or two channels in each
        (8, 8, 8, 0.5, (4, 4, 4)),
        (8, 24, 8, 0.5, (4, 12, 4)),
    ],
)
def test_the_share_that_stays_is_near_to_what_was_asked_for(
    inputs: int, outputs: int, groups: int, sparsity: float, expected: tuple[int, int, int]
) -> None:
    """Groups go where the channels within them are too few to be halved."""
    assert widths_of(pruned(between(conv(inputs, outputs, groups, kernel=3)), sparsity)) == expected


@pytest.mark.parametrize(
    ("channels", "groups", "round_to", "sparsity"),
    [(16, 4, 4, 0.5), (18, 9, 8, 0.5), (16, 2, 8, 0.9), (64, 16, 16, 0.5), (64, 16, 16, 0.75), (24, 6, 4, 0.3)],
)
def test_both_sides_of_a_grouped_convolution_are_rounded(
    channels: int, groups: int, round_to: int, sparsity: float
) -> None:
    """Its width is groups x channels in a group; the channels in a group need not be a multiple by themselves."""
    left = max(round(channels * (1 - sparsity) / round_to), 1) * round_to
    inputs, outputs, _ = widths_of(pruned(between(conv(channels, channels, groups)), sparsity, round_to))
    assert (inputs, outputs) == (left, left)


def test_groups_that_another_convolution_divides_are_still_groups() -> None:
    """Eight groups are two times four where the next convolution has two: each gets narrower, and none goes."""
    slim = pruned(between(conv(16, 16, 8), conv(16, 16, 2)), 0.5)
    assert [widths_of(slim, name) for name in ("b0", "b1")] == [(8, 8, 8), (8, 8, 2)]


class Attention(nn.Module):
    """Four heads of four channels, behind a convolution of queries, keys and values."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (conv(3, 16) for _ in "qkv")
        self.b = conv(16, 16, groups, kernel=3)
        self.out = conv(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.reshape(len(y), 4, 4, -1).transpose(2, 3)

        y = F.scaled_dot_product_attention(heads(self.b(self.q(x))), heads(self.k(x)), heads(self.v(x)))
        return self.out(y.transpose(2, 3).reshape(len(x), -1, *x.shape[2:]))


@pytest.mark.parametrize("groups", [4, 16])
def test_heads_go_whole_behind_a_grouped_convolution(groups: int) -> None:
    """Also where heads are its groups, or it has one for each channel."""
    slim = pruned(Attention(groups), 0.5)
    kept = slim.plan.kept_indices()["q.weight"][0]
    assert kept is not None
    assert len(kept) == 8
    assert len(set((kept // 4).tolist())) == 2
