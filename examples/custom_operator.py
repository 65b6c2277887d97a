"""Teach the analysis an operator that it does not know: one rule, added by value.

Without the rule the operator's channels are frozen, which is safe, and reported with the line that called it.

Run: python examples/custom_operator.py
"""

from __future__ import annotations

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


def scaled_tanh_rule(op: LabelledOp) -> Labels:
    """Channels of x and of scale are the same channels.

    x: (N, C), scale: (C,) -> out: (N, C)
    """
    x, scale = op.arg(0, "x"), op.arg(1, "scale")
    op.tie(op[x][1], op[scale][0])
    return op[x]


class Net(nn.Module):
    """Two linear layers with the custom operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.scale = nn.Parameter(torch.rand(32) + 0.5)
        self.second = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 8) -> (N, 4)."""
        out: torch.Tensor = self.second(scaled_tanh(self.first(x), self.scale))
        return out


def main() -> None:
    """Prune the net, first without and then with the rule."""
    traced = chase_fx.trace(Net(), torch.randn(2, 8))
    unknown = chase_fx.analyze(traced).unknown
    print(f"without the rule: {unknown[0].op} at {unknown[0].source}: {unknown[0].reason}")

    rules = chase_fx.DEFAULT_RULES.extend({torch.ops.chase_fx_example.scaled_tanh: scaled_tanh_rule})
    channels = chase_fx.analyze(traced, rules=rules)
    slim = chase_fx.rewrite(traced, channels.plan(channel_sparsity=0.5))
    print(f"with the rule: {slim.get_submodule('first')}, {tuple(slim.get_parameter('scale').shape)}")
    print(chase_fx.verify(traced, slim))


if __name__ == "__main__":
    main()
