"""Prune a torchvision classifier, look at the plan, and check the result: ``python examples/prune_torchvision.py``.

Takes a model's name and a channel sparsity: ``python examples/prune_torchvision.py mobilenet_v2 0.3``.
"""

from __future__ import annotations

import sys

import torch
from torchvision import models

import chase_fx


def main(name: str = "resnet50", channel_sparsity: str = "0.5") -> None:
    """Prune ``name`` step by step, where ``chase_fx.prune`` would do all of it in one call."""
    model = models.get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 224, 224)

    traced = chase_fx.trace(model, (x,))
    channels = chase_fx.analyze(traced)
    print(f"{len(channels.groups)} groups of channels, {len(channels.frozen)} frozen axes")

    plan = channels.plan(channel_sparsity=float(channel_sparsity), round_to=8)
    print(plan.explain())

    slim = chase_fx.rewrite(traced, plan)
    chase_fx.verify(traced, slim)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (traced, slim))
    print(f"verified: {before:,} -> {after:,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
