"""Slim modules at sizes at which the model runs other code: what is captured again is cut by the same plan."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherSizeError
from chase_fx.training import GraphShrinker
from tests.oracle import assert_exact, randomise
from tests.sequence_nets import Net, branch, loop, model_of, sequence


def test_first_met_in_inference_mode() -> None:
    """What a graph holds for itself can be trained with later."""

    def tabled(net: Net, y: Tensor) -> Tensor:
        return branch(net, y) * torch.tensor([1.0, 2.0] * 6, dtype=y.dtype)

    slim = chase_fx.prune(model_of(tabled), sequence(8))
    with torch.inference_mode():
        slim(sequence(5))
    slim(sequence(5)).sum().backward()
    assert slim.get_parameter("first.weight").grad is not None


def test_nothing_is_left_behind() -> None:
    """Rewritten and unpickled modules hold nothing for graphs that they don't have."""

    def tabled(net: Net, y: Tensor) -> Tensor:
        return loop(net, y) * torch.tensor([1.0, 2.0] * 6, dtype=y.dtype)

    traced = chase_fx.trace(model_of(tabled), sequence(8))
    names = {name for name, _ in (*traced.named_buffers(), *traced.named_modules())}
    traced(sequence(5))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan_keeping({}))
    again = pickle.loads(pickle.dumps(traced))
    for module in (slim, again):
        assert {name for name, _ in (*module.named_buffers(), *module.named_modules())} == names
    traced.recompile()
    assert {name for name, _ in (*traced.named_buffers(), *traced.named_modules())} == names


def test_layers_that_the_other_code_leaves_out() -> None:
    """What the plan removed from them does not matter."""

    def skipping(net: Net, y: Tensor) -> Tensor:
        return y if y.shape[1] < 6 else y + net.other(y)

    model = model_of(skipping)
    slim = chase_fx.prune(model, sequence(8))
    for length in (8, 5):
        assert_exact(model, slim, (sequence(length),))


def test_live_shrink() -> None:
    """What is cut while it trains meets other sizes as a slim module does."""
    model = model_of(branch)
    traced = chase_fx.trace(model, sequence(8))
    traced(sequence(5))
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.0)
    channels = chase_fx.analyze(traced)
    plan = channels.plan(0.5)
    slim = chase_fx.rewrite(traced, plan)
    shrink = GraphShrinker(traced, channels)
    masks = channels.masks_of(plan)
    kept = {g.name: torch.from_numpy(masks[g.atom]) for g in channels.groups if g.atom in masks}
    for name, parameter in traced.named_parameters():
        parameter.data = slim.get_parameter(name).data.clone()
    shrink(traced, kept)
    assert optimizer.param_groups[0]["params"]
    for length in (8, 5, 3):
        assert torch.equal(traced.eval()(sequence(length)), slim.eval()(sequence(length)))
        assert_exact(model, traced, (sequence(length),))


def test_live_shrink_of_numbered_channels() -> None:
    """The slim graph takes the places that stay from a buffer, which comes along."""

    def numbered(net: Net, y: Tensor) -> Tensor:
        return net.other(y * torch.arange(12, dtype=y.dtype))

    model = model_of(numbered)
    traced = chase_fx.trace(model, sequence(8))
    channels = chase_fx.analyze(traced)
    shrink = GraphShrinker(traced, channels)
    dense = chase_fx.trace(model, sequence(8))
    groups = chase_fx.analyze(dense)
    for share in (0.25, 0.5):
        plan = groups.plan(share)
        masks = groups.masks_of(plan)
        slim = chase_fx.rewrite(dense, plan)
        assert [name for name, _ in slim.named_buffers() if "kept" in name]
        for name, parameter in traced.named_parameters():
            parameter.data = slim.get_parameter(name).data.clone()
        shrink(traced, {g.name: torch.from_numpy(masks[g.atom]) for g in groups.groups if g.atom in masks})
        assert torch.equal(traced.eval()(sequence(8)), slim.eval()(sequence(8)))


def mixing(net: Net, y: Tensor) -> Tensor:
    """Short sequences couple the channels of two layers that are apart in long ones."""
    return net.other(y) + y if y.shape[1] < 6 else net.other(y)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    """Where the other code couples what the plan tells apart, the slim module refuses, and holds nothing more."""
    model = model_of(mixing)
    traced = chase_fx.trace(model, sequence(8))
    channels = chase_fx.analyze(traced)
    assert len(channels.groups) == 2
    half = torch.arange(12) < 6
    kept = {group.name: mask for group, mask in zip(channels.groups, (half, ~half), strict=True)}
    slim = chase_fx.rewrite(traced, channels.plan_keeping(kept))
    names = [name for name, _ in slim.named_buffers()]
    with pytest.raises(
        OtherSizeError, match=r"test_variants_slim\.py:\d+.*could not be captured again.*coupled"
    ) as found:
        slim(sequence(5))
    assert "test_variants_slim.py" in found.value.where
    assert [name for name, _ in slim.named_buffers()] == names
    assert_exact(model, slim, (sequence(8),))


def test_a_module_has_one_size() -> None:
    """A norm without weights that the other code calls on another width would change what the first graph computes."""

    class Grouped(Net):
        def __init__(self, rule: Callable[[Net, Tensor], Tensor]) -> None:
            super().__init__(rule)
            self.shared = nn.GroupNorm(4, 12, affine=False)

    def either(net: Any, y: Tensor) -> Tensor:
        if y.shape[1] < 6:
            return net.shared(net.other(y).mT).mT
        return net.other(net.shared(y.mT).mT)

    torch.manual_seed(0)
    model = randomise(Grouped(either), (sequence(8),))
    traced = chase_fx.trace(model, sequence(8))
    channels = chase_fx.analyze(traced)
    first = next(group for group in channels.groups if group.size == 4)
    slim = chase_fx.rewrite(traced, channels.plan_keeping({first.name: torch.arange(4) < 2}))
    chase_fx.verify(traced, slim)
    before = slim(sequence(8))
    with pytest.raises(OtherSizeError, match=r"test_variants_slim\.py:\d+"):
        slim(sequence(5))
    assert torch.equal(slim(sequence(8)), before)


def test_frozen_outputs_and_custom_rules() -> None:
    """The outputs that the plan leaves open stay open."""

    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.rule(self, self.norm(self.first(x).mT).mT)
            return {"scores": self.last(y), "features": y}

    model = randomise(Two(branch), (sequence(8),))
    slim = chase_fx.prune(model, sequence(8), outputs="scores")
    assert slim(sequence(8))["features"].shape[-1] == slim(sequence(5))["features"].shape[-1] == 6
    traced = chase_fx.trace(model, sequence(5))
    again = chase_fx.rewrite(traced, chase_fx.analyze(traced, "scores").plan_keeping({}))
    assert again(sequence(5))["features"].shape[-1] == 12
