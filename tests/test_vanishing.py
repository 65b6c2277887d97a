"""Units that do not vanish with their weights stay where they are summed over: removing equals zeroing weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from tests.nets import Net
from tests.oracle import EXACT, difference, masked_copy, randomise

Step = Callable[[nn.Module, Tensor], Tensor]


def pairs(y: Tensor) -> Tensor:
    """Differences of channels: (..., C) -> (..., C, C), zero along neither dim where a channel is."""
    return y[..., None] - y[..., None, :]


def attended(weight: Tensor, query: Tensor) -> Tensor:
    """Each of the query's rows looks at the same rows of a weight."""
    rows = weight.expand(*query.shape[:2], *weight.shape)
    return F.scaled_dot_product_attention(query, rows, rows)


def identity(y: Tensor) -> Tensor:
    return torch.eye(8, dtype=y.dtype)


def net_of(step: Step) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 1))
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "out": nn.Linear(8, 5), "normed": normed}
    layers["state"] = nn.BatchNorm1d(8, affine=False)
    layers["pair"] = nn.Bilinear(8, 8, 8)
    side = {"c": nn.Linear(6, 8), "d": nn.Linear(8, 5)}
    net = Net(lambda m, x: m.out(m.a(x).relu() + step(m, m.a(x))) + m.d(m.c(x).relu()), **layers, **side)
    return randomise(net), torch.randn(2, 3, 6).double()


STAYS: list[Step] = [
    lambda m, y: (F.elu(m.b(y)) + 1).sum(-1, keepdim=True),
    lambda m, y: (F.elu(m.b(y)) + 1) @ (F.elu(m.b(y)) + 1).transpose(1, 2) @ y,
    lambda m, y: m.b(y).sigmoid().norm(dim=-1, keepdim=True),
    lambda m, y: torch.cdist(m.b(y).exp(), y)[..., :1],
    lambda m, y: (y + torch.arange(1.0, 9.0, dtype=y.dtype)).pow(2).sum(-1, keepdim=True),
    lambda m, y: (y + m.state.running_var).pow(2).sum(-1, keepdim=True),
    lambda m, y: (y.cos() * m.state.running_var).sum(-1, keepdim=True),
    lambda m, y: m.state(y.transpose(1, 2)).pow(2).sum(1)[..., None],
    lambda m, y: m.b(y).masked_fill(y <= 0, 1.0).sum(-1, keepdim=True),
    lambda m, y: pairs(y).abs().sum((-2, -1))[..., None],
    lambda m, y: (pairs(y) @ m.b.weight).relu().sum(-1).pow(2).sum(-1, keepdim=True),
    lambda m, y: m.normed(pairs(y).flatten(0, 1)).relu().sum(1).pow(2).sum(-1)[:, None, None].mean(0),
    lambda m, y: F.layer_norm(y[..., None] * y[..., None, :], (8,), m.b.bias).abs().sum((-2, -1))[..., None],
    lambda m, y: torch.zeros_like(y)[..., None].add(y[..., None, :]).sub_(y[..., None]).abs().sum((-2, -1))[..., None],
    lambda m, y: attended(m.out.weight, y[..., None] * m.b.weight).sum((-2, -1))[..., None],
    lambda m, y: (y[..., None].sigmoid() * y[..., None, :]).sum((-2, -1))[..., None],
    lambda m, y: (y[..., None].sigmoid() * y[..., None, :]).sum(-1).sum(-1, keepdim=True),
    lambda m, y: torch.baddbmm(m.b.bias, y.transpose(1, 2), y).relu().sum((-2, -1))[..., None, None],
    lambda m, y: (y[..., None] + y[..., None, :]).relu().sum(-1).pow(2).sum(-1, keepdim=True),
    lambda m, y: (y @ (1 - identity(y))).sum(-1, keepdim=True),
    lambda m, y: (y.sigmoid() @ identity(y)).sum(-1, keepdim=True),
    lambda m, y: (y.transpose(1, 2) @ y - identity(y)).pow(2).sum((-2, -1))[..., None, None],
    lambda m, y: torch.diag_embed(y.sigmoid()).sum((-2, -1))[..., None],
    lambda m, y: (pairs(y).cos() * identity(y)).sum(-1).sum(-1, keepdim=True),
    lambda m, y: F.bilinear(y, y.sigmoid(), m.pair.weight.exp()),
]
GOES: list[Step] = [
    lambda m, y: m.b(y).relu().sum(-1, keepdim=True),
    lambda m, y: (m.b(y).gelu() if hasattr(y, "gelu") else F.gelu(m.b(y))) @ y.sigmoid().transpose(1, 2) @ y,
    lambda m, y: F.normalize(m.b(y) * y.exp(), dim=-1),
    lambda m, y: F.scaled_dot_product_attention(y, m.b(y), y.cos()),
    lambda m, y: torch.cdist(m.b(y).tanh(), y)[..., :1],
    lambda m, y: F.glu(torch.cat([m.b(y), m.b(y)], -1)).square().sum(-1, keepdim=True),
    lambda m, y: F.layer_norm(m.b(y), (8,), m.b.bias, m.a.bias).sum(-1, keepdim=True),
    lambda m, y: torch.zeros_like(y).add_(m.b(y)).mul_(2).sum(-1, keepdim=True),
    lambda m, y: (y[..., None] * y[..., None, :]).sum((-2, -1))[..., None],
    lambda m, y: (m.b(y) @ (y.transpose(1, 2) @ y)).sum(-1, keepdim=True),
    lambda m, y: m.normed(y.cos().transpose(1, 2)).transpose(1, 2).sum(-1, keepdim=True),
    lambda m, y: F.linear(y.cos(), m.b.weight * 2, m.b.bias).sum(-1, keepdim=True),
    lambda m, y: F.conv_transpose1d(y.cos().transpose(1, 2), m.b.bias[:, None, None] * 1, groups=8).sum(1)[..., None],
    lambda m, y: (pairs(y).sigmoid() * y[..., None] * y[..., None, :]).sum((-2, -1))[..., None],
    lambda m, y: (y[..., None].sigmoid() * y[..., None, :]).sum(-1),
    lambda m, y: (pairs(y).exp() @ y[..., None])[..., 0],
    lambda m, y: (y @ identity(y)).sum(-1, keepdim=True),
    lambda m, y: y.sigmoid() @ identity(y),
    lambda m, y: ((pairs(y).cos() * identity(y)) @ y[..., None]).sum(-2),
    lambda m, y: (y.transpose(1, 2) @ y * (1 - identity(y))).pow(2).sum((-2, -1))[..., None, None],
    lambda m, y: torch.diag_embed(y).sum((-2, -1))[..., None],
    lambda m, y: F.bilinear(y, y, m.pair.weight.exp()),
]


