"""Forwards that compute gradients whatever their caller does, such as those of force fields."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherPathError
from chase_fx.graphs.enabled import enables
from tests.oracle import randomise


class Energy(nn.Module):
    """An energy and its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def energy(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).sum(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(x)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return energy, -force


class Decorated(Energy):
    """The same for the whole forward, by a switch."""

    @torch.set_grad_enabled(True)
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            shift = self.a(x).mean()
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                energy = self.energy(x) + shift
                (force,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return energy, force


class Idle(Energy):
    """A region in which nothing is differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad(), torch.set_grad_enabled(True):
            return self.energy(x)


class Guarded(Energy):
    """A region that the graph leaves by an exception."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(x).sum()
            (force,) = torch.autograd.grad(energy, x)
            for _ in range(int(x.sum().item())):
                force = force + force * force
        return force


@pytest.mark.parametrize("cls", [Energy, Decorated])
@pytest.mark.parametrize("gradients", [False, True])
def test_forces_where_the_caller_wants_no_gradients(cls: type[Energy], gradients: bool) -> None:
    """Traced, slim, pickled and copied modules differentiate, and leave the caller's mode as it was."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model = randomise(cls(), (x,))
    traced = chase_fx.trace(model, x)
    slim = chase_fx.prune(model, x)
    assert slim.get_parameter("b.weight").shape == (8, 8)
    with torch.set_grad_enabled(gradients):
        want = model(x)
        for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
            assert all(map(torch.equal, module(x), want))
        once = slim(x)
        assert all(map(torch.equal, pickle.loads(pickle.dumps(slim))(x), once))
        assert torch.is_grad_enabled() is gradients
    assert chase_fx.verify(traced, slim).difference < 1e-9


def test_forces_teach_parameters() -> None:
    """In train mode the derivative has gradients of its own, which are the model's."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model = randomise(Energy(), (x,)).train()
    traced = chase_fx.trace(model, x)
    found = [torch.autograd.grad(m(x)[1].square().sum(), m.get_parameter("a.weight"))[0] for m in (model, traced)]
    assert torch.allclose(*found, rtol=1e-12, atol=0)


def test_an_idle_region_leaves_no_nodes() -> None:
    """Where nothing is differentiated the graph needs no ends of regions."""
    assert not enables(chase_fx.trace(Idle(), torch.randn(2, 3)).graph)
    assert enables(chase_fx.trace(Energy(), torch.randn(2, 3)).graph)


def test_a_region_that_is_left_by_an_exception() -> None:
    """The caller's mode is put back where a guard inside of the region refuses."""
    with pytest.warns(Warning, match="reads tensor data"):
        traced = chase_fx.trace(Guarded(), torch.ones(2, 3))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            with pytest.raises(OtherPathError):
                traced(torch.full((2, 3), 2.0))
            assert torch.is_grad_enabled() is gradients
