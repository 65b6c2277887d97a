"""Regions of automatic casting inside a forward, and graphs that are called inside one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError, OtherPathError
from chase_fx.graphs.autocast import enter_autocast, exit_autocast
from chase_fx.graphs.traced import TracedModule

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
BF16, F16 = torch.bfloat16, torch.float16
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three layers, and a forward around them."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.run = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4), run
        self.norm = nn.LayerNorm(32)
        self.region = torch.autocast("cpu", dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(self: Net, x: Tensor) -> Tensor:
    """Read from the input's device, as most models do."""
    y = torch.relu(self.a(x))
    with torch.autocast(x.device.type, dtype=BF16):
        y = self.b(y)
    return self.c(y.float())


def disabled(self: Net, x: Tensor) -> Tensor:
    """Matters inside another region."""
    y = torch.relu(self.a(x))
    with torch.autocast("cpu", enabled=False):
        y = self.b(y.float())
    return self.c(y)


def nested(self: Net, x: Tensor) -> Tensor:
    """One inside another, with another type, and one that turns it off."""
    with torch.autocast("cpu", dtype=BF16):
        y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            y = self.norm(y.float())
        with torch.autocast("cpu", dtype=F16):
            z = y @ y.t()  # no weight: torch would use the one that it cast for the region around
        y = self.b(z.float() @ y)
    return self.c(y.float()).softmax(-1)


def by_default(self: Net, x: Tensor) -> Tensor:
    """No type is given: that of the region around it counts, where the object is made."""
    region = torch.autocast("cpu")
    with torch.autocast("cpu", dtype=F16):
        inner = torch.autocast("cpu")
        with region:
            y = self.a(x)
    with inner:
        return self.c(self.b(y.float())) + y.float().sum()


def uncached(self: Net, x: Tensor) -> Tensor:
    """Weights are cast at each use."""
    with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
        y = self.b(self.b(self.a(x)))
    return self.c(y.float())


def again(self: Net, x: Tensor) -> Tensor:
    """One object, entered twice."""
    with self.region:
        y = self.a(x)
    y = self.b(y.float())
    with self.region:
        return self.c(y)


def left_by_an_error(self: Net, x: Tensor) -> Tensor:
    """An exception ends a region, too."""
    y = self.a(x)
    try:
        with torch.autocast("cpu", dtype=BF16):
            y = y + self.b(y)
            y = {}[y]
    except KeyError:
        y = self.b(y)
    return self.c(y)


@torch.autocast("cpu", dtype=BF16)
def decorated(self: Net, x: Tensor) -> Tensor:
    """A region around a function."""
    return self.c(self.b(self.a(x)).relu())


@torch.autocast("cpu", enabled=False)
def recursive(self: Net, x: Tensor, depth: int = 2) -> Tensor:
    """One object, entered inside itself: torch then loses the state that was before."""
    return self.c(self.a(x)) if depth == 0 else recursive(self, x, depth - 1)


def by_mode(self: Net, x: Tensor) -> Tensor:
    """In train mode only."""
    with torch.autocast("cpu", dtype=BF16, enabled=self.training):
        return self.c(self.b(self.a(x)))


class Twice(torch.autograd.Function):
    """Runs in single precision, as it says."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x.t() @ x * (1 if ctx is None else 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def custom(self: Net, x: Tensor) -> Tensor:
    """A function of the user's own inside a region."""
    with torch.autocast("cpu", dtype=BF16):
        y = Twice.apply(self.a(x))
        return self.c(self.b(y))


def asking(self: Net, x: Tensor) -> Tensor:
    """Turned off only where it is on, as transformers' position embeddings do."""
    y = self.a(x)
    off = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with off:
        y = y.float() @ self.b.weight.float()
    return self.c(y.to(x.dtype) * self.b(y.to(x.dtype)).softmax(-1).to(x.dtype))


FORWARDS: list[Forward] = [
    plain, disabled, nested, by_default, uncached, again, left_by_an_error, decorated, by_mode, custom, asking
]  # fmt: skip


