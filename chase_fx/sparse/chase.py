"""Chase: dynamic sparse training that removes channels, step by step, in one run."""

from __future__ import annotations

from typing import Unpack

from torch import nn
from torch.optim import Optimizer

from chase_fx.sparse.check import check_count, check_order, check_share
from chase_fx.sparse.distribution import Distribution, resolve
from chase_fx.sparse.drop import Drop
from chase_fx.sparse.grow import Grow
from chase_fx.sparse.options import Options
from chase_fx.sparse.recipe import DropAndGrow, Recipe
from chase_fx.sparse.schedule import Phases, Replace, SoftBound, interval_for
from chase_fx.sparse.score import gradient, magnitude
from chase_fx.sparse.trainer import SparseTrainer

__all__ = ["Chase"]


class Chase(SparseTrainer):
    """Channel-level sparsity learning (Yin et al., NeurIPS 2023, arXiv 2305.19454).

    ERK masks. Until ``explore_until``, every update drops by global magnitude to the budget d*N and grows by global
    |gradient| to ``N * (d + delta/2 * (1 + cos(pi t / T)))``; then, until ``stop``, a share of the budget that decays
    from 0.5 to 0.005 is dropped and grown back; then the topology is final. Meanwhile the channels with the lowest mean
    magnitude go, step by step.

    Args:
        module, optimizer, total_steps, sparsity, channel_sparsity, beta: see :class:`SparseTrainer`.
        delta: the surplus of the soft memory bound, a share of all masked weights.
        update_interval: steps between updates; ``None``: 1000, or total_steps / 50 in a shorter run.
        explore_until, stop: shares of the run at which exploration and the last update end.
        distribution: of the initial masks, "erk", "erk+", "uniform" or a function.
        common: the other options of :class:`SparseTrainer`.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> trainer = Chase(net, optimizer, total_steps=20, sparsity=0.75, channel_sparsity=0.0)
    >>> for _ in range(20):
    ...     net(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step(); trainer.step(); optimizer.zero_grad()
    >>> trainer.nnz, trainer.budget, sum(weight.numel() for weight in net.parameters() if weight.dim() > 1)
    (48, 48, 192)
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        channel_sparsity: float = 0.4, beta: float = 0.2, delta: float = 0.05, update_interval: int | None = None,
        explore_until: float = 0.75, stop: float = 0.95, distribution: str | Distribution = "erk",
        **common: Unpack[Options],
    ) -> None:  # fmt: skip
        check_count("total_steps", total_steps)
        check_share("sparsity", sparsity)
        check_share("delta", delta, closed=True)
        check_count("update_interval", update_interval)
        check_order("explore_until", explore_until, "stop", stop)
        density, interval = 1 - sparsity, update_interval or interval_for(total_steps, 1000, 50)
        explored, last = max(1, round(explore_until * total_steps)), round(stop * total_steps)
        schedule = Phases((
            (explored, SoftBound(density, delta, interval, explored)),
            (last, Replace(density, interval, explored, last, high=0.5, low=0.005)),
        ))  # fmt: skip
        update = DropAndGrow(Drop(magnitude, "global"), Grow(gradient, "global"))
        recipe = Recipe("Chase", "arXiv 2305.19454", density, schedule, update, resolve(distribution))
        super().__init__(
            module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, channel_sparsity=channel_sparsity,
            beta=beta, **common,
        )  # fmt: skip
