"""The methods other than Chase, each a small declared combination of the pieces.

All share the signature ``Method(module, optimizer, *, total_steps, sparsity, **options)`` and the options of
:class:`~chase_fx.sparse.trainer.SparseTrainer`; the channel rule composes with every one of them: give
``channel_sparsity``. Published intervals are kept where the run is long enough, and shortened where it would have too
few updates otherwise.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn
from torch.optim import Optimizer

from chase_fx.sparse.check import check_count, check_order, check_share
from chase_fx.sparse.distribution import Distribution, resolve
from chase_fx.sparse.drop import Drop, Scope
from chase_fx.sparse.fan_in import ConstantFanIn
from chase_fx.sparse.grow import Grow
from chase_fx.sparse.options import Common
from chase_fx.sparse.recipe import DropAndGrow, Recipe
from chase_fx.sparse.schedule import Alternating, Elastic, Fixed, Gradual, OneShot, Replace, Targets, interval_for
from chase_fx.sparse.score import MagnitudePlusGradient, gradient, magnitude, random, saliency
from chase_fx.sparse.trainer import SparseTrainer

__all__ = ["ACDC", "GMP", "MEST", "SET", "SNIP", "GraNet", "RigL", "RigLITOP", "SRigL", "Static"]


class Static(SparseTrainer):
    """A fixed random mask, ERK or uniform; nothing grows, so removed channels take their weights along."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        distribution: str | Distribution = "erk", **common: Unpack[Common],
    ) -> None:  # fmt: skip
        recipe = Recipe("Static", "-", 1 - sparsity, Fixed(), DropAndGrow(), resolve(distribution))
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class GMP(SparseTrainer):
    """Gradual magnitude pruning from dense (Zhu and Gupta, arXiv 1710.01878).

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        update_interval: steps between drops; ``None``: 100, or total_steps / 50 in a shorter run.
        start, stop: shares of the run between which the density falls.
        scope: "global" ranks all layers together, "layer" takes the same share of each.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        update_interval: int | None = None, start: float = 0.0, stop: float = 0.75, scope: Scope = "global",
        **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        check_order("start", start, "stop", stop)
        schedule = Gradual(
            1.0, 1 - sparsity, update_interval or interval_for(total_steps, 100, 50),
            round(start * total_steps), max(1, round(stop * total_steps)),
        )  # fmt: skip
        recipe = Recipe("GMP", "arXiv 1710.01878", 1.0, schedule, DropAndGrow(Drop(magnitude, scope)))
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class SNIP(SparseTrainer):
    """One drop by ``|g * w|`` before training, global (Lee et al., arXiv 1810.02340).

    The drop needs the gradients of one batch: call ``loss.backward()`` before building the trainer. Without them it
    happens in the first ``step()``, that is after one dense optimizer step.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        **common: Unpack[Common],
    ) -> None:  # fmt: skip
        recipe = Recipe(
            "SNIP", "arXiv 1810.02340", 1.0, OneShot(1 - sparsity), DropAndGrow(Drop(saliency, "global")),
            at_start=Targets(1 - sparsity),
        )  # fmt: skip
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class SET(SparseTrainer):
    """Sparse evolutionary training: each layer drops its smallest weights and grows as many at random.

    Mocanu et al., Nature Communications 9, 2383 (2018).

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        update_interval: steps between updates; ``None``: 100, or total_steps / 50 in a shorter run.
        alpha: share of the weights replaced in the first update, decaying by a cosine.
        stop: share of the run after which the topology is final.
        distribution: of the initial masks.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        update_interval: int | None = None, alpha: float = 0.3, stop: float = 1.0,
        distribution: str | Distribution = "erk", **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        check_share("alpha", alpha, closed=True)
        check_share("stop", stop, closed=True)
        interval = update_interval or interval_for(total_steps, 100, 50)
        recipe = Recipe(
            "SET", "Nature Communications 9, 2383 (2018)", 1 - sparsity,
            Replace(1 - sparsity, interval, 0, round(stop * total_steps), alpha),
            DropAndGrow(Drop(magnitude, "layer"), Grow(random, "layer")), resolve(distribution),
        )  # fmt: skip
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class RigL(SparseTrainer):
    """SET that grows by dense gradients instead (Evci et al., arXiv 1911.11134); options as in SET.

    ``RigL(traced, optimizer, total_steps=1000, channel_sparsity=0.5)`` is RigL with the channel rule.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        update_interval: int | None = None, alpha: float = 0.3, stop: float = 0.75,
        distribution: str | Distribution = "erk", **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        check_share("alpha", alpha, closed=True)
        check_share("stop", stop, closed=True)
        interval = update_interval or interval_for(total_steps, 100, 50)
        recipe = Recipe(
            "RigL", "arXiv 1911.11134", 1 - sparsity,
            Replace(1 - sparsity, interval, 0, round(stop * total_steps), alpha),
            DropAndGrow(Drop(magnitude, "layer"), Grow(gradient, "layer")), resolve(distribution),
        )  # fmt: skip
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class RigLITOP(SparseTrainer):
    """RigL with rare, large updates, which explore more places in time (Liu et al., "ITOP", arXiv 2102.02887).

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        update_interval: steps between updates; ``None``: 4000, or total_steps / 20 in a shorter run.
        alpha, alpha_end: share of the weights replaced, from the first to the last update.
        distribution: of the initial masks.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        update_interval: int | None = None, alpha: float = 0.5, alpha_end: float = 0.005,
        distribution: str | Distribution = "erk", **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        check_share("alpha", alpha, closed=True)
        check_share("alpha_end", alpha_end, closed=True)
        interval = update_interval or interval_for(total_steps, 4000, 20)
        recipe = Recipe(
            "RigL-ITOP", "arXiv 2102.02887", 1 - sparsity,
            Replace(1 - sparsity, interval, 0, total_steps, alpha, alpha_end),
            DropAndGrow(Drop(magnitude, "layer"), Grow(gradient, "layer")), resolve(distribution),
        )  # fmt: skip
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)
        self._weights.explored = [mask.clone() for mask in self._weights.masks]

    @property
    def coverage(self) -> float:
        """R_s: the share of all masked weights, removed ones included, that were ever active."""
        weights = self._weights
        explored = sum(int(mask.count_nonzero()) for mask in weights.explored or ())
        return (explored + weights.explored_gone) / weights.size


class GraNet(SparseTrainer):
    """Gradual pruning with zero-cost regrowth: a global drop to a cubic d(t), then RigL's step (arXiv 2106.10404).

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        initial_density: of the ERK masks at the start, 0.5 or 1 in the paper.
        update_interval: steps between updates; ``None``: 1000, or total_steps / 50 in a shorter run.
        alpha: share of the weights replaced in each layer at first, decaying by a cosine.
        start, stop: shares of the run between which the density falls.
        distribution: of the initial masks.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9,
        initial_density: float = 0.5, update_interval: int | None = None, alpha: float = 0.5, start: float = 0.0,
        stop: float = 0.75, distribution: str | Distribution = "erk", **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        check_order("start", start, "stop", stop)
        check_share("alpha", alpha, closed=True)
        check_share("initial_density", initial_density, closed=True)
        first = max(initial_density, 1 - sparsity)
        schedule = Gradual(
            first, 1 - sparsity, update_interval or interval_for(total_steps, 1000, 50),
            round(start * total_steps), max(1, round(stop * total_steps)), alpha,
        )  # fmt: skip
        update = DropAndGrow(Drop(magnitude, "layer"), Grow(gradient, "layer"))
        recipe = Recipe("GraNet", "arXiv 2106.10404", first, schedule, update, resolve(distribution))
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class MEST(SparseTrainer):
    """Memory-economic sparse training with elastic mutation (Yuan et al., arXiv 2110.14032).

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        soft: False is EM, which drops below the budget and grows back; True is EM&S, which grows beyond and drops back.
        update_interval: steps between updates; ``None``: 1000, or total_steps / 50 in a shorter run.
        rates: (share of the mutating part of the run, share of the weights) pairs, the share shrinking in steps.
        stop: share of the run after which the topology is final.
        gradient_rate: lambda in ``|w| + lambda * |g|``.
        distribution: of the initial masks.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9, soft: bool = False,
        update_interval: int | None = None,
        rates: tuple[tuple[float, float], ...] = ((0.5, 0.3), (0.8, 0.15), (1.0, 0.05)),
        stop: float = 0.9, gradient_rate: float = 0.01, distribution: str | Distribution = "erk",
        **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        check_share("stop", stop, closed=True)
        for until, rate in rates:
            check_share("rates", until, closed=True)
            check_share("rates", rate, closed=True)
        interval, end = update_interval or interval_for(total_steps, 1000, 50), max(1, round(stop * total_steps))
        recipe = Recipe(
            "MEST (EM&S)" if soft else "MEST (EM)", "arXiv 2110.14032", 1 - sparsity,
            Elastic(1 - sparsity, interval, end, tuple(rates), soft),
            DropAndGrow(Drop(MagnitudePlusGradient(gradient_rate), "layer"), Grow(random, "layer")),
            resolve(distribution),
        )  # fmt: skip
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)


class SRigL(SparseTrainer):
    """Structured RigL: constant fan-in with neuron ablation (Lasby et al., arXiv 2305.02299).

    ``budget`` is the largest number of weights with a constant fan-in that is not above ``(1 - sparsity) * N``; at
    least one weight per neuron is drawn at the start.

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        gamma: a neuron with fewer than ``max(1, gamma * fan_in)`` salient weights is ablated: .3 for CNNs, .95 for
            ViTs.
        update_interval: steps between updates; ``None``: 100, or total_steps / 50 in a shorter run.
        alpha: share of the weights replaced in the first update, decaying by a cosine.
        stop: share of the run after which the topology is final.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9, gamma: float = 0.3,
        update_interval: int | None = None, alpha: float = 0.3, stop: float = 0.75, **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("update_interval", update_interval)
        for name, value in (("alpha", alpha), ("stop", stop), ("gamma", gamma)):
            check_share(name, value, closed=True)
        interval = update_interval or interval_for(total_steps, 100, 50)
        schedule = Replace(1 - sparsity, interval, 0, round(stop * total_steps), alpha)
        recipe = Recipe("SRigL", "arXiv 2305.02299", 1 - sparsity, schedule, ConstantFanIn(gamma))
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)

    @property
    def fan_in(self) -> dict[str, int]:
        """Per masked weight the number of weights of each active neuron."""
        widths = {name: mask.flatten(1).sum(1) for name, mask in self.masks.items()}
        return {name: int(width.max()) for name, width in widths.items()}


