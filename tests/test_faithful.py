"""The traced graph against the model: what leaves no call in the graph is not lost in silence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import VerificationError
from chase_fx.passes.faithful import check_capture
from tests.two_layers import Body


def twice(y: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise NotImplementedError
    return y * 2


class Catching(Body):
    """An operator that only works without gradients, and a way around it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with suppress(NotImplementedError):
            y = twice(y)
        return self.b(y)


class Dropping(Body):
    """Draws in eval mode, in the graph as in the model."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, training=True))


class Counting(Body):
    """Another result each time, of which nobody can tell what it should be."""

    calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + float(str(next(self.calls)))


class Rounding(Body):
    """Two orders of a sum, and a function that makes much of the last digit of single precision."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        total = y.sum(-1, keepdim=True) if torch.is_grad_enabled() else y.flip(-1).cumsum(-1)[:, -1:]
        return self.b(y) + (total * 1e3).sin()


def plan_of(model: nn.Module, x: Tensor) -> chase_fx.TracedModule:
    return chase_fx.prune(model, x, channel_sparsity=0.5)


def test_what_the_model_catches_is_noticed() -> None:
    torch.manual_seed(0)
    model, x = Catching(), torch.randn(3, 4)
    with pytest.raises(VerificationError, match=r"another result than Catching .* output 'output' differs by"):
        plan_of(model, x)
    assert chase_fx.prune(model, x, verify=False)(x).shape == (3, 2)


class CatchingInSingle(Catching):
    """Cannot run in double precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ torch.eye(4, dtype=torch.float32))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Catching, torch.float64), (Catching, torch.float32), (Catching, torch.bfloat16),
        (CatchingInSingle, torch.float32),
    ],
)  # fmt: skip
def test_what_the_model_catches_is_noticed_in_every_precision(
    kind: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    """Also where double precision can't settle it."""
    torch.manual_seed(0)
    model, x = kind().to(dtype), torch.randn(3, 4, dtype=dtype)
    traced = chase_fx.trace(model, x)
    with pytest.raises(VerificationError, match="another result"):
        check_capture(model, traced)


class Forces(Body):
    """Derivatives inside of the forward, which there are none of without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", [Dropping, Counting, Rounding, Forces])
def test_draws_and_rounding_are_no_difference(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plan_of(kind(), torch.randn(3, 4))


def test_rounding_is_told_from_more_in_double_precision() -> None:
    """In single precision alone the two orders of the sum would be another result."""
    torch.manual_seed(0)
    model, x = Rounding(), torch.randn(50, 4)
    traced = chase_fx.trace(model, x)
    with torch.no_grad():
        assert (traced(x) - model(x)).abs().max() > 1e-4 * model(x).abs().max()
    check_capture(model, traced)


def test_nothing_is_changed() -> None:
    """Buffers that a forward writes, modes and generators are as they were."""

    class Writing(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(F.dropout(self.a(x), 0.5, training=True))

    model, x = Writing(), torch.randn(3, 4)
    traced = chase_fx.trace(model, x).train()
    state = torch.get_rng_state()
    check_capture(model, traced)
    assert torch.equal(torch.get_rng_state(), state)
    assert (float(model.calls), float(traced.get_buffer("calls")), traced.training) == (0, 0, True)
    with torch.no_grad():
        traced.b.weight.mul_(2)
    with pytest.raises(VerificationError, match="another result than Writing"):
        check_capture(model, traced)


def test_no_values_are_no_difference() -> None:
    """A model on the meta device can be captured, and has nothing to compare."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to("meta")
    x = torch.zeros(3, 4, device="meta")
    check_capture(model, chase_fx.trace(model, x))
