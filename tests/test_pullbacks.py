"""What comes out of ``torch.func`` and ``torch.vmap`` later, or by kernels of their own; elements of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap

import chase_fx
from chase_fx.graphs.plan import PruningPlan
from tests.oracle import EXACT, assert_exact, difference, masked_copy, randomise

Inside = Callable[["Between", Tensor], Tensor]


class Between(nn.Module):
    """``inside`` between two layers, on (batch, places, channels)."""

    def __init__(self, inside: Inside) -> None:
        super().__init__()
        self.first, self.more, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.inside = (inside,)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside[0](self, self.first(x)))


def pullback(m: Between, y: Tensor) -> Tensor:
    _, back = vjp(lambda z: m.more(z).tanh(), y)
    found: Tensor = back(y)[0]
    return found


def pullback_twice(m: Between, y: Tensor) -> Tensor:
    out, back = vjp(lambda z: m.more(z).sigmoid(), y)
    once: Tensor = back(out)[0]
    twice: Tensor = back(once * 2)[0]
    return once + twice


def pullback_of_several(m: Between, y: Tensor) -> Tensor:
    _, back, more = vjp(lambda z, w: (z * w.tanh(), z + 1), y, m.more(y), has_aux=True)
    one, two = back(y)
    found: Tensor = one + two * more
    return found


def pullback_to_weight(m: Between, y: Tensor) -> Tensor:
    out, back = vjp(lambda w: F.linear(y, w).tanh(), m.more.weight)
    return F.linear(y, back(out)[0])


def attention(_: Between, y: Tensor) -> Tensor:
    """Each sample by itself: the default scale is that of all channels."""
    return vmap(lambda q: F.scaled_dot_product_attention(q[None], q[None], q[None])[0])(y)


def group_norm(m: Between, y: Tensor) -> Tensor:
    return vmap(m.norm)(y)


def group_norm_of_images(m: Between, y: Tensor) -> Tensor:
    images = y.transpose(1, 2).unflatten(2, (-1, 1))
    normed = vmap(lambda q: F.group_norm(q[None], 4, m.norm.weight, m.norm.bias)[0])(images)
    return normed.flatten(2).transpose(1, 2)


PULLBACKS = (pullback, pullback_twice, pullback_of_several, pullback_to_weight)
INSIDES = (*PULLBACKS, attention, group_norm, group_norm_of_images)


def images(batch: int = 2, places: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 10 + places)
    return torch.randn(batch, places, 5, generator=generator, dtype=torch.float64)


def half(traced: nn.Module) -> PruningPlan:
    """Some channels of each group, not alike."""
    found: PruningPlan = chase_fx.analyze(traced).plan(channel_sparsity=0.5, score="random")
    return found


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("inside", INSIDES, ids=lambda f: f.__name__)
def test_values_and_channels(inside: Inside) -> None:
    """At every size, dense and slim; also without a check of the result."""
    model = randomise(Between(inside), (images(),))
    traced = chase_fx.trace(model, images())
    slim = chase_fx.rewrite(traced, half(traced))
    assert slim.plan.new_shape("first.weight")[0] < 8
    chase_fx.verify(traced, slim)
    for x in (images(), images(3, 4), images(2, 6)):
        assert difference(traced(x), model(x)) <= EXACT
        if inside in PULLBACKS:  # no layer may be rescaled inside of a transform
            assert difference(slim(x), masked_copy(model, slim.plan.kept_indices())(x)) <= EXACT
        else:
            assert_exact(model, slim, (x,))


def test_jacobian_inside_of_vmap() -> None:
    """Torch writes ones to a diagonal and splits what it computed into a list of one."""

    class Jacobian(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            found = vmap(lambda row: jacrev(lambda z: z**2)(row).sum())(y[:, 0])
            return self.last(y) * found[:, None, None]

    model = randomise(Jacobian(pullback), (images(),))
    traced = chase_fx.trace(model, images())
    for x in (images(), images(3, 4), images(2, 6)):
        assert difference(traced(x), model(x)) <= EXACT


def _vmap_without(m: Between, y: Tensor) -> Tensor:
    with torch.no_grad():
        found = vmap(lambda z: m.more(z).tanh())(y)
    return found + y


def _used_without(m: Between, y: Tensor) -> Tensor:
    found = vmap(lambda z: m.more(z).tanh())(y)
    with torch.no_grad():
        doubled = found * 2
    return found + doubled


def _pulled_without(m: Between, y: Tensor) -> Tensor:
    out, back = vjp(lambda z: m.more(z).tanh(), y)
    with torch.no_grad():
        found: Tensor = back(out)[0]
    return found + y + out


def _gradient(m: Between, y: Tensor) -> Tensor:
    return grad(lambda z: m.more(z).tanh().sum())(y)


@pytest.mark.parametrize(
    "inside",
    [pullback, pullback_twice, _vmap_without, _used_without, _pulled_without, _gradient],
    ids=lambda f: f.__name__,
)
def test_gradients(inside: Inside) -> None:
    """Calls inside a region without gradients have none, wherever their result is used first."""
    model = Between(inside).double()
    traced = chase_fx.trace(model, images())
    x = images()
    for module in (model, traced):
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        found = traced.get_parameter(name).grad
        assert (found is None) == (parameter.grad is None)
        assert found is None or parameter.grad is None or difference(found, parameter.grad) <= EXACT


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z.square().mean(),
    "mean of channels": lambda z: z.pow(3).mean(-1).sum(),
    "variance": lambda z: z.var(-1).sum(),
    "deviation": lambda z: z.std(-1).square().sum(),
}


@pytest.mark.parametrize("of", MEANS.values(), ids=list(MEANS))
@pytest.mark.parametrize("transform", [grad, lambda of: lambda y: vjp(of, y)[1](torch.ones((), dtype=y.dtype))[0]])
def test_gradients_that_count_channels_keep_them(of: Callable[[Tensor], Tensor], transform: Any) -> None:
    """How many there are is a number in the call that divides by it."""
    model = randomise(Between(lambda _, y: transform(of)(y)), (images(),))
    traced = chase_fx.trace(model, images())
    channels = chase_fx.analyze(traced)
    assert any("in a gradient that the forward takes" in str(cause) for cause in channels.frozen.values())
    assert not channels.groups
    for x in (images(), images(3, 4)):
        assert difference(traced(x), model(x)) <= EXACT


@pytest.mark.parametrize("of", [lambda z: z.pow(3).sum(), lambda z: (z.tanh() * 0.3).square().sum()])
def test_gradients_of_sums_keep_no_channels(of: Callable[[Tensor], Tensor]) -> None:
    """Powers leave numbers too, which are none of sizes."""
    model = randomise(Between(lambda _, y: grad(of)(y)), (images(),))
    traced = chase_fx.trace(model, images())
    slim = chase_fx.rewrite(traced, half(traced))
    assert slim.plan.new_shape("first.weight")[0] < 8
    assert difference(slim(images()), masked_copy(model, slim.plan.kept_indices())(images())) <= EXACT


ELEMENTS: dict[str, Inside] = {
    "of a bias": lambda m, y: y * m.first.bias.tolist()[0],
    "of values": lambda m, y: y * y[0, 0].tolist()[1],
    "sum": lambda m, y: y * sum(m.first.bias.tolist()),
    "largest": lambda m, y: y * max(m.first.bias.tolist()),
    "tensor": lambda m, y: y * torch.tensor(m.first.bias.tolist()),
}


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
@pytest.mark.parametrize("inside", ELEMENTS.values(), ids=list(ELEMENTS))
def test_elements_that_python_reads_stay(inside: Inside) -> None:
    """It picks them by their places, which are those of all channels."""
    model = randomise(Between(inside), (images(),))
    traced = chase_fx.trace(model, images())
    channels = chase_fx.analyze(traced)
    assert any("reads its elements into Python" in str(cause) for cause in channels.frozen.values())
    assert all("first.weight" not in group.name for group in channels.groups)
    for x in (images(), images(3, 4)):
        assert difference(traced(x), model(x)) <= EXACT


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
def test_single_elements_leave_the_others_free() -> None:
    model = randomise(Between(lambda m, y: y * m.first.bias[1].item()), (images(),))
    traced = chase_fx.trace(model, images())
    slim = chase_fx.rewrite(traced, half(traced))
    assert slim.plan.new_shape("first.weight")[0] < 8
    kept = slim.plan.kept_indices()
    assert 1 in (kept["first.weight"][0] if kept["first.weight"][0] is not None else ())
    assert difference(slim(images()), masked_copy(model, kept)(images())) <= EXACT
