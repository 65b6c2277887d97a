"""What Python decides by data: both ways are in the graph, or it refuses data that decide otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherPathError
from tests.oracle import assert_exact, randomise

pytestmark = pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")


class Deciding(nn.Module):
    """Doubles a hidden activation where ``decide`` says so of the input and the activation."""

    def __init__(self, decide: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("ready", torch.tensor(1.0))
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(torch.relu(y))
        return self.c(z * 2 if self.decide(self, x, y) else z)


X = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5


def deciding(decide: Callable[[Any, Tensor, Tensor], Any]) -> nn.Module:
    return randomise(Deciding(decide), (X,))


BY_INPUT: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "truth": lambda _, x, y: x.sum() > 0,
    "item of a truth": lambda _, x, y: (x.sum() > 0).item(),
    "list of truths": lambda _, x, y: (x > 0).tolist()[0][0],
    "item": lambda _, x, y: x.sum().item() > 0,
    "int": lambda _, x, y: int(x.sum()) > 0,
    "float": lambda _, x, y: float(x.sum()) > 0,
    "math": lambda _, x, y: math.floor(x.sum()) > 0,
    "index of a list": lambda _, x, y: [False, *[True] * 4][(x[0] > 0).sum()],
    "equal": lambda _, x, y: torch.equal(x, x.abs()),
    "allclose": lambda _, x, y: torch.allclose(x, x.abs()),
    "in": lambda _, x, y: 1.0 in x.sign(),
    "numpy": lambda _, x, y: x.numpy().sum() > 0,
    "number of places": lambda _, x, y: len((x > 0).nonzero()) > 11,
    "any of Python": lambda _, x, y: any(x[0] > 0),
    "max of Python": lambda _, x, y: max(x[0, 0], x[0, 1]) > 0,
}


TRUTHS = ("truth", "item of a truth", "equal", "allclose", "in", "any of Python", "max of Python")


@pytest.mark.parametrize("how", TRUTHS)
def test_other_data_go_the_other_way(how: str) -> None:
    """Where Python asks for a truth, capture and slim module decide again."""
    model = deciding(BY_INPUT[how])
    traced, slim = chase_fx.trace(model, X), chase_fx.prune(model, X)
    assert traced.info.specialised == ()
    assert slim.get_submodule("b").weight.shape == (4, 4)
    for x in (X, -3 * X):
        assert torch.equal(traced(x), model(x))
        assert_exact(model, slim, (x,))


@pytest.mark.parametrize("how", [how for how in BY_INPUT if how not in TRUTHS])
def test_other_data_are_refused(how: str) -> None:
    """Where Python decides by a number, capture and slim module refuse data for which it would decide otherwise."""
    model = deciding(BY_INPUT[how])
    traced, slim = chase_fx.trace(model, X), chase_fx.prune(model, X)
    assert slim.get_submodule("b").weight.shape == (4, 4)
    assert torch.equal(traced(X), model(X))
    for module in (traced, slim):
        with pytest.raises(OtherPathError, match=r"test_decisions.py:\d+"):
            module(-X)


def test_the_same_outcome_is_served() -> None:
    """Other data by which the model goes the same way are no reason to refuse."""
    model = deciding(BY_INPUT["truth"])
    traced = chase_fx.trace(model, X)
    for more in (X * 3, torch.rand(7, 4, dtype=torch.float64)):
        assert torch.equal(traced(more), model(more))
    assert_exact(model, chase_fx.prune(model, X), (X * 3,))


CHECKS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "no NaN": lambda _, x, y: not torch.isnan(y).any(),
    "finite": lambda _, x, y: torch.isfinite(y).all(),
    "range": lambda _, x, y: y.abs().max() < 1e4 and y.amax(1).min() < 1e4,
    "by heads": lambda _, x, y: torch.isfinite(y.view(len(x), 2, 4).transpose(1, 2)).all(),
}


@pytest.mark.parametrize("how", CHECKS)
def test_a_check_of_channels_freezes_none(how: str) -> None:
    """A decision by an activation is made by the channels that there are, so it keeps no channel."""

    class Checked(Deciding):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if not self.decide(self, x, y):
                raise ValueError
            return self.c(self.b(torch.relu(y)))

    torch.manual_seed(0)
    model = randomise(Checked(CHECKS[how]), (X,))
    slim = chase_fx.prune(model, X)
    assert slim.get_submodule("a").weight.shape == (4, 4)
    assert_exact(model, slim, (X,))
    assert_exact(model, slim, (torch.rand(5, 4, dtype=torch.float64),))
    with pytest.raises(OtherPathError):
        slim(X * math.nan)


def test_a_maximum_that_is_computed_with_freezes() -> None:
    """The same reduction as a value keeps its channels, as does one whose value goes into a buffer."""

    class Scaled(Deciding):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            self.ready.copy_(y.amax())
            return self.c(self.b(torch.relu(y)))

    for cls, kept in ((Deciding, 4), (Scaled, 8)):
        slim = chase_fx.prune(randomise(cls(lambda _, x, y: True), (X,)), X)
        assert slim.get_submodule("a").weight.shape[0] == kept


def test_decisions_by_a_buffer() -> None:
    """A flag that the model keeps in a buffer is read at each call."""
    for decide in (lambda m, x, y: m.ready > 0, lambda m, x, y: m.ready.item() > 0, lambda m, x, y: bool(m.ready)):
        model = deciding(decide)
        model.ready.fill_(1)
        traced = chase_fx.trace(model, X)
        assert torch.equal(traced(-X), model(-X))
        traced.ready.zero_()
        model.ready.zero_()
        if traced.info.specialised:  # by a number
            with pytest.raises(OtherPathError):
                traced(X)
        else:
            assert torch.equal(traced(X), model(X))


def test_all_data_in_numpy_keep_their_channels() -> None:
    """What NumPy computes is a constant, so the channels that it saw stay."""
    model = deciding(lambda _, x, y: y.numpy().sum() > -1e9)
    channels = chase_fx.analyze(chase_fx.trace(model, X))
    assert ("a.weight", 0) in channels.frozen


def test_decisions_compile() -> None:
    """A decision is an assertion of the compiled graph, which has no break."""
    for how in ("truth", "item", "int", "equal", "numpy"):
        model = deciding(BY_INPUT[how])
        traced = chase_fx.trace(model, X)
        torch.compiler.reset()
        compiled = torch.compile(traced, fullgraph=True, backend="eager")
        assert torch.equal(compiled(X), model(X))
        with pytest.raises(Exception):  # noqa: B017, PT011  (of torch, depending on the backend)
            compiled(-X)
