"""Forwards that catch an error and go on another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import randomise


class Net(nn.Module):
    """Two layers; in subclasses something in between fails for some numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.conv = nn.Conv1d(1, 1, 5)


class Viewed(Net):
    """A view of rows in threes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        try:
            y = y.view(3, -1, 8).flip(0).view(-1, 8)
        except RuntimeError:
            y = 2 * y
        return self.b(y)


class Convolved(Net):
    """A layer that needs five rows."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            more = self.conv(x.sum(1)[None]).sum()
        except RuntimeError:
            more = x.new_zeros(())
        return self.b(self.a(x)) + more


class Indexed(Net):
    """The third row."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        try:
            y = y + y[3]
        except IndexError:
            y = -y
        return self.b(y)


class Divided(Net):
    """A number that is none for two rows."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            scale = 6 // (x.shape[0] - 2)
        except ZeroDivisionError:
            scale = 1
        return self.b(self.a(x)) * scale


class Factored(Net):
    """A matrix that is positive definite, or not."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            more = torch.linalg.cholesky(x.T @ x - 1000 * torch.eye(4, dtype=x.dtype)).sum()
        except RuntimeError:
            more = x.new_zeros(())
        return self.b(self.a(x)) + more


def rows(n: int) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("cls", [Viewed, Convolved, Indexed, Divided])
def test_at_other_sizes_the_call_may_succeed(cls: type[Net]) -> None:
    """An error that the forward catches is a decision by sizes; the way of the example was taken for all."""
    model = randomise(cls())
    traced, slim = chase_fx.trace(model, rows(2)), chase_fx.prune(model, rows(2))
    for n in (2, 6, 9):
        torch.testing.assert_close(traced(rows(n)), model(rows(n)))
    again = chase_fx.rewrite(chase_fx.trace(model, rows(6)), slim.plan)
    torch.testing.assert_close(slim(rows(6)), again(rows(6)))


def test_data_that_decide_whether_a_call_fails_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"test_caught_errors.py:\d+ fails for the example's data"):
        chase_fx.trace(randomise(Factored()), rows(2))


def test_an_error_that_is_not_caught_is_the_models() -> None:
    """Its message is the one that the model gives."""
    with pytest.raises(CaptureError, match=r"Linear.forward raised RuntimeError.*cannot be multiplied"):
        chase_fx.trace(nn.Linear(4, 3), torch.randn(2, 5))
