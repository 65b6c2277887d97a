"""The ways to a small network that are compared: each gets a seed and a cost, and the same number of epochs.

All start from a ResNet-20 with random weights and end with a slim module. A rival is told whose cost it must have
(``like``). The cost is the number of multiplications and
additions of one forward, and it is measured: where a rival cannot have exactly the FLOPs of Chase, it has the next
higher number.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import chase_fx
from chase_fx import sparse
from chase_fx.data import Split
from chase_fx.demo.measure import count_flops
from chase_fx.demo.train import BATCH, Recipe, fit, make_optimizer
from chase_fx.graphs.channels import Group
from chase_fx.graphs.magnitude import Magnitude
from chase_fx.graphs.traced import TracedModule
from chase_fx.models import resnet20

__all__ = ["EXAMPLE", "Contest", "dense", "fine_tuned", "random_channels", "same_widths", "sparse_method", "uniform"]

EXAMPLE = torch.zeros(2, 1, 28, 28)
_QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Contest:
    """What is the same for all contestants of one comparison.

    Attributes:
        data: the training images.
        steps: optimizer steps, over all phases together.
        seed: of weights, masks and the order of images.
        max_lr: the highest learning rate of the one-cycle schedule.
    """

    data: Split
    steps: int
    seed: int
    max_lr: float = 0.2

    def network(self) -> TracedModule:
        """A traced ResNet-20 with the seed's weights."""
        torch.manual_seed(self.seed)
        return chase_fx.trace(resnet20(), EXAMPLE)

    def train(
        self, model: nn.Module, after_step: Callable[[], None] = lambda: None, *, optimizer: Any = None,
        share: float = 1.0, max_lr: float | None = None,
    ) -> None:  # fmt: skip
        """Train ``model`` for ``share`` of the steps."""
        # Not channels_last: oneDNN writes out of bounds in the backward pass of a strided 1x1 convolution with fewer
        # than 8 channels (16 with AVX-512) in that format, and narrow ResNets have those (uxlfoundation/oneDNN#6035).
        recipe = Recipe(round(share * self.steps), self.seed, max_lr or self.max_lr, torch.contiguous_format)
        fit(
            model, optimizer or make_optimizer(model), self.data, recipe, label="", console=_QUIET,
            after_step=lambda: after_step() or "",
        )  # fmt: skip


def dense(contest: Contest) -> TracedModule:
    """The network as it is."""
    model = contest.network()
    slim = chase_fx.rewrite(model, chase_fx.analyze(model).plan(0.0))  # only slim modules can be saved
    contest.train(slim)
    return slim


def sparse_method(
    contest: Contest, method: str, channel_sparsity: float, *, rescale: bool = False, recalibrate: bool = False,
    **options: Any,
) -> TracedModule:  # fmt: skip
    """A method of :mod:`chase_fx.sparse` with the channel rule and live shrink.

    With ``rescale``, each filter of the initial network is multiplied by the root of the inverse of its density, which
    keeps the variance of what it computes (Evci et al., arXiv 2010.03533). With ``recalibrate``, the running statistics
    of the slim module's norms are estimated again in the end.
    """
    model = contest.network()
    optimizer = make_optimizer(model)
    trainer = getattr(sparse, method)(
        model, optimizer, total_steps=contest.steps, channel_sparsity=channel_sparsity, live_shrink=True,
        seed=contest.seed, **options,
    )  # fmt: skip
    if rescale:
        _rescale(model, trainer.masks)
    contest.train(model, trainer.step, optimizer=optimizer)
    slim = trainer.finalize()
    assert isinstance(slim, TracedModule)
    if recalibrate:
        _recalibrate(slim, contest)
    return slim


def uniform(contest: Contest, like: TracedModule) -> TracedModule:
    """(a) Narrow from the start, the same share of every width, with the initial weights of such a network."""
    model = contest.network()
    slim = _narrow(model, like, _at_random(contest))
    _from_scratch(contest, slim)
    return slim


def same_widths(contest: Contest, like: TracedModule) -> TracedModule:
    """(d) The widths that ``like`` came to, from scratch: what training wide and choosing channels adds to them."""
    torch.manual_seed(contest.seed)
    _from_scratch(contest, like)
    return like


def random_channels(contest: Contest, like: TracedModule) -> TracedModule:
    """(b) The same widths, and the initial weights of channels of the dense network that are drawn at random."""
    slim = _narrow(contest.network(), like, _at_random(contest))
    contest.train(slim)
    return slim


def fine_tuned(contest: Contest, like: TracedModule, share: float = 0.5, max_lr: float = 0.1) -> TracedModule:
    """(c) Dense for a share of the steps, pruned by magnitude to the same widths, fine-tuned for the rest."""
    model = contest.network()
    contest.train(model, share=share)
    slim = _narrow(model, like, Magnitude(chase_fx.analyze(model)))
    contest.train(slim, share=1 - share, max_lr=max_lr)
    return slim


def _from_scratch(contest: Contest, slim: TracedModule) -> None:
    for part in slim.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    contest.train(slim)


@torch.no_grad()
def _rescale(model: TracedModule, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        density = mask.flatten(1).float().mean(1).clamp(min=1 / mask[0].numel())
        model.get_parameter(name).mul_(density.rsqrt().view(-1, *[1] * (mask.dim() - 1)))


@torch.no_grad()
def _recalibrate(model: nn.Module, contest: Contest, batches: int = 100) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
    order = torch.randperm(len(contest.data), generator=torch.Generator().manual_seed(contest.seed))
    model.train()
    for rows in order.split(BATCH)[:batches]:
        model(contest.data.images[rows])


def _at_random(contest: Contest) -> Callable[[Group], Tensor]:
    generator = torch.Generator().manual_seed(contest.seed)
    return lambda group: torch.rand(group.size, generator=generator)


def _narrow(model: TracedModule, like: TracedModule, score: Callable[[Group], Tensor]) -> TracedModule:
    """Without its lowest units, an even share of every group: with the fewest FLOPs that are not below ``like``'s."""
    channels, flops = chase_fx.analyze(model), count_flops(like.eval(), EXAMPLE[:1])
    # In the order in which they go; the last unit of a group never does.
    units = sorted(
        ((rank + 1) / group.size, group.name, int(unit))
        for group in channels.groups
        for rank, unit in enumerate(score(group).argsort(stable=True)[:-1])
    )

    def without(count: int) -> TracedModule:
        kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in channels.groups}
        for _, name, unit in units[:count]:
            kept[name][unit] = False
        return chase_fx.rewrite(model, channels.plan_keeping(kept))

    fewer = bisect.bisect_right(
        range(len(units) + 1), -flops, key=lambda count: -count_flops(without(count).eval(), EXAMPLE[:1])
    )
    return without(fewer - 1)
