"""Autograd functions under ``torch.vmap``, which makes functions of its own of them: their own backward stays."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.capture import SpecializationWarning
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


class Ruled(OfOwn):
    """What vmap makes of it depends on how much it runs over."""

    @staticmethod
    def forward(x: Tensor, factor: int = 1) -> Tensor:
        return x.round() * factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5, None


class ByCount(Ruled):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, factor: int) -> Any:  # type: ignore[override]
        return ByCount.apply(x, factor * info.batch_size), in_dims[0]


class BySize(Ruled):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, factor: int) -> Any:  # type: ignore[override]
        return BySize.apply(x, factor if x.shape[0] > 4 else 2 * factor), in_dims[0]


class OneByOne(Ruled):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, factor: int) -> Any:  # type: ignore[override]
        return torch.stack([OneByOne.apply(row, factor) for row in x.movedim(in_dims[0], 0)]), 0


class ByData(Ruled):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, factor: int) -> Any:  # type: ignore[override]
        return (ByData.apply(x, factor) if x.sum() > 0 else ByData.apply(-x, factor)), in_dims[0]


class Doubled(OfOwn):
    """In place."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.mul_(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Doubled.apply(x), in_dims[0]


class First(_Mapped):
    """Its tensors come in a list, through which no gradient goes."""

    @staticmethod
    def forward(found: list[Tensor]) -> Tensor:
        return found[0] * 2 + found[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None


def _doubled(x: Tensor) -> Tensor:
    def row(y: Tensor) -> Tensor:
        z = y * 1
        Doubled.apply(z[:4])
        return z + y

    return torch.vmap(row)(x)


def _pair(x: Tensor) -> Tensor:
    def both(row: Tensor, y: Tensor) -> Any:
        return Pair.apply(row, y, 3)

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
    "of its own by a count": torch.vmap(lambda row: ByCount.apply(row, 3)),
    "of its own by a size": torch.vmap(lambda row: BySize.apply(row, 3)),
    "of its own one by one": torch.vmap(lambda row: OneByOne.apply(row, 3)),
    "in place": _doubled,
    "a list": lambda x: torch.vmap(lambda row: First.apply([row, x[0]]) + row)(x),
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


def test_what_data_decide_in_its_own_rule() -> None:
    model = randomise(Net(torch.vmap(lambda row: ByData.apply(row, 3))))
    with pytest.warns(SpecializationWarning, match="__bool__"):
        traced = chase_fx.trace(model, torch.randn(3, 4, dtype=torch.float64))
    for seed in range(6):
        torch.manual_seed(seed)
        _assert_same(traced, model, torch.randn(3, 4, dtype=torch.float64))


def test_a_call_in_place_of_what_a_vmap_gave() -> None:
    """It is not done twice: the tensor is taken as it was before the call."""
    model, x = Net(lambda y: torch.vmap(torch.abs)(y).mul_(2) + 1).double(), torch.randn(3, 4, dtype=torch.float64)
    assert difference(model(x), chase_fx.trace(model, (x,))(x)) <= EXACT


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None)])
def test_compiled_graphs_keep_the_backward(in_dims: tuple[int | None, ...]) -> None:
    """Which Dynamo loses, or refuses, where it looks into the call."""
    both = torch.vmap(lambda row, y: sum(Pair.apply(row, y, 3)), in_dims)
    model = Net(lambda y: both(y, y if in_dims[1] == 0 else y[0])).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(model, (x,))
    traced.compile(backend="eager", fullgraph=True)
    _assert_same(traced, model, x)


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
