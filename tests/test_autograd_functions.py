"""Custom autograd functions, checkpoints and what a forward reads of gradients; squeezed dims of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import chase_fx
from chase_fx.graphs.functions import forward_patches
from tests.nets import Net


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


straight = _Straight.apply  # bound before any capture


class _Groups(torch.autograd.Function):
    """Each of ``groups`` parts of the channels by its own length: sizes that only the function knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        y = x.reshape(x.shape[0], groups, x.shape[1] // groups)
        return (y / (1 + y.square().sum(-1, keepdim=True))).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, half:].exp(), x[:, :half]], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Signs(torch.autograd.Function):
    """Binary weights, scaled by how many there are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float) -> Tensor:
        return scale / weight.shape[1] ** 0.5 * weight.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Norm(torch.autograd.Function):
    """A norm that reads sizes, and computes with no numbers but those that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, channels = x.size()
        y = (x - x.mean(1, keepdim=True)) * 0.5
        return y / (y.pow(2).mean(1, keepdim=True) + eps).sqrt() * weight.view(1, channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


@pytest.mark.parametrize("normed", [False, True])
def test_numbers_that_an_autograd_function_makes_of_sizes(normed: bool) -> None:
    """What a function scales by its sizes would be scaled otherwise in a slim graph, so it keeps them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.d(m.a(x).tanh()).tanh()
        if normed:
            return m.c(_Norm.apply(y, m.n.weight, 1e-5))
        return m.c(nn.functional.linear(y, _Signs.apply(m.b.weight, 2.0)).tanh())

    torch.manual_seed(0)
    parts = {"a": nn.Linear(4, 6), "d": nn.Linear(6, 8), "b": nn.Linear(8, 12), "c": nn.Linear(8 if normed else 12, 2)}
    net = Net(forward, **parts, n=nn.LayerNorm(8)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(net, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    chase_fx.verify(traced, slim)
    assert slim.get_parameter("d.weight").shape == (4 if normed else 8, 3)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, y: straight(y),
        lambda m, y: _Straight.apply(y),
        lambda m, y: checkpoint(m.b, y, use_reentrant=True),
        lambda m, y: checkpoint(lambda z: m.b(z).tanh(), y, use_reentrant=False),
    ],
)
def test_gradients_of_autograd_functions(step: Callable[..., Tensor]) -> None:
    """A custom backward is kept, also of a function that was bound early; a checkpoint has the gradient of its code."""
    net = Net(lambda m, x: m.out(step(m, m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 8), out=nn.Linear(8, 2)).double()
    x = torch.randn(3, 6).double()
    used = [p for p in net.parameters() if p is not None]
    traced = chase_fx.trace(net, x)
    net(x).square().sum().backward()
    traced(x).square().sum().backward()
    for want, have in zip(used, traced.parameters(), strict=True):
        assert (want.grad is None) == (have.grad is None)
        assert want.grad is None or torch.allclose(want.grad, have.grad, rtol=1e-12)


@pytest.mark.parametrize(("step", "kept"), [(lambda y: _Groups.apply(y, 2), 8), (_Halves.apply, 8), (straight, 4)])
def test_what_an_autograd_function_cuts_stays(step: Callable[[Tensor], Tensor], kept: int) -> None:
    """The sizes in it can't be replaced, so what it tears apart keeps its channels; other functions freeze none."""
    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "out": nn.Linear(8, 2)}
    net = Net(lambda m, x: m.out(m.b(step(m.a(x))).tanh()), **parts).double()
    traced = chase_fx.trace(net, torch.randn(3, 6).double())
    channels = chase_fx.analyze(traced)
    slim = chase_fx.rewrite(traced, channels.plan(0.5))
    assert chase_fx.verify(traced, slim).difference < 1e-12
    assert slim.a.out_features == kept
    assert kept == 4 or "inside an autograd function" in channels.frozen["a.weight", 0]


def test_a_parameter_that_asks_for_a_gradient_does_so_in_a_capture() -> None:
    """A forward that looks at ``requires_grad`` takes the same way as outside."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y * 2 if m.a.weight.requires_grad else y
        y = y * 3 if y.requires_grad else y
        return m.out(y * 5 if x.requires_grad else y)

    net = Net(forward, a=nn.Linear(6, 8), out=nn.Linear(8, 2))
    for trained in (True, False):
        net.requires_grad_(trained)
        x = torch.randn(3, 6)
        assert torch.allclose(chase_fx.trace(net, x)(x), net(x))


@pytest.mark.parametrize("step", [lambda y: y.squeeze(1), lambda y: y.squeeze(), lambda y: y.squeeze((0, -1))])
def test_a_single_kept_channel_is_not_squeezed(step: Callable[[Tensor], Tensor]) -> None:
    """Squeezing a dim of channels does nothing, also where one channel is left."""
    net = Net(lambda m, x: m.out(step(m.a(x))), a=nn.Linear(6, 8), out=nn.Linear(8, 2)).double()
    slim = chase_fx.prune(net, torch.randn(3, 6).double(), channel_sparsity=0.9)
    assert slim.a.out_features == 1
    assert slim(torch.randn(4, 6).double()).shape == (4, 2)


def test_functions_that_torch_makes_for_operators_are_left_alone() -> None:
    """Only the operator applies them; there are hundreds, and a capture would replace the forward of each."""
    found = [cls for cls, _, _ in forward_patches(lambda *_: None)]
    assert _Straight in found
    assert any(cls.__module__ == "torch._library.autograd" for cls in torch.autograd.Function.__subclasses__())
    assert not [cls for cls in found if cls.__module__ == "torch._library.autograd"]
