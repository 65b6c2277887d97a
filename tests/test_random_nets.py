"""Random networks, judged by the library's masked reference and by an oracle that knows no labels.

The nets mix whatever :mod:`tests.random_nets` has: convolutions of every kind, norms, attention, recurrent layers,
embeddings. Each is pruned at a random sparsity, run at batch sizes 1, 2 and 3, in train and in eval mode, and its
gradients are compared. A failure prints the net and a line that reproduces it.
"""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, event, example, given, settings
from torch import Tensor, nn

import chase_fx
from tests import gradients, kept_means
from tests.oracle import EXACT, difference
from tests.random_nets import Drawn, nets


def near(gap: float, what: str) -> None:
    assert gap <= EXACT, f"{what}: differs by {gap:.1e}"


def judge(drawn: Drawn, sparsity: float, score: str, round_to: int) -> None:
    net, args = drawn.net, (drawn.inputs(3),)
    traced = chase_fx.trace(net, args)
    channels = chase_fx.analyze(traced)
    assert not channels.unknown
    assume(channels.groups)  # cuts that don't align with rows can freeze a small net as a whole
    plan = channels.plan(sparsity, score, round_to)
    slim = chase_fx.rewrite(traced, plan).eval()
    near(chase_fx.verify(traced, slim).difference, "masked reference")
    for kept in plan.kept_indices().values():
        assert all(k is None or len(k) > 0 for k in kept)
    if sparsity >= 0.5 and round_to == 1 and any(group.size > 2 for group in channels.groups):
        assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in net.parameters())
    alone = chase_fx.analyze(chase_fx.trace(net, (drawn.inputs(1),))).plan(sparsity, score, round_to)
    assert list(plan.differences(alone)) == []
    other_batches(drawn, traced, slim)
    near(training_gap(net, traced, args), "capture in train mode")
    try:
        with torch.no_grad():
            near(difference(kept_means.expected_output(net, slim, args, {}), slim(*args)), "oracle")
        quiet = undropped(net), undropped(slim)
        for training in (False, True):
            gap = gradients.gap(*gradients.both(*quiet, args, training=training))
            near(gap, f"gradients in {'train' if training else 'eval'} mode")
    except kept_means.UndecidedError:
        event("not judged by the oracle")


def other_batches(drawn: Drawn, traced: nn.Module, slim: nn.Module) -> None:
    """At other batch sizes the capture follows the model, and the slim module follows itself."""
    with torch.no_grad():
        out = slim(drawn.inputs(3))
        for batch in (1, 2):
            x = drawn.inputs(batch)
            near(difference(drawn.net(x), traced(x)), f"capture at batch size {batch}")
            near(difference(out[:batch], slim(x)), f"slim at batch size {batch}")


def undropped(root: nn.Module) -> nn.Module:
    """A copy that drops no element, for the slim module draws fewer of them than the model."""
    root = copy.deepcopy(root)
    for module in root.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return root


def training_gap(net: nn.Module, traced: nn.Module, args: tuple[Tensor, ...]) -> float:
    """How far outputs, gradients and buffers of the capture are from the model's in train mode, dropout included."""
    found = []
    for root in (copy.deepcopy(m).train() for m in (net, traced)):
        kept_means.seed()
        found.append(gradients.learned(root, root(*args), args))
    return gradients.gap(*found)


OPTIONS = {
    "drawn": nets(),
    "sparsity": st.sampled_from((0.2, 0.5, 0.75, 0.95)),
    "score": st.sampled_from(("magnitude", "random")),
    "round_to": st.sampled_from((1, 1, 1, 2, 4)),
}
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def spectral() -> Drawn:
    """A net whose spectral norm writes its vectors with ``out=`` in train mode; slim modules lack an entry of them."""
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), conv, nn.BatchNorm2d(4), nn.GELU(), *head)
    return Drawn(net.double().eval(), "image", (8, 8))


@given(**OPTIONS)
@example(drawn=spectral(), sparsity=0.2, score="magnitude", round_to=1)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=CHECKS)
def test_random_nets_are_exact(drawn: Drawn, sparsity: float, score: str, round_to: int) -> None:
    """Any small net, pruned at any sparsity, equals its masked dense self, whatever the batch size of the capture."""
    judge(drawn, sparsity, score, round_to)


@pytest.mark.matrix
@pytest.mark.parametrize("part", range(20))
def test_many_random_nets_are_exact(part: int) -> None:
    """The same on two thousand nets, other ones each time."""

    @given(**OPTIONS)
    @settings(max_examples=100, deadline=None, database=None, print_blob=True, suppress_health_check=CHECKS)
    def check(drawn: Drawn, sparsity: float, score: str, round_to: int) -> None:
        judge(drawn, sparsity, score, round_to)

    check()
