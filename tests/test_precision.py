"""What the forward reads of a tensor's precision follows the module; what it names itself stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.passes.evaluation import in_double


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


class Masking(nn.Module):
    """Writes a share of the largest number to what is masked, beside a number that looks like one."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.a, self.b, self.share = nn.Linear(4, 8), nn.Linear(8, 3), share

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(self.a(x))
        low = -self.share * torch.finfo(y.dtype).max
        return y, torch.full_like(y, low), torch.full((2,), 1e37, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.7, 1 / 3, 0.9, 0.002])
def test_any_share_of_the_largest_number_follows(share: float) -> None:
    """``-0.7 * torch.finfo(y.dtype).max`` is no constant: it was out of range in half precision."""
    model, x = Masking(share).eval(), torch.randn(2, 4)
    traced = chase_fx.trace(model, x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        expected = copy.deepcopy(model).to(dtype)(x.to(dtype))
        found = copy.deepcopy(traced).to(dtype)(x.to(dtype))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


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


class Clamping(nn.Module):
    """Decides by the precision, as models do that were trained in another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).float()
        if self.b.weight.dtype in (torch.float16, torch.bfloat16):
            y = y.clamp(-0.1, 0.1).to(self.b.weight.dtype)
        return self.b(y)


class Epsilon(nn.Module):
    """A number that depends on the precision, in a way that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * (3.0 if x.dtype is torch.bfloat16 else 1.0))


@pytest.mark.parametrize("cls", [Clamping, Epsilon])
@pytest.mark.parametrize("pickled", [False, True])
def test_decisions_by_precision(cls: type[nn.Module], pickled: bool) -> None:
    """Where the model does something else in the precision that it is moved to, it is captured again there."""
    model, x = cls().eval(), torch.randn(5, 4)
    traced = chase_fx.trace(model, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    single = slim(x)
    for module in (traced, slim):
        module.bfloat16()
    if pickled:
        traced, slim = pickle.loads(pickle.dumps(traced)), pickle.loads(pickle.dumps(slim))
    half = copy.deepcopy(model).bfloat16()
    assert torch.equal(traced(x.bfloat16()), half(x.bfloat16()))
    with torch.no_grad():
        kept = slim.plan.kept_indices()
        gone = [k for k in range(8) if k not in kept["a.weight"][0].tolist()]
        for tensor in (half.a.weight, half.a.bias):
            tensor[gone] = 0
    assert torch.allclose(slim(x.bfloat16()), half(x.bfloat16()), rtol=0.02, atol=0.02)
    assert torch.allclose(slim.float()(x), single, rtol=0.05, atol=0.05)


def test_a_judged_graph_is_the_same_in_double_precision() -> None:
    """Verification settles differences in double precision; another capture would be no judge of the first."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * (2.0 if self.a.weight.dtype is torch.float64 else 1.0)

    model, x = Doubling(), torch.randn(5, 4)
    wide = in_double(chase_fx.trace(model, x))
    assert torch.equal(wide(x.double()) * 2, model.double()(x.double()))


def test_what_only_follows_the_precision_needs_no_other_graph() -> None:
    """A graph whose constants follow the precision holds in each, also where it is compiled before the first call."""
    x = torch.randn(2, 4)
    traced = chase_fx.trace(Casting().eval(), x).double()
    assert not traced.variants.foreign
    assert all(torch.equal(a, b) for a, b in zip(traced(x.double()), Casting.forward(traced, x.double()), strict=True))
    assert not traced.variants.others


def test_another_precision_is_refused_where_nothing_can_be_captured() -> None:
    """A compilation can't capture, and a model that is gone can't be captured: both say so."""
    x = torch.randn(5, 4)
    traced = chase_fx.trace(Clamping().eval(), x).bfloat16()
    torch.compiler.reset()
    with pytest.raises(Exception, match="call it once"):
        torch.compile(traced, fullgraph=True, backend="eager")(x.bfloat16())
    expected = traced(x.bfloat16())
    torch.compiler.reset()
    assert torch.equal(torch.compile(traced, fullgraph=True, backend="eager")(x.bfloat16()), expected)
    traced.float().variants.recapture = None
    with pytest.raises(chase_fx.errors.OtherPathError, match="in the precision that the module was moved to"):
        traced.bfloat16()(x.bfloat16())
