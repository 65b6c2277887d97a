"""Functions that a model has as hooks or attributes, and that hold a part of it in their closures."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from chase_fx.graphs.duplicate import duplicate
from tests.oracle import EXACT

SHARED: dict[str, Tensor] = {}


class Net(nn.Module):
    """Three layers; subclasses add functions to them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.found: dict[str, Tensor] = {}
        self.extend()

    def extend(self) -> None:
        """What a subclass adds."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 6) -> (N, 3)."""
        return self.c(self.b(self.a(x)) * self.scale)


class Scaled(Net):
    """A hook that computes with parameters of other modules."""

    def extend(self) -> None:
        self.b.register_forward_hook(lambda _, __, out: out * self.scale + self.a.bias)


class Noted(Net):
    """Hooks, made by a function, that keep results for the forward."""

    def extend(self) -> None:
        def noting(name: str) -> Any:
            def note(_: nn.Module, __: Any, out: Tensor) -> None:
                self.found[name] = out

            return note

        self.a.register_forward_hook(noting("a"))
        self.b.register_forward_hook(noting("b"))

    def forward(self, x: Tensor) -> Tensor:
        self.b(self.a(x))
        return self.c(self.found["a"] + self.found["b"] * self.scale)


class Replaced(Net):
    """A layer whose forward is a function around its own one."""

    def extend(self) -> None:
        old = self.b.forward
        self.b.forward = lambda x: old(x) * self.scale  # type: ignore[method-assign]


class Listed(Net):
    """Functions in a list, one of which calls another one."""

    def extend(self) -> None:
        first = lambda x: self.b(self.a(x))  # noqa: E731
        self.steps = [lambda x: first(x).relu(), lambda x: self.c(x) * self.scale]

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[1](self.steps[0](x))


def _set(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


@pytest.mark.parametrize("cls", [Scaled, Noted, Replaced, Listed])
def test_functions_of_a_copy_work_on_the_copy(cls: type[Net]) -> None:
    """The traced and the slim module use their own tensors, and leave the model alone."""
    torch.manual_seed(0)
    model, x = cls().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    given = copy.copy(model.found)
    traced = chase_fx.trace(model, x)
    assert model.found == given
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    _set(traced, other)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)).eval()
    assert chase_fx.verify(traced, slim).difference <= EXACT
    traced(x).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())
    assert not any(p.grad is not None for p in model.parameters())
    again = copy.deepcopy(traced)
    found, small = traced(x), slim(x)
    _set(model, other)
    torch.testing.assert_close(found, model(x))
    _set(model, {name: torch.zeros_like(p) for name, p in other.items()})
    _set(traced, {name: torch.zeros_like(p) for name, p in other.items()})
    torch.testing.assert_close(small, slim(x))
    torch.testing.assert_close(found, again(x))
    assert again.float()(x.float()).dtype is torch.float32