def pruned(step: Step) -> tuple[nn.Module, Tensor, chase_fx.ChannelGraph, nn.Module]:
    net, x = net_of(step)
    channels = chase_fx.analyze(chase_fx.trace(net, x))
    return net, x, channels, chase_fx.prune(net, x, channel_sparsity=0.5, score="random").eval()


@pytest.mark.parametrize("step", STAYS)
def test_units_that_do_not_vanish_stay(step: Step) -> None:
    """A model whose removed slices are zero computes what the slim one does: no weight brought in what is summed."""
    net, x, channels, slim = pruned(step)
    with torch.no_grad():
        expected = masked_copy(net, slim.plan.kept_indices())(x)
    assert difference(expected, slim(x)) <= EXACT
    assert "do not vanish" in " ".join(channels.frozen.values())


def test_copies_without_weights_are_all_summed() -> None:
    """The copies that an expand makes have no weights to vanish with."""
    net, x, _, slim = pruned(lambda m, y: y[..., None].expand(-1, -1, -1, 4).sum(-1))
    with torch.no_grad():
        expected = masked_copy(net, slim.plan.kept_indices())(x)
    assert difference(expected, slim(x)) <= EXACT


@pytest.mark.parametrize("step", GOES)
def test_units_that_vanish_go(step: Step) -> None:
    """Zeros stay zeros through everything that keeps them."""
    _, _, channels, slim = pruned(step)
    assert "do not vanish" not in " ".join(channels.frozen.values())
    assert slim.a.out_features == 4