def same(a: nn.Module, b: nn.Module, *, ambient: bool = False) -> None:
    """Results and gradients are those of the model, to the bit."""
    for module in (a, b):
        module.zero_grad()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=BF16, enabled=ambient):
        want, have = a(x), b(y)
        assert torch.is_autocast_enabled("cpu") is ambient
    assert have.dtype is want.dtype
    assert torch.equal(have, want)
    want.float().square().sum().backward()
    have.float().square().sum().backward()
    for (name, p), q in zip([*a.named_parameters(), ("x", x)], [*b.parameters(), y], strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("run", FORWARDS)
def test_regions_are_kept(run: Forward, ambient: bool) -> None:
    """Alone and inside another region, in both modes, the graph casts where the model does."""
    model = Net(run)
    traced = chase_fx.trace(model, X)
    for mode in (False, True):
        same(model.train(mode), traced.train(mode), ambient=ambient)


@pytest.mark.parametrize("run", [plain, disabled, nested, by_default, uncached, by_mode])
def test_copies_and_compiled_graphs(run: Forward, tmp_path: Path) -> None:
    """Copied, saved, loaded and compiled, it is the same graph."""
    model = Net(run)
    traced = chase_fx.trace(model, X)
    torch.save(traced, tmp_path / "traced.pt")
    loaded = torch.load(tmp_path / "traced.pt", weights_only=False)
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    for mode in (False, True):
        for ambient in (False, True):
            for other in (copy.deepcopy(traced), loaded, compiled):
                same(model.train(mode), other.train(mode), ambient=ambient)


@pytest.mark.parametrize("run", [*FORWARDS[:4], by_mode, decorated])
def test_pruned_models_cast_in_the_same_places(run: Forward, tmp_path: Path) -> None:
    """Verified against the masked model; the regions hold the same calls."""
    model = Net(run).eval()
    traced = chase_fx.trace(model, X)
    slim = chase_fx.prune(model, X)
    assert slim.a.weight.shape[0] < 32
    assert inside(slim) == inside(traced)
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    loaded = chase_fx.load(tmp_path / "slim.safetensors", model)
    for ambient in (False, True):
        same(slim, loaded, ambient=ambient)


def inside(traced: TracedModule) -> list[tuple[int, str]]:
    """Every layer and function, and how many regions it is in."""
    depth, found = 0, []
    for node in traced.graph.nodes:
        depth += (node.target is enter_autocast) - (node.target is exit_autocast)
        if "tape" in node.meta:
            found.append((depth, str(node.target)))
    assert depth == 0
    return found


def test_an_object_that_is_entered_inside_itself() -> None:
    """Torch then does not go back to what was before, so neither does the graph."""
    model = Net(recursive).eval()
    traced = chase_fx.trace(model, X)
    for module in (model, traced):
        with torch.autocast("cpu", dtype=BF16):
            module(X)
            assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")


def test_a_region_around_a_branch() -> None:
    """Layers that are dropped at random inside a region: both ways cast."""

    def dropped(self: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            y = self.a(x)
            if not self.training or torch.rand(()).item() > 0.5:
                with torch.autocast("cpu", enabled=False):
                    y = y + self.b(y.float()).to(y.dtype)
            return self.c(y)

    model = Net(dropped)
    traced = chase_fx.trace(model, X)
    for seed in range(6):
        results = []
        for module in (model, traced):
            torch.manual_seed(seed)
            results.append(module(X))
        assert torch.equal(*results)
        assert not torch.is_autocast_enabled("cpu")


def test_types_inside_a_region_do_not_follow_the_model() -> None:
    """A type that a region makes is no sign of the model's precision; the input's is."""

    def typed(self: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            y = self.b(self.a(x)).softmax(-1)
            z = x.sum().to(y.dtype) + y
        return self.c(z.to(x.dtype))

    for run in (typed, asking):
        model = Net(run).eval()
        traced = chase_fx.trace(model, X).to(BF16)
        model.to(BF16)
        assert torch.equal(traced(X.to(BF16)), model(X.to(BF16)))


def test_another_way_inside_a_region_is_not_followed() -> None:
    """What else the forward does where casting is on is not in the graph, which stays as it is without."""

    def other(self: Net, x: Tensor) -> Tensor:
        y = self.a(x)
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                y = y.float() * 2
        return self.c(y)

    traced = chase_fx.trace(Net(other).eval(), X)
    assert "enter_" not in traced.code
    same(Net(other).eval(), traced)


def test_a_device_that_is_named_stays() -> None:
    """``"cuda"`` is never the CPU; a type that is read from the input goes where the input is."""

    def named(self: Net, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=BF16, enabled=False):
            y = self.a(x)
        with torch.autocast("cpu", dtype=BF16):
            y = self.b(y)
        with torch.autocast(x.device.type, dtype=BF16):
            return self.c(y)

    code = chase_fx.trace(Net(named).eval(), X).code
    settings = [line.partition("region_settings(")[2] for line in code.splitlines() if "region_settings(" in line]
    assert [line.partition(",")[0] for line in settings] == ["'cuda'", "'cpu'", "getattr_1"]


def test_an_error_inside_a_region_leaves_it() -> None:
    """A refusal inside a region does not leave torch casting."""

    def decides(self: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
            y = self.a(x)
            return self.c(y * 2 if x.shape[0] == 7 else y)

    model, x = Net(decides).eval(), torch.randn(7, 16)
    traced = chase_fx.trace(model, X)
    assert torch.equal(traced(x), model(x))
    traced.variants.others.clear()
    traced.variants.serving.clear()
    traced.variants.recapture = None
    with pytest.raises(OtherPathError):
        traced(x)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


def test_regions_without_effect_are_dropped() -> None:
    """Where nothing runs, nothing is entered."""

    def idle(self: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16), torch.autocast("cpu", enabled=False):
            n = x.shape[0] * 2
            self.b(self.a(x))  # nobody reads it
        return self.c(self.a(x)) * n

    traced = chase_fx.trace(Net(idle).eval(), X)
    assert "enter_" not in traced.code
    assert "region_settings" not in traced.code


def test_what_outlives_the_forward_is_refused() -> None:
    """A state without an end, with its line."""

    def opened(self: Net, x: Tensor) -> Tensor:
        torch.autocast("cpu", dtype=BF16).__enter__()
        return self.c(self.a(x))

    def closed(self: Net, x: Tensor) -> Tensor:
        self.region.__exit__(None, None, None)
        return self.c(self.a(x))

    def switched(self: Net, x: Tensor) -> Tensor:
        torch.set_autocast_enabled("cpu", True)
        return self.c(self.a(x))

    for run in (opened, closed, switched):
        with pytest.raises(CaptureError, match=r"test_autocast\.py:\d+"):
            chase_fx.trace(Net(run).eval(), X)
        assert not torch.is_autocast_enabled("cpu")
