"""Models on which a careless comparison would find differences that are none, or miss those that are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import chase_fx
import chase_fx.errors
from chase_fx.graphs.guards import GUARDS
from chase_fx.passes.comparing import Comparing
from chase_fx.passes.following import Following
from tests.oracle import assert_exact, randomise


class Between(nn.Module):
    """A step between two linear layers."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self.first(x)))


def rows() -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def written(x: Tensor) -> Tensor:
    """Memory that is written piece by piece."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1])
    out[..., :4].copy_(x[..., :4])
    out[..., 4:].copy_(x[..., 4:].relu())
    return out


def drawn(x: Tensor) -> Tensor:
    """Rows in a random order, in eval mode too."""
    return x[torch.multinomial(torch.ones(x.shape[0]), x.shape[0])]


@pytest.mark.parametrize("step", [written, drawn])
def test_what_is_random_in_both_runs_is_no_difference(step: Callable[[Tensor], Tensor]) -> None:
    """Memory that is not written yet and random draws are alike in both runs; the generator is left as it was."""
    model = randomise(Between(step))
    for seed in range(3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        slim = chase_fx.prune(model, (rows(),))
        assert torch.equal(torch.get_rng_state(), before)
        assert slim.plan.new_shape("first.weight") == (4, 5)
    if step is written:
        assert_exact(model, slim, (rows(),))


class Standardised(nn.Module):
    """A pointwise convolution whose weight is standardised over its inputs, which a group norm factors later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.last.weight
        flat = F.batch_norm(weight.reshape(1, 6, -1), None, None, training=True, momentum=0.0)
        x = self.first(x)
        x = F.conv2d(x, flat.reshape_as(weight)) + F.conv2d(self.norm(x), weight)
        return self.head(x)


def test_a_spread_keeps_two_units_of_an_axis_that_is_factored_later() -> None:
    model = randomise(Standardised())
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    slim = chase_fx.prune(model, (images,), channel_sparsity=0.9)
    assert slim.plan.new_shape("last.weight")[1] == 2


def test_no_progress_bar_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would start a thread, also one that is not shown."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a progress bar was made")

    monkeypatch.setattr("torch.fx.interpreter.tqdm", refuse)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    traced = chase_fx.trace(net, x)
    assert chase_fx.verify(traced, chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))).difference <= 1e-6


class Chaotic(nn.Module):
    """Each step doubles what rounding there is in the sums of a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 200), nn.Linear(200, 200), nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.first(x)).sigmoid() + 0.5
        for _ in range(30):
            x = (2 * x).frac()
        return self.last(x)


def test_rounding_that_a_model_makes_more_of_is_no_difference() -> None:
    """Outputs that chaos tells apart are compared node by node; a wrong node is found all the same."""
    torch.manual_seed(0)
    net = randomise(Chaotic().double(), (rows(),))
    traced = chase_fx.trace(net, rows())
    plan = chase_fx.analyze(traced).plan(0.5)
    slim = chase_fx.rewrite(traced, plan)
    report = chase_fx.verify(traced, slim)
    assert report.stepwise
    assert report.difference <= 1e-14
    before = {name: t.clone() for name, t in slim.state_dict().items()}
    mean = next(node for node in slim.graph.nodes if node.target == "sigmoid")
    with slim.graph.inserting_after(mean):
        wrong = slim.graph.call_method("mul", (mean, 1 + 1e-8))
    mean.replace_all_uses_with(wrong, lambda user: user is not wrong)
    slim.recompile()
    with pytest.raises(chase_fx.errors.VerificationError) as caught:
        chase_fx.verify(traced, slim)
    assert caught.value.node == "add"
    assert all(torch.equal(t, before[name]) for name, t in slim.state_dict().items())


def test_verify_keeps_no_value_longer_than_it_is_used() -> None:
    """Of a deep net a few values are alive at a time, and of the reference one for each node."""
    traced = chase_fx.trace(nn.Sequential(*(nn.Linear(8, 8) for _ in range(30))), torch.randn(4, 8))
    most = 0

    class Counting(Following):
        def compute(self, node: Node) -> object:
            nonlocal most
            most = max(most, len(self.env))
            return super().compute(node)

    run = Counting(traced, traced.graph, {})
    run.run(torch.randn(4, 8))
    assert most <= 2
    assert run.env == {}
    channels = chase_fx.analyze(traced)
    plan = channels.plan(0.5)
    wanted = {node.name: torch.zeros(4, 4) for node in traced.graph.nodes if node.target not in GUARDS}
    compared = Comparing(chase_fx.rewrite(traced, plan), wanted, {})
    compared.run(torch.randn(4, 8))
    assert set(wanted) <= {"output"}


def joined(parts: list[Tensor]) -> Tensor:
    """Their sum; the list is used up."""
    assert type(parts) is list
    while len(parts) > 1:
        parts.append(parts.pop(0) + parts.pop(0))
    return parts[0]


def test_containers_are_those_of_the_code() -> None:
    """Defaults that are lists or dicts, and lists that functions get, are not what a graph keeps them as."""

    class Net(Between):
        def forward(self, x: Tensor, more: dict = {}, steps: list = [1, {"k": 2}]) -> Tensor:  # type: ignore[type-arg]  # noqa: B006
            y = self.last(self.first(x))
            return joined([y * steps[0], y.relu(), *more.values()])

    model = randomise(Net(nn.Identity()))
    assert_exact(model, chase_fx.prune(model, rows()), (rows(),))
    traced = chase_fx.trace(model, rows(), whole=[joined])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    assert chase_fx.verify(traced, slim).difference <= 1e-9
