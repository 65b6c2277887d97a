"""What the forward reads of a tensor's precision follows the module; what it names itself stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import chase_fx


class Casting(nn.Module):
    """Casts, limits and factories that follow ``x.dtype`` beside casts that name their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        mean = y.to(torch.float32).mean(0, keepdim=True)  # named: single precision whatever the module is in
        y = y - mean.to(y.dtype)
        low = torch.full((x.shape[0], 1), torch.finfo(self.b.weight.dtype).min / 2, dtype=y.dtype)
        named = torch.zeros(1, dtype=torch.float32)
        phase = torch.ones(1, dtype=y.dtype.to_complex())
        out = self.b(torch.cat([y, torch.zeros(x.shape[0], 1, dtype=x.dtype)], 1)[:, :8])
        return (out, low, named, phase, self.extra(y)) if self.training else (out, low, named, phase)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("captured", [torch.float32, torch.float64])
def test_precision_follows_the_module(captured: torch.dtype, train: bool) -> None:
    """At every precision the graph returns what the model does, in its dtypes, in both modes."""
    model = Casting().to(captured).train(train)
    x = torch.randn(2, 4, dtype=captured)
    traced = chase_fx.trace(model, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    for dtype in (torch.float32, torch.float64):
        expected = copy.deepcopy(model).to(dtype)(x.to(dtype))
        for module in (traced, slim):
            found = copy.deepcopy(module).to(dtype)(x.to(dtype))
            assert [t.dtype for t in found] == [t.dtype for t in expected]
            assert found[1].isfinite().all()
        assert all(
            torch.equal(a, b) for a, b in zip(expected, copy.deepcopy(traced).to(dtype)(x.to(dtype)), strict=True)
        )
    small = copy.deepcopy(slim).bfloat16()(x.bfloat16())
    assert small[0].dtype is small[1].dtype is torch.bfloat16
    assert small[1].isfinite().all(), "half of the lowest single is out of reach of a smaller type"


def test_compiles() -> None:
    """A graph whose constants follow its precision compiles as a whole."""
    x = torch.randn(2, 4)
    traced = chase_fx.trace(Casting().eval(), x).double()
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x.double()), traced(x.double()), strict=True))


class Branching(nn.Module):
    """Another structure in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.dtype is torch.float64:
            y = y.relu()
        return self.b(y.to(x.dtype))


def test_another_structure_follows_nothing() -> None:
    """Where the other precision runs other code, the capture stays what it was."""
    x = torch.randn(2, 4)
    model = Branching()
    traced = chase_fx.trace(model, x)
    assert torch.equal(traced(x), model(x))
    assert "float32" in traced.code
