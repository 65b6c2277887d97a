"""Random draws of a forward: the graph draws what the model draws, in the same order, or refuses train mode."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import randomise

SEEDS = range(12)
own_generator = random.Random(3)


class Body(nn.Module):
    """Two linear layers; subclasses say what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 2)


def run(root: nn.Module, x: Tensor, seed: int) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], Any]:
    """Outputs, gradients, buffers, and what the generators give next."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    root.zero_grad()
    out = root(x)
    outs = list(out) if isinstance(out, tuple) else [out]
    tensors = [t for t in outs if isinstance(t, Tensor)]
    sum(t.square().sum() for t in tensors if t.requires_grad).backward()
    after = torch.rand(()).item(), random.random(), np.random.random()
    gradients = {n: p.grad.clone() for n, p in root.named_parameters() if p.grad is not None}
    own = {n: b.clone() for n, b in root.named_buffers() if "_chase" not in n}
    return [torch.zeros(()) if t is None else t for t in outs], gradients, own, after


def same(model: nn.Module, traced: nn.Module, x: Tensor, seeds: Any = SEEDS) -> None:
    """Both do the same in train mode, whatever is drawn."""
    model, traced = copy.deepcopy(model).train(), copy.deepcopy(traced).train()
    for seed in seeds:
        want, have = run(model, x, seed), run(traced, x, seed)
        assert have[3] == want[3], f"the generators differ after seed {seed}"
        for a, b in ((dict(enumerate(want[0])), dict(enumerate(have[0]))), want[1:3], have[1:3])[:1]:
            assert all(torch.equal(a[k], b[k]) for k in a), f"outputs differ at seed {seed}"
        for a, b in zip(want[1:3], have[1:3], strict=True):
            assert a.keys() == b.keys(), f"other tensors at seed {seed}: {sorted(a.keys() ^ b.keys())}"
            assert all(torch.equal(a[k], b[k]) for k in a), f"gradients or buffers differ at seed {seed}"


def batch() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_dropout_that_nobody_reads_draws() -> None:
    """What is drawn later depends on it; eval mode, in which nothing is drawn, leaves it out."""

    class Unread(Body):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            self.drop(h.relu())
            return self.b(self.drop(h))

    model = randomise(Unread())
    traced = chase_fx.trace(model, batch())
    same(model, traced, batch())
    assert "relu" not in traced.code


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "draw", ["random.random()", "random.uniform(0.5, 2)", "np.random.rand()", "np.random.normal()"]
)
def test_numbers_of_python_and_numpy_are_drawn_again(draw: str) -> None:
    class Scaled(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * (1 + eval(draw) / 2))

    model = randomise(Scaled())
    traced = chase_fx.trace(model, batch())
    same(model, traced, batch())
    same(model, pickle.loads(pickle.dumps(traced)), batch(), [1])


def test_seeds_that_the_forward_sets() -> None:
    class Seeded(Body):
        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.a(x), training=self.training)
            torch.manual_seed(5)
            return self.b(h + torch.rand(8, dtype=x.dtype))

    model = randomise(Seeded())
    same(model, chase_fx.trace(model, batch()), batch())


def mask_of(shape: tuple[int, int], share: float) -> np.ndarray:
    """True at random places, as in SpecAugment."""
    number = int(share * shape[1] + np.random.rand(1).item())
    mask = np.zeros(shape, dtype=bool)
    for row in range(shape[0]):
        mask[row, np.random.choice(shape[1], number, replace=False)] = True
    return mask


def test_function_that_draws_an_array_is_called_again() -> None:
    """At other sizes too; eval mode does not call it, and prunes as if it were not there."""

    class Masked(Body):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if self.training:
                rows = torch.tensor(mask_of((1, x.shape[0]), 0.5), device=x.device)[0]
                h[rows] = self.b.weight.sum(0)
            return self.b(h)

    model = randomise(Masked())
    traced = chase_fx.trace(model, batch())
    same(model, traced, batch())
    same(model, traced, torch.cat([batch(), batch()]))
    slim = chase_fx.prune(model, batch())
    assert slim.get_submodule("a").out_features == 4
    run(slim.train(), batch(), 0)


def _array_inline(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * (torch.tensor(np.random.rand(8)) if self.training else 1.0))


def _array_reused(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * (torch.tensor(~mask_of((1, 8), 0.5)) if self.training else 1.0))


def _index(self: Any, x: Tensor) -> Tensor:
    scales = [1.0, 2.0, 3.0]
    return self.b(self.a(x) * (scales[random.randrange(3)] if self.training else 1.0))


def _rounded(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * ([1.0, 2.0][int(2 * random.random())] if self.training else 1.0))


def _own(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * (own_generator.random() if self.training else 1.0))


def _list(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)[:, torch.randperm(8).tolist()] if self.training else self.a(x))


@pytest.mark.parametrize("forward", [_array_inline, _array_reused, _index, _rounded, _own, _list])
def test_draws_that_no_graph_can_make_again_are_refused_in_train_mode(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = randomise(type("Net", (Body,), {"forward": forward})())
    traced = chase_fx.trace(model, batch())
    assert torch.equal(traced(batch()), model.eval()(batch()))
    with pytest.raises(CaptureError, match=r"no train mode.*random numbers|no train mode.*draws numbers"):
        traced.train()(batch())
    chase_fx.prune(model, batch())


class Rerun(torch.autograd.Function):
    """Runs a function without gradients and again in the backward; its result and its state leave it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, states: list[Tensor]) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        out = layer(x)
        states.append(out * 2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(grad)
        return x.grad, None, None


class Reversible(Body):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []

        def layer(h: Tensor) -> Tensor:
            return F.dropout(self.b(h), self.p, self.training)

        out = Rerun.apply(self.a(x), layer, states)
        return out, states[0].tanh()


def test_what_leaves_an_autograd_function_has_no_gradient() -> None:
    model = randomise(Reversible(0.0))
    traced = chase_fx.trace(model, batch())
    same(model, traced, batch(), [0])
    assert not traced.train()(batch())[1].requires_grad


def test_draws_of_a_function_whose_backward_runs_again() -> None:
    """It may draw others there, and a graph can't tell."""
    traced = chase_fx.trace(randomise(Reversible(0.5)), batch())
    with pytest.raises(CaptureError, match=r"no train mode.*Rerun.*test_draws\.py:\d+"):
        traced.train()(batch())


class Cache:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []


def test_objects_that_hold_more_in_train_mode() -> None:
    """Each mode has its own template of the result."""

    class Caching(Body):
        def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
            cache = Cache()
            h = self.a(x)
            cache.kept.append(h)
            if self.training:
                cache.kept.append(h * 2)
            return self.b(h), cache

    model = randomise(Caching())
    traced = chase_fx.trace(model, batch())
    for training in (False, True):
        want, have = (root.train(training)(batch())[1].kept for root in (model, traced))
        assert [torch.equal(a, b) for a, b in zip(want, have, strict=True)] == [True] * (1 + training)


def test_objects_that_hold_no_tensor() -> None:
    """They come back too, each time as another one: what the caller does to it is not in the next result."""

    class Empty(Body):
        def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
            return self.b(self.a(x)), Cache()

    model = randomise(Empty())
    for root in (chase_fx.trace(model, batch()), chase_fx.prune(model, batch(), channel_sparsity=0.5)):
        found = root(batch())[1]
        found.kept.append(batch())
        assert root(batch())[1].kept == []
