"""Capture of autograd: what has gradients, custom functions, and what vmap makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

import chase_fx
from chase_fx.graphs.gradients import Gradients
from chase_fx.graphs.tape import Tape, TapedOp
from tests.oracle import EXACT, difference, masked_copy, randomise
from tests.two_layers import Body


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    module.zero_grad()
    module(x).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same_gradients(model: nn.Module, x: Tensor) -> None:
    traced = chase_fx.trace(model, x)
    ours, theirs = gradients(traced, x), gradients(model, x)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        have = ours[name]
        assert (have is None) == (want is None), name
        assert want is None or torch.equal(have, want), name


def test_gradients_stop_where_the_forward_disables_them() -> None:
    """A parameter that is only read under no_grad gets no gradient from the traced module either."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.a(x).sigmoid()
            return self.b(gate * self.a.weight.sum(1))

    assert_same_gradients(Net().double(), torch.randn(3, 4, dtype=torch.float64))


def test_a_write_without_gradients_cuts_nothing_off() -> None:
    """A parameter that is clamped in place under no_grad still gets its gradient."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.a.weight.clamp_(-0.1, 0.1)
            return self.b(F.linear(x, self.a.weight))

    assert_same_gradients(Net().double(), torch.randn(3, 4, dtype=torch.float64))


class Halved(torch.autograd.Function):
    """Identity whose gradient is halved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5


def test_custom_backward_is_kept() -> None:
    """A custom autograd function keeps its own backward, and its channels are pruned."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(Halved.apply(self.a(x)))

    net, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    assert_same_gradients(net, x)
    assert chase_fx.prune(net, x).get_submodule("a").out_features == 4


def test_a_custom_backward_compiles() -> None:
    """A graph with an autograd function compiles without a break."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(Halved.apply(self.a(x)))

    x = torch.randn(3, 4)
    slim = chase_fx.prune(Net(), x)
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), slim(x))


class Doubled(torch.autograd.Function):
    """A custom function that ``vmap`` makes one of its own of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Mapped(nn.Module):
    """A mask made for one pair of places at a time, and a layer applied to one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[0])
        ahead = torch.vmap(torch.vmap(lambda i, j: j <= i, (None, 0)), (0, None))(places, places)
        x = torch.vmap(lambda row: Doubled.apply(self.middle(row)[:6].relu()) * row[2:].sum())(self.first(x))
        return self.last(F.pad(ahead.to(x.dtype) @ x, (0, 2)))


def test_what_the_torch_api_does_not_show_is_written_as_aten_calls() -> None:
    """Inside ``vmap`` channels shrink too, and where its views only insert dims the graph takes other sizes."""
    model = randomise(Mapped())
    x = torch.randn(4, 5, dtype=torch.float64)
    traced = chase_fx.trace(model, (x,))
    slim = chase_fx.prune(model, (x,))
    assert slim.plan.new_shape("middle.weight") == (5, 4)  # nothing reads the last two rows
    for batch in (4, 7):
        x = torch.randn(batch, 5, dtype=torch.float64)
        assert torch.equal(traced(x), model(x))
        assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT


def test_a_dim_that_the_function_of_a_vmap_does_not_use() -> None:
    """It is added where the last vmap ends, by views that the torch API does not show either."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            allowed = x.sum(-1) > 0
            mask: Any = lambda sample, _head, place: allowed[sample, place]  # noqa: E731
            for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
                mask = torch.vmap(mask, in_dims=dims)
            found = mask(torch.arange(x.shape[0]), torch.arange(1), torch.arange(x.shape[1]))
            return self.last((self.first(x) * found[:, 0, :, None]).relu())

    model = Masked()
    traced = chase_fx.trace(model, torch.randn(2, 4, 5))
    for batch, places in ((2, 4), (3, 4), (2, 6), (1, 4)):
        x = torch.randn(batch, places, 5)
        assert torch.equal(traced(x), model(x))


def test_a_function_that_holds_on_to_the_model() -> None:
    """A lambda of the model reads the copy's weights in a graph: they are tied, trained and pruned as in the model."""

    class Model(Body):
        def __init__(self) -> None:
            super().__init__()
            self.to_input = lambda y: y @ self.a.weight
            self.again = lambda y: self.b(y) * 2

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.again(y) + self.to_input(y).sum(-1, keepdim=True)

    model, x = Model().double(), torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(model, x)
    assert set(dict(traced.named_buffers())) == set()
    assert_same_gradients(model, x)
    slim = chase_fx.prune(model, x)
    assert slim.a.out_features == slim.b.in_features == 4


def test_an_error_in_between_leaves_the_region_as_it_was() -> None:
    """A call that is written later may fail to be, and the capture go on."""
    asked = Gradients(Graph(), {}, {}, Tape([TapedOp(torch.ops.aten.relu.default, (), {}, ())]))
    asked.enter_mode(enabled=False, by="__init__")
    with pytest.raises(ZeroDivisionError), asked.at(0):
        raise ZeroDivisionError
    assert asked.off
