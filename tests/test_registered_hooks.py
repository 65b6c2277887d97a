"""Hooks that a forward registers, replaces or takes away while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import chase_fx
from chase_fx.errors import CaptureError


class Watched(nn.Module):
    """Its forward is ``forward_of``, which may register hooks."""

    def __init__(self, forward_of: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.norm, self.act, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
        self.forward_of = forward_of
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 4) -> (N, 2)."""
        return self.forward_of(self, x)


def _tanh(*given: Any) -> Any:
    """As a hook before a call or after it."""
    return (given[-1][0].tanh() * 2,) if isinstance(given[-1], tuple) else given[-1].tanh()


def _for_one_call(m: Watched, x: Tensor) -> Tensor:
    hook = m.act.register_forward_hook(_tanh)
    y = m.act(m.a(x))
    hook.remove()
    return m.b(m.act(y - 0.1))


def _of_a_weight(m: Watched, x: Tensor) -> Tensor:
    hook = m.a.register_forward_hook(_tanh)
    y = m.a(x)
    hook.remove()
    return m.b(y + m.a(x))


def _before(m: Watched, x: Tensor) -> Tensor:
    hook = m.norm.register_forward_pre_hook(_tanh)
    y = m.norm(m.a(x))
    hook.remove()
    return m.b(y + m.norm(m.a(x)))


def _replaced(m: Watched, x: Tensor) -> Tensor:
    hooks, m.act._forward_hooks = m.act._forward_hooks, {0: _tanh}  # type: ignore[assignment]
    y = m.act(m.a(x))
    m.act._forward_hooks = hooks
    return m.b(m.act(y - 0.1))


def _of_every_module(m: Watched, x: Tensor) -> Tensor:
    hook = register_module_forward_hook(lambda module, _, out: out.tanh() if module is m.act else None)
    y = m.act(m.a(x))
    hook.remove()
    return m.b(m.act(y - 0.1))


def _before_every_module(m: Watched, x: Tensor) -> Tensor:
    hook = register_module_forward_pre_hook(lambda module, given: (given[0].tanh(),) if module is m.a else None)
    y = m.a(x)
    hook.remove()
    return m.b(y + m.a(x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "forward", [_for_one_call, _of_a_weight, _before, _replaced, _of_every_module, _before_every_module]
)
def test_hooks_that_the_forward_registers(forward: Callable[[Any, Tensor], Tensor], train: bool) -> None:
    """They belong to the calls between, and to no other."""
    torch.manual_seed(0)
    model = Watched(forward).double().train(train)
    traced = chase_fx.trace(copy.deepcopy(model), torch.randn(3, 4, dtype=torch.float64))
    for rows in (3, 5):
        x = torch.randn(rows, 4, dtype=torch.float64)
        torch.testing.assert_close(traced(x), model(x))


def test_a_hook_that_the_forward_leaves_behind() -> None:
    """The graph is that of a fresh model, whose layer has it only after the call."""

    def left(m: Watched, x: Tensor) -> Tensor:
        y = m.act(m.a(x))
        m.act.register_forward_hook(_tanh)
        return m.b(y)

    model, x = Watched(left).eval(), torch.randn(3, 4)
    for traced in (chase_fx.trace(model, x), chase_fx.trace(model, x).train()):
        torch.testing.assert_close(traced(x), copy.deepcopy(model).train(traced.training)(x))


def test_a_hook_that_the_forward_takes_away() -> None:
    def between(m: Watched, x: Tensor) -> Tensor:
        y = m.act(m.a(x))
        hooks = dict(m.act._forward_hooks)
        m.act._forward_hooks.clear()
        z = m.act(y)
        m.act._forward_hooks.update(hooks)
        return m.b(y + z)

    model, x = Watched(between), torch.randn(3, 4)
    model.act.register_forward_hook(_tanh)
    torch.testing.assert_close(chase_fx.trace(model, x)(x), model(x))


def test_what_a_hook_before_a_call_keeps_is_computed_in_every_call() -> None:
    def scaled(m: Watched, x: Tensor) -> Tensor:
        return m.b(m.norm(m.a(x)) * m.kept[0] * m.kept[1])

    def keep(_: nn.Module, given: Any) -> None:
        model.kept = given[0].sum(1, keepdim=True), given[0].shape[0]

    model = Watched(scaled).eval()
    model.norm.register_forward_pre_hook(keep)
    traced = chase_fx.trace(model, torch.randn(3, 4))
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(traced(x), model(x))


def test_hooks_of_gradients_that_the_forward_registers_are_refused() -> None:
    def doubled(m: Watched, x: Tensor) -> Tensor:
        hook = m.act.register_full_backward_hook(lambda _, found, __: (found[0] * 2,))
        y = m.act(m.a(x))
        hook.remove()
        return m.b(y)

    with pytest.raises(CaptureError, match=r"'act'.*backward hooks"):
        chase_fx.trace(Watched(doubled), torch.randn(3, 4))