class ACDC(SparseTrainer):
    """Alternating compressed and decompressed training (Peste et al., "AC/DC", arXiv 2106.12379).

    Dense, then in turn sparse by global magnitude and dense again, where pruned weights restart from zero.

    Args:
        module, optimizer, total_steps, sparsity: see :class:`SparseTrainer`.
        phases: dense and sparse phases between ``warmup`` and ``stop``; the last phase, sparse, begins at ``stop``.
        warmup, stop: shares of the run.
        common: the other options of :class:`SparseTrainer`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, total_steps: int, sparsity: float = 0.9, phases: int = 12,
        warmup: float = 0.1, stop: float = 0.75, **common: Unpack[Common],
    ) -> None:  # fmt: skip
        check_count("phases", phases)
        check_order("warmup", warmup, "stop", stop)
        first, last = max(1, round(warmup * total_steps)), max(1, round(stop * total_steps))
        schedule = Alternating(1 - sparsity, max(1, (last - first) // phases), first, last)
        update = DropAndGrow(Drop(magnitude, "global"), Grow(gradient, "global"))
        recipe = Recipe("AC/DC", "arXiv 2106.12379", 1.0, schedule, update)
        super().__init__(module, optimizer, recipe, total_steps=total_steps, sparsity=sparsity, **common)
