"""Autograd functions under ``torch.vmap``, which makes functions of its own of them: their own backward stays."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.oracle import EXACT, difference, masked_copy, randomise
from tests.two_layers import Body


class _Mapped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class Rounded(_Mapped):
    """Straight through: rounding that has a gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5


class Pair(_Mapped):
    """Two results and a number, with gradients that no calculus gives."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        return x.round() * factor, x * y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[1] * 3, None


class Noisy(_Mapped):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5


class OfOwn(torch.autograd.Function):
    """It says itself what vmap makes of it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return OfOwn.apply(x), in_dims[0]


def _pair(x: Tensor) -> Tensor:
    both: Any = lambda row, y: Pair.apply(row, y, 3)  # noqa: E731
    first, second = torch.vmap(torch.vmap(both, (0, None)), (1, 0), (1, 0))(torch.stack((x, x * 2)), x)
    return first.sum(0) + second.sum(1)


def _other_dims(x: Tensor) -> Tensor:
    return torch.vmap(torch.vmap(Rounded.apply, 1, 1), 0, 2)(torch.stack((x, x * 2), 2)).sum(1).transpose(0, 1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": torch.vmap(Rounded.apply),
    "between other calls": torch.vmap(lambda row: Rounded.apply(row.tanh() * 3) + row.sum()),
    "along channels": torch.vmap(Rounded.apply, 1, 1),
    "twice": torch.vmap(torch.vmap(Rounded.apply)),
    "two results": _pair,
    "other dims": _other_dims,
    "nothing mapped": lambda x: torch.vmap(lambda row: Rounded.apply(x) * row)(x).sum(1),
    "of its own": torch.vmap(OfOwn.apply),
    "inside a gradient": lambda x: x * torch.vmap(torch.func.grad(lambda row: Rounded.apply(row).square().sum()))(x),
    "outside a gradient": lambda x: x * torch.func.grad(lambda z: torch.vmap(Rounded.apply)(z).square().sum())(x),
}


class Net(Body):
    """A layer, ``function``, a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _assert_same(ours: nn.Module, model: nn.Module, x: Tensor) -> None:
    assert difference(model(x), ours(x)) <= EXACT
    theirs = _gradients(model, x)
    for name, gradient in _gradients(ours, x).items():
        want = theirs[name]
        assert want is not None, name
        assert gradient is not None, name
        assert torch.allclose(gradient, want), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_under_vmap_keeps_its_backward(name: str) -> None:
    """At every batch; slim modules equal the masked model."""
    model, x = randomise(Net(FUNCTIONS[name])), torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(model, (x,))
    for batch in (3, 5, 1):
        _assert_same(traced, model, torch.randn(batch, 4, dtype=torch.float64))
    slim = chase_fx.prune(model, (x,))
    assert slim.get_submodule("a").out_features == 4
    for batch in (3, 5):
        x = torch.randn(batch, 4, dtype=torch.float64)
        masked = masked_copy(model, slim.plan.kept_indices())
        assert difference(masked(x), slim(x)) <= EXACT


def test_it_pickles_with_its_vmaps() -> None:
    model, x = Net(torch.vmap(torch.vmap(Rounded.apply))).double(), torch.randn(3, 4, dtype=torch.float64)
    _assert_same(pickle.loads(pickle.dumps(chase_fx.trace(model, (x,)))), model, x)


def test_one_that_draws_draws_again() -> None:
    """Numbers are drawn in every call, one for each example."""
    model, x = Net(torch.vmap(Noisy.apply, randomness="different")).double(), torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(model, (x,))
    for _ in range(2):
        seed = torch.seed()
        want = model(x)
        torch.manual_seed(seed)
        assert torch.equal(traced(x), want)
