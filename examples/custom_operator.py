"""Teach the analysis an operator that it does not know: one rule, added by value.

Without the rule the operator's channels are frozen, which is safe, and reported with the line that called it. A custom
autograd function needs no rule of its own: the operators that its forward calls have theirs, and its backward is kept.

Run: python examples/custom_operator.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import chase_fx
from chase_fx.graphs.rules import LabelledOp, Labels


@torch.library.custom_op("chase_fx_example::scaled_tanh", mutates_args=())
def scaled_tanh(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale * tanh(x)`` with one scale per channel: x (N, C), scale (C,)."""
    return scale * torch.tanh(x)


@scaled_tanh.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # noqa: ARG001  (the signature of the operator)
    return torch.empty_like(x)


class ScaledTanh(torch.autograd.Function):
    """The operator with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(N, C), (C,) -> (N, C)."""
        ctx.save_for_backward(x, scale)
        out: torch.Tensor = scaled_tanh(x, scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of x and scale."""
        x, scale = ctx.saved_tensors
        y = torch.tanh(x)
        return gradient * scale * (1 - y * y), (gradient * y).sum(0)


def scaled_tanh_rule(op: LabelledOp) -> Labels:
    """Channels of x and of scale are the same channels.

    x: (N, C), scale: (C,) -> out: (N, C)
    """
    x, scale = op.arg(0, "x"), op.arg(1, "scale")
    op.tie(op[x][1], op[scale][0])
    return op[x]


class Net(nn.Module):
    """Two linear layers with the custom function between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.scale = nn.Parameter(torch.rand(32) + 0.5)
        self.second = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 8) -> (N, 4)."""
        out: torch.Tensor = self.second(ScaledTanh.apply(self.first(x), self.scale))
        return out


def main() -> None:
    """Prune the net, first without and then with the rule, and train the slim one for a step."""
    traced = chase_fx.trace(Net(), torch.randn(2, 8))
    unknown = chase_fx.analyze(traced).unknown
    print(f"without the rule: {unknown[0].op} at {unknown[0].source}: {unknown[0].reason}")

    rules = chase_fx.DEFAULT_RULES.extend({torch.ops.chase_fx_example.scaled_tanh: scaled_tanh_rule})
    channels = chase_fx.analyze(traced, rules=rules)
    slim = chase_fx.rewrite(traced, channels.plan(channel_sparsity=0.5))
    print(f"with the rule: {slim.get_submodule('first')}, {tuple(slim.get_parameter('scale').shape)}")
    print(chase_fx.verify(traced, slim))

    slim(torch.randn(2, 8)).sum().backward()
    gradient = slim.get_parameter("scale").grad
    assert gradient is not None
    print(f"its own backward gives the scale a gradient of shape {tuple(gradient.shape)}")


if __name__ == "__main__":
    main()
