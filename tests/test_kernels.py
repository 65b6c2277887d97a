"""What is found does not depend on which kernels torch would pick on a device, or in a precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chase_fx
from chase_fx.graphs.axes import resolve
from chase_fx.graphs.kernels import plain_kernels
from chase_fx.graphs.rules import DEFAULT_RULES
from chase_fx.graphs.rules.base import Facts, LabelledOp
from chase_fx.graphs.tape import Slot, TapedOp
from chase_fx.graphs.unification import Axes
from tests.oracle import assert_exact, randomise

aten = torch.ops.aten


class Grouped(nn.Module):
    """Queries of more heads than keys and values have."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.k, self.v = nn.Linear(10, heads * 6), nn.Linear(10, groups * 6), nn.Linear(10, groups * 5)
        self.o = nn.Linear(heads * 5, 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (8, 2), (4, 1), (16, 4), (6, 6)])
def test_attention_has_the_same_units_fused_and_not(heads: int, groups: int) -> None:
    """Where torch has no kernel for it, it copies the heads of the keys; these copies freeze nothing."""
    net, x = randomise(Grouped(heads, groups)), torch.randn(3, 6, 10, dtype=torch.float64)
    fused = chase_fx.analyze(chase_fx.trace(net, x))
    with sdpa_kernel(SDPBackend.MATH):
        traced = chase_fx.trace(net, x)
        apart = chase_fx.analyze(traced)
        slim = chase_fx.prune(net, x)
    assert [(g.name, g.size) for g in apart.groups] == [(g.name, g.size) for g in fused.groups]
    assert apart.plan(0.5) == fused.plan(0.5) == slim.plan
    assert_exact(net, slim, (torch.randn(2, 9, 10, dtype=torch.float64),))


def test_recurrent_layers_run_step_by_step() -> None:
    """Neither oneDNN nor cuDNN runs a layer as one call while a net with one is recorded; after it both do again."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    with plain_kernels(nn.Sequential(nn.GRU(3, 4))):
        assert not torch._C._get_mkldnn_enabled()
        assert not torch._C._get_cudnn_enabled()
    assert (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()) == before
    with plain_kernels(nn.Linear(3, 4)):
        assert (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()) == before


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("operator", "gates"), [(aten._thnn_fused_lstm_cell, 4), (aten._thnn_fused_gru_cell, 3)])
def test_fused_steps_of_recurrent_layers(operator: torch._ops.OpOverloadPacket, gates: int, biases: bool) -> None:
    """Each hidden unit goes with one row of every gate, in both products, in the biases and in the state."""
    shapes = [(5, gates * 3), (5, gates * 3), (5, 3), *([(gates * 3,), (gates * 3,)] if biases else [])]
    results = [(5, 3), (5, 3), (5, 12)] if gates == 4 else [(5, 3), (5, 15)]
    slots = [Slot(i, shape, torch.float32) for i, shape in enumerate(shapes)]
    outs = tuple(Slot(10 + i, shape, torch.float32) for i, shape in enumerate(results))
    axes = Axes()
    labels = {s.index: tuple(axes.atom(n, (f"t{s.index}", d)) for d, n in enumerate(s.shape)) for s in slots}
    taped = TapedOp(operator.default, tuple(slots), {}, outs)
    rule = DEFAULT_RULES.find(operator.default)
    assert rule is not None
    found = rule(LabelledOp(taped, axes, labels, [], Facts()))
    assert [tuple(axis.size for axis in label) for label in found] == results
    batch, hidden = map(resolve, labels[2])
    for label in (labels[0], labels[1], *found):
        assert resolve(label[0]) is batch
    for label in (labels[0], labels[1], *(labels[slot.index] for slot in slots[3:])):
        assert list(map(resolve, resolve(label[-1]).parts)) == [hidden] * gates
    assert resolve(found[0][1]) is hidden
    assert hidden.size == 3
