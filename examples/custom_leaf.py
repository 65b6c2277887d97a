"""Keep a module of your own whole in the graph: declare which of its attributes are sizes.

Without the declaration the module is inlined, which prunes it just as well; declare it if you want to find it in the
slim graph as what it is, with its hooks and its type.

Run: python examples/custom_leaf.py
"""

from __future__ import annotations

import torch
from torch import nn

import chase_fx


class CosineLinear(nn.Module):
    """A linear layer on normalised weights."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_features) -> (N, out_features)."""
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1))


SIZES = {CosineLinear: (("out_features", "weight", 0), ("in_features", "weight", 1))}


def main() -> None:
    """Prune a net of two such layers."""
    net = nn.Sequential(CosineLinear(8, 32), nn.ReLU(), CosineLinear(32, 4))
    traced = chase_fx.trace(net, torch.randn(2, 8), leaves=SIZES)
    print([node.target for node in traced.graph.nodes if node.op == "call_module"])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
    first = slim.get_submodule("0")
    print(f"{type(first).__name__}: {first.in_features} -> {first.out_features}")
    print(chase_fx.verify(traced, slim))


if __name__ == "__main__":
    main()
