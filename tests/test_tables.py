"""Tables that a forward makes of the sizes of its inputs, in place of a buffer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError, OtherSizeError
from tests.oracle import assert_exact, randomise


class Positions(nn.Module):
    """Adds positions to ``x (N, T, C)``; the table holds for up to ``T`` of them, and is made again for more."""

    def __init__(self, make: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.make = make
        self.register_buffer("table", self._of_length(8), persistent=False)

    @staticmethod
    def _of_length(n: int) -> Tensor:
        table = torch.zeros(n, 8, dtype=torch.float64)
        angles = torch.arange(n, dtype=torch.float64)[:, None] / 2.0 ** torch.arange(4)
        table[:, ::2], table[:, 1::2] = angles.sin(), angles.cos()
        return table

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < x.shape[1]:
            self.table = self.make(self, x)
        return self.out(self.b(self.a(x).relu() + self.table[: x.shape[1]]).relu())


def _written(table: Tensor, place: slice, value: Tensor) -> Tensor:
    table[place] = value
    return table


def _viewed(table: Tensor, value: Tensor) -> Tensor:
    table[0].add_(value)
    return table


def _net(make: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Positions(make).double(), (x[:, :8],))


def _longer(m: nn.Module, x: Tensor) -> Tensor:
    return m._of_length(x.shape[1])


@pytest.mark.parametrize("length", [5, 12])
def test_a_table_is_made_for_longer_inputs(length: int, tmp_path: Path) -> None:
    """Captured at a length that the buffer holds for or not, the graphs serve shorter and longer ones."""
    x = torch.randn(2, 16, 3, dtype=torch.float64)
    net = _net(_longer, x)
    traced = chase_fx.trace(net, x[:, :length])
    slim = chase_fx.prune(net, x[:, :length]).eval()
    assert net.table.shape == (8, 8)
    assert slim.get_parameter("b.weight").shape == (4, 4)
    chase_fx.save(slim, tmp_path / "slim.cfx")
    for module in (slim, chase_fx.load(tmp_path / "slim.cfx", Positions(_longer).double()).eval()):
        for n in (5, 12, 16):
            # A model that met a longer input has another table, and gives the same.
            fresh = randomise(Positions(_longer).double(), (x[:, :8],))
            fresh.load_state_dict(net.state_dict())
            assert torch.equal(traced(x[:, :n]), fresh(x[:, :n]))
            assert_exact(fresh.eval(), module, (x[:, :n],))


@pytest.mark.parametrize(
    "make",
    [
        lambda m, x: m._of_length(x.shape[1]) * x.mean(),
        lambda m, x: torch.cat([m.table, m._of_length(x.shape[1])]),
        lambda m, x: m._of_length(x.shape[1]) + m.b.bias,
        lambda m, x: torch.randn(x.shape[1], 8, dtype=x.dtype),
        lambda m, x: _written(m._of_length(x.shape[1]), slice(1), x.mean()),
        lambda m, x: _viewed(m._of_length(x.shape[1]), x.mean()),
        lambda m, x: x.new_full((x.shape[1], 8), 1.0) * x.new_full((), x.sum()),
    ],
    ids=[
        "data",
        "itself",
        "weights",
        "draws",
        "data written to it",
        "data written to a view of it",
        "a number of data",
    ],
)
def test_what_a_forward_remembers_is_no_table(make: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """A buffer of another shape that holds more than sizes tell would be lost: refused."""
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    with pytest.raises(CaptureError, match="replaces the buffer 'table' by another shape"):
        chase_fx.trace(_net(make, x), x)
    traced = chase_fx.trace(_net(make, x), x[:, :6])
    with pytest.raises(OtherSizeError, match="replaces the buffer 'table'"):
        traced(x)


def test_a_table_of_the_precision_of_the_input() -> None:
    """Of tensors that tell a dtype and a device nothing else is read."""
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    net = _net(lambda m, x: m._of_length(x.shape[1]).float().to(x).type_as(m.b.weight), x)
    traced = chase_fx.trace(net, x)
    assert torch.equal(traced(x), net(x))
