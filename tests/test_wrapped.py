"""Other tensor objects for the same memory, which the forward makes without a call of the torch API."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherPathError
from tests.nets import Net
from tests.oracle import assert_exact, randomise


class _Labelled(Tensor):
    """A subclass that adds nothing."""


def _layer(gate: Tensor) -> Tensor:
    """A layer that the forward makes, initialises and gives other weights."""
    layer = nn.Linear(8, 8, dtype=gate.dtype)
    layer.weight, layer.bias = nn.Parameter(torch.outer(gate, gate)), nn.Parameter(gate)
    return layer(gate)


WRAPPERS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": nn.Parameter,
    "written": lambda gate: nn.init.constant_(nn.Parameter(gate.clone()), 0.5) + nn.Parameter(gate * 2),
    "list": lambda gate: nn.ParameterList([gate, gate + 1])[1],
    "subclass": lambda gate: gate.as_subclass(_Labelled).as_subclass(Tensor),
    "layer": _layer,
}


def _net(wrap: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y.relu()) * wrap(y.mean(0)))

    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    return randomise(Net(forward, a=nn.Linear(3, 8), b=nn.Linear(8, 8), out=nn.Linear(8, 2)), (x,))


@pytest.mark.parametrize("name", WRAPPERS)
def test_another_object_for_a_tensor_is_no_constant(name: str) -> None:
    """What ``nn.Parameter`` and subclasses are made of is computed in every call; no gradient leaves a parameter."""
    net = _net(WRAPPERS[name])
    x, other = torch.randn(2, 3, 3, dtype=torch.float64)
    traced = chase_fx.trace(net, x)
    assert torch.equal(traced(other), net(other))
    assert_exact(net, chase_fx.prune(net, x).eval(), (other,))
    found = [torch.autograd.grad(m(other).square().sum(), [*m.parameters()]) for m in (net, traced)]
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, want)


def test_memory_that_is_handed_out_holds_for_its_data() -> None:
    """A tensor made of a DLPack capsule is one of the example's values."""
    net = _net(lambda gate: torch.from_dlpack(gate.detach()))
    x, other = torch.randn(2, 2, 3, dtype=torch.float64)
    with pytest.warns(chase_fx.SpecializationWarning):
        traced = chase_fx.trace(net, x)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(OtherPathError):
        traced(other)