class Acting(nn.Module):
    """Without parameters, and not one of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Keeper:
    """An object that the model has, and that a hook is a method of."""

    kept: Any = 1

    def keep(self, _: nn.Module, __: Any, out: Tensor) -> None:
        self.kept = float(out.detach().abs().max())


class Kept(nn.Module):
    """Hooks of layers that a graph calls as they are, which keep tensors and numbers for the forward in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), Acting()
        self.tensors: list[Tensor] = []
        self.keeper = Keeper()
        self.number: Any = 1
        self.act.register_forward_hook(lambda _, __, out: self.tensors.append(out.detach().clone()))
        self.c.register_forward_hook(self.keeper.keep)
        self.b.register_forward_hook(functools.partial(self.count, by=2))
        self.c.register_forward_hook(_on_itself)
        self.c.register_forward_hook(_by_global_name)

    def count(self, _: nn.Module, __: Any, out: Tensor, by: int) -> None:
        """The number of rows."""
        self.number = out.shape[0] * by

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 6) -> (N, 3)."""
        self.tensors.clear()
        y = self.c(self.b(self.act(self.a(x))))
        first, rows = NUMBERS["first"], self.c.rows
        return y * self.number + self.tensors[0].sum(1, True) * self.keeper.kept + len(self.tensors) * first / rows


def _on_itself(module: nn.Module, _: Any, out: Tensor) -> None:
    module.rows = out.shape[0]


def _by_global_name(_: nn.Module, __: Any, out: Tensor) -> None:
    NUMBERS["first"] = out.detach()[0, 0].item()


NUMBERS: dict[str, float] = {}


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
def test_what_hooks_keep_for_the_forward_is_computed_in_every_call() -> None:
    """Their tensors were refused, and their numbers were those of the example."""
    torch.manual_seed(0)
    model, x = Kept().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    traced, slim = chase_fx.trace(model, x), chase_fx.prune(model, x)
    assert slim.plan.new_shape("a.weight") == (4, 6)
    inputs = [torch.randn(rows, 6, dtype=torch.float64) for rows in (4, 7)]
    for x in inputs:
        torch.testing.assert_close(traced(x), model(x))
    with torch.no_grad():
        for name, kept in slim.plan.kept_indices().items():
            for dim, indices in enumerate(kept):
                if indices is not None:
                    gone = sorted({*range(8)} - {*indices.tolist()})
                    model.get_parameter(name).index_fill_(dim, torch.tensor(gone), 0)
    for x in inputs:
        torch.testing.assert_close(slim(x), model(x))


def test_hooks_that_only_look_run_in_every_call() -> None:
    """They have nothing of the model, so its layers stay what they are, and hooks see what the layers give."""
    seen: list[tuple[int, ...]] = []

    def look(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.append(tuple(out.shape))

    model = Net().eval()
    model.b.register_forward_hook(look)
    slim = chase_fx.prune(model, torch.randn(4, 6))
    seen.clear()
    slim(torch.randn(5, 6))
    assert seen == [(5, 4)]


def test_functions_that_hold_nothing_of_the_model_are_shared() -> None:
    """As ``copy.deepcopy`` does; what they hold otherwise is the caller's own."""
    net, seen = Net(), list[Tensor]()
    function = lambda _, __, out: seen.append(out)  # noqa: E731
    net.a.register_forward_hook(function)
    new = duplicate(net, {})
    assert [*new.a._forward_hooks.values()] == [function]


def test_variables_that_functions_share_are_shared_in_the_copy() -> None:
    """Two functions of one scope have the same variables, also those that have no part of the model or no value."""
    net = Net()

    def scope() -> tuple[Any, Any]:
        part, count = net.a, 0

        def bump() -> nn.Module:
            nonlocal count
            count += 1
            return part

        def read() -> tuple[nn.Module, int]:
            return part, count

        return bump, read

    net.bump, net.read = scope()
    new = duplicate(net, {})
    assert new.bump() is new.a
    assert new.read() == (new.a, 1)
    assert net.read()[0] is net.a


def _shared(self: Any) -> None:
    self.found = SHARED
    self.a.register_forward_hook(lambda _, __, out: SHARED.update(a=out))


def test_a_model_that_is_changed_by_a_global_name_is_refused() -> None:
    """The hook writes to the model's own dict, so a copy would read what an earlier forward left: it was a constant."""

    class Global(Net):
        extend = _shared

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            return self.c(self.b(self.found["a"]))

    model, x = Global().eval(), torch.randn(2, 6)
    model(x)
    with pytest.raises(CaptureError, match="changes 'found' of the model by another way than through self"):
        chase_fx.trace(model, x)


class Doubling(nn.Linear):
    """What a call of it gives is more than its forward does."""

    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


def test_layers_that_do_more_around_their_forward() -> None:
    """The graph called such a layer, and did the rest once more."""
    model, x = Net().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    model.b = Doubling(8, 8).double()
    traced, slim = chase_fx.trace(model, x), chase_fx.prune(model, x)
    assert torch.equal(traced(x), model(x))
    assert slim.plan.new_shape("b.weight") == (4, 4)


def _doubled(_: nn.Module, given: Any, __: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in given)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_backward_hook"])
def test_backward_hooks_run_on_layers_and_are_refused_elsewhere(register: str) -> None:
    """A graph has no call of a block that it takes apart: its hook would have been left out, or failed inside torch."""
    x = torch.randn(4, 6, dtype=torch.float64)
    model = Net().double()
    getattr(model.b, register)(_doubled)
    traced = chase_fx.trace(model, x)
    for module in (model, traced):
        module(x).sum().backward()
    for mine, theirs in zip(model.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for path in ("", "0"):
        block = nn.Sequential(Net()).double()
        getattr(block.get_submodule(path), register)(_doubled)
        with pytest.raises(CaptureError, match=f"{path or 'the model'}.* has backward hooks"):
            chase_fx.trace(block, x)
