"""Operators of torchvision on regions pass channels, and the nets around them are pruned exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ChaseError
from chase_fx.graphs.rules import DEFAULT_RULES
from chase_fx.graphs.rules.base import LabelledOp, Labels, Rule
from tests import kept_means
from tests.nets import Net, conv
from tests.oracle import EXACT, difference, randomise

ops = torchvision.ops
BOXES = torch.tensor([[0, 0.0, 0.0, 3.0, 3.0], [1, 1.0, 0.5, 7.0, 6.0], [0, 2.0, 2.0, 6.0, 7.5]], dtype=torch.float64)


def deformable(groups: int, offset_groups: int) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.deform(y, m.offset(y), m.mask(y).sigmoid()))

    return Net(
        forward,
        a=conv(3, 8),
        offset=conv(8, 18 * offset_groups),
        mask=conv(8, 9 * offset_groups),
        deform=ops.DeformConv2d(8, 12, 3, padding=1, groups=groups),
        out=conv(12, 2),
    )


def pooled(pool: Callable[..., Tensor], channels: int = 8) -> nn.Module:
    return Net(lambda m, x: m.out(pool(m.a(x), BOXES, (2, 2))), a=conv(3, channels), out=conv(8, 2))


# net -> the axes of its first layer's output and of its last layer's input
NETS = {
    "roi_align": (pooled(ops.roi_align), "8<A>", "8<A>"),
    "roi_pool": (pooled(ops.roi_pool), "8<A>", "8<A>"),
    "ps_roi_align": (pooled(ops.ps_roi_align, 32), "(8<A> * 4)", "8<A>"),
    "ps_roi_pool": (pooled(ops.ps_roi_pool, 32), "(8<A> * 4)", "8<A>"),
    "deform": (deformable(1, 1), "8<A>", "12<B>"),
    "deform in groups": (deformable(4, 1), "(4<A> * 2<B>)", "(4<A> * 3<C>)"),
    "offsets in groups": (deformable(1, 2), "(2 * 4<A>)", "12<B>"),
}


@pytest.mark.parametrize("name", sorted(NETS))
def test_channels_pass(name: str) -> None:
    """Channels pass through, what boxes and offsets pick by place stays, and the slim net is exact."""
    net, first, last = NETS[name]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = randomise(net, (x,))
    channels = chase_fx.analyze(chase_fx.trace(net, x))
    assert not channels.unknown
    lines = dict(line.split(": ") for line in str(channels).splitlines())
    names: dict[str, str] = {}
    for tensor, dim, expected in (("a.weight", 0, first), ("out.weight", 1, last)):
        text = lines[tensor].split(" x ")[dim]
        for group in [part.partition(">")[0] for part in text.split("<")[1:]]:
            names.setdefault(group, "ABC"[len(names)])
        for group in sorted(names, key=len, reverse=True):
            text = text.replace(f"<{group}>", f"<{names[group]}>")
        assert text == expected
    for sparsity in (0.3, 0.5, 0.8):
        slim = chase_fx.prune(net, x, channel_sparsity=sparsity, score="random")
        expected_output = kept_means.expected_output(net, slim, (x,), {})
        assert difference(expected_output, slim(x)) <= EXACT


def test_suppression_keeps_its_boxes() -> None:
    """Which boxes are left depends on every one of them, so what makes boxes and scores keeps its shape."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        corners = m.boxes(x).sigmoid().flatten(2).mean(2)
        boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
        kept = ops.nms(boxes, m.scores(x).mean((1, 2, 3)), 0.5)
        return m.out(m.a(x[kept]))

    net = Net(forward, a=conv(3, 8), boxes=conv(3, 4), scores=conv(3, 1), out=conv(8, 2))
    channels = chase_fx.analyze(chase_fx.trace(net, torch.randn(3, 3, 4, 4)))
    assert not channels.unknown
    assert [group.name for group in channels.groups] == ["a.weight:0"]


def test_rules_by_name() -> None:
    """The operators of a package that is not imported have their rules already: they are found by name."""
    assert DEFAULT_RULES.find(torch.ops.torchvision.roi_align.default) is DEFAULT_RULES.table["torchvision::roi_align"]


def _places_first(op: LabelledOp) -> list[Labels]:
    x, boxes = op.arg(0, "input"), op.arg(1, "rois")
    _, channels = op.split(op[x][1], 4, 8)
    return [(op[boxes][0], channels, *(op.fixed(n) for n in out.shape[2:])) for out in op.op.outs]


def _untied(op: LabelledOp) -> list[Labels]:
    x, boxes = op.arg(0, "input"), op.arg(1, "rois")
    return [(op[boxes][0], op.fresh(out.shape[1], 1), *op[x][2:]) for out in op.op.outs]


def _weight_untied(op: LabelledOp) -> Labels:
    x, w = op.arg(0, "input"), op.arg(1, "weight")
    op.contract(x, 1)
    return (op[x][0], op[w][0], *(op.fixed(n) for n in op.out.shape[2:]))


@pytest.mark.parametrize(
    ("name", "operator", "rule"),
    [
        ("roi_align", "roi_align", _untied),
        ("roi_pool", "roi_pool", _untied),
        ("ps_roi_align", "ps_roi_align", _places_first),
        ("ps_roi_pool", "ps_roi_pool", _places_first),
        ("deform", "deform_conv2d", _weight_untied),
    ],
)
def test_a_wrong_rule_is_caught(name: str, operator: str, rule: Rule) -> None:
    """With a wrong rule in its place the net is not pruned silently."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    traced = chase_fx.trace(randomise(NETS[name][0], (x,)), x)
    rules = DEFAULT_RULES.extend({f"torchvision::{operator}": rule})
    channels = chase_fx.analyze(traced, rules=rules)
    with pytest.raises((ChaseError, RuntimeError)):
        chase_fx.verify(traced, chase_fx.rewrite(traced, channels.plan(0.5, score="random")))
