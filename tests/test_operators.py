"""Operators of sequence, graph and metric-learning nets between two layers: exact, with channels that can go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import chase_fx
from tests.nets import Net
from tests.oracle import EXACT, difference, masked_copy, randomise

Step = Callable[[nn.Module, Tensor], Tensor]
INDEX = torch.tensor([2, 0, 0])


@pytest.mark.parametrize(
    "step",
    [
        lambda m, y: torch.cdist(y, m.b(y)).mean(-1, keepdim=True) * y,
        lambda m, y: torch.cdist(y, m.w[:2], p=1.0)[..., :1] + y,
        lambda m, y: y.clone().masked_fill_(y > 0.5, 0.0) + y.masked_fill(y < 0, torch.tensor(0.0, dtype=y.dtype)),
        lambda m, y: torch.rsub(y, m.b(y)),
        lambda m, y: torch.zeros_like(y).index_reduce(1, INDEX, m.b(y), "amax", include_self=False) + y,
        lambda m, y: y.index_fill(1, INDEX, 0.0),
        lambda m, y: torch.addmm(y.flatten(0, 1), y.flatten(0, 1), m.w, beta=0.3, alpha=0.7).unflatten(0, (2, 3)),
        lambda m, y: torch.slice_scatter(y, m.b(y)[:, 1:3], 1, 1, 3).select_scatter(y[:, 0], 1, 0),
        lambda m, y: y @ torch.diag_embed(m.b(y)[0, 0]),
        lambda m, y: y + torch.addmv(m.w[0], m.w, y[0, 0]),
        lambda m, y: y + torch.addr(m.w, y[0, 0], y[0, 1])[0] + torch.addbmm(m.w, m.w[None], m.w[None])[1],
        lambda m, y: y * F.mse_loss(y, m.b(y), reduction="none") + F.smooth_l1_loss(y, m.b(y), reduction="sum"),
        lambda m, y: y + y.unfold(1, 2, 1).mean(-1).sum(1, keepdim=True),
        lambda m, y: y + pad_packed_sequence(pack_padded_sequence(m.b(y), INDEX.new_tensor([3, 2]), True), True)[0],
        lambda m, y: y + F.embedding_bag(torch.tensor([[0, 3], [2, 2]]), m.w, mode="sum")[:, None],
    ],
)
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_one_operator_between_two_layers(step: Step) -> None:
    """Half of the channels go, by the reference and by a model whose removed slices are zero."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(step(m, m.a(x)).tanh())

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6).double()
    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "out": nn.Linear(8, 5)}
    net = Net(forward, **parts)
    net.register_parameter("w", nn.Parameter(torch.randn(8, 8)))
    randomise(net)
    slim = chase_fx.prune(net, x, channel_sparsity=0.5).eval()
    assert slim.a.weight.shape[0] <= 5
    with torch.no_grad():
        expected = masked_copy(net, slim.plan.kept_indices())(x)
        assert difference(expected, slim(x)) <= EXACT
    assert not chase_fx.analyze(chase_fx.trace(net, x)).unknown


def test_an_unknown_operator_on_fixed_dims_is_not_reported() -> None:
    """Where no channel can be lost, a missing rule has lost none."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.a(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)).relu())

    net = Net(forward, a=nn.Linear(6, 8), out=nn.Linear(8, 5))
    channels = chase_fx.analyze(chase_fx.trace(net, torch.randn(6, 6)), on_unknown="raise")
    assert not channels.unknown


@pytest.mark.parametrize(
    "noise",
    [
        lambda y: F.dropout(y, 0.5, training=True),
        lambda y: y + torch.empty_like(y).normal_(),
        lambda y: y * torch.empty_like(y).uniform_(0.5, 1.5),
    ],
)
def test_noise_in_eval_mode_is_no_difference(noise: Callable[[Tensor], Tensor]) -> None:
    """A slim graph draws fewer numbers than the dense one; verification compares what is made of them."""
    net = Net(lambda m, x: m.out(noise(m.a(x)).tanh()), a=nn.Linear(6, 8), out=nn.Linear(8, 5)).double()
    slim = chase_fx.prune(net, torch.randn(2, 6).double(), channel_sparsity=0.5)
    assert slim.a.out_features == 4
