"""Numbers computed from sizes by which a forward addresses channels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherSizeError
from chase_fx.graphs.guards import GUARDS
from chase_fx.graphs.traced import TracedModule
from tests.nets import Net, conv
from tests.oracle import EXACT, difference, masked_copy, randomise

Step = Callable[[Tensor, int], Tensor]

STEPS: dict[str, Step] = {
    "slice": lambda y, n: y[:, :n].sum(1, keepdim=True),
    "aten slice": lambda y, n: torch.ops.aten.slice(y, 1, 0, n).sum(1, keepdim=True),
    "index": lambda y, n: y[:, n : n + 1] * y[:, n - 1, None],
    "narrow": lambda y, n: y.narrow(1, n, 2).sum(1, keepdim=True),
    "split": lambda y, n: y.split([n, y.shape[1] - n], 1)[0].sum(1, keepdim=True),
    "chunks": lambda y, n: y.split(n, 1)[1].sum(1, keepdim=True),
    "pad": lambda y, n: F.pad(y, (0, 0, 0, 0, n, 0))[:, 4:10].sum(1, keepdim=True),
}


def pruned(step: Step, number: Callable[[Tensor, Tensor], int]) -> tuple[nn.Module, TracedModule, TracedModule]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y) + step(y, number(x, y))

    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = randomise(Net(forward, a=conv(3, 8), out=conv(8, 2)), (x,))
    traced = chase_fx.trace(net, x)
    return net, traced, chase_fx.prune(net, x, score="random")


def width(slim: TracedModule) -> int:
    found: int = slim.plan.new_shape("a.weight")[0]
    return found


def reference(net: nn.Module, slim: TracedModule, x: Tensor) -> Tensor:
    found: Tensor = masked_copy(net, slim.plan.kept_indices())(x)
    return found


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_a_number_of_pixels_holds_for_the_example(step: Step) -> None:
    """The slim graph has the places of the kept channels, so it can't follow; another batch it serves."""
    net, _, slim = pruned(step, lambda x, _: x.shape[2])
    assert width(slim) < 8
    for batch in (1, 5):
        x = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
        assert difference(reference(net, slim, x), slim(x)) <= EXACT
    assert not slim.variants.others
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    alone = copy.deepcopy(slim)
    alone.variants.recapture = None
    with pytest.raises(OtherSizeError, match=r"test_numbers_on_channels\.py"):
        alone(x)
    with contextlib.suppress(OtherSizeError):  # where other channels stay at that size
        assert difference(reference(net, slim, x), slim(x)) <= EXACT


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_a_number_of_channels_is_the_same_in_every_call(step: Step) -> None:
    net, traced, slim = pruned(step, lambda _, y: y.shape[1] // 2)
    for size in (3, 4, 6):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert difference(reference(net, slim, x), slim(x)) <= EXACT
    guards = [sum(node.target in GUARDS for node in g.graph.nodes) for g in (traced, slim)]
    assert guards[1] <= guards[0] or width(slim) > 4  # of what is partly frozen, nobody knows
