"""Traced and slim modules pickle like any module, under every protocol."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx


class _Double(torch.autograd.Function):
    """Twice the input, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Everything(nn.Module):
    """A train-only head, a dropout by the module's mode, memory formats, operators of torch.ops, a custom
    function, a function of torch that is made inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.head, self.extra = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.ops.aten.relu(self.a(x.contiguous(memory_format=torch.channels_last)))
        x = F.max_pool2d(F.dropout(self.b(_Double.apply(x)), 0.5, self.training), 1)
        x = torch.ops.aten.mean.dim(x, [2, 3])
        out = self.head(x[:, : x.shape[1]])
        return (out, self.extra(x)) if self.training else out


def _torch_save(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [lambda m: pickle.loads(pickle.dumps(m)), lambda m: pickle.loads(pickle.dumps(m, 2)), _torch_save]
)
def test_round_trip(copied: Any) -> None:
    """Outputs of both modes, code, plan and keys survive; what was captured can still be analysed and rewritten."""
    x = torch.randn(2, 3, 5, 5)
    traced = chase_fx.trace(Everything(), x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    for module in (traced, slim):
        other = copied(module)
        assert isinstance(other, type(module).__bases__[0])
        assert (other.code, other.plan, list(other.state_dict())) == (
            module.code,
            module.plan,
            list(module.state_dict()),
        )
        assert torch.equal(other.eval()(x), module.eval()(x))
        torch.manual_seed(0)
        ours = module.train()(x)
        torch.manual_seed(0)
        theirs = other.train()(x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        theirs[0].sum().backward()
        ours[0].sum().backward()
        assert torch.equal(other.get_parameter("a.weight").grad, module.get_parameter("a.weight").grad)
    again = copied(traced)
    chase_fx.verify(again.eval(), chase_fx.rewrite(again, slim.plan))


def test_numbers_that_a_slim_graph_made_of_others() -> None:
    """Their nodes know which: these pickle as a part of the graph, not with a graph of their own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = _Double.apply(self.a(x))
            return self.b(y * (y.shape[1] + 1))

    x = torch.randn(3, 4)
    slim = chase_fx.prune(Model(), x)
    assert any("grown" in node.meta for node in slim.graph.nodes)
    copied = pickle.loads(pickle.dumps(slim))
    assert torch.equal(copied(x), slim(x))
    assert all(node.meta["grown"] in set(copied.graph.nodes) for node in copied.graph.nodes if "grown" in node.meta)
