"""Which runs there are: who takes part, at which sparsity, with which seed, and whose cost each one has to match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.accuracy import contestants
from chase_fx.graphs.traced import TracedModule

__all__ = [
    "CHASE",
    "OTHER_METHODS",
    "REFILLED",
    "RIVALS",
    "SEEDS",
    "SPARSITIES",
    "VARIANTS",
    "VARIANTS_AT",
    "Run",
    "all_runs",
]

SEEDS = (0, 1, 2)
SPARSITIES = (0.5, 0.7, 0.85)
RIVALS: Mapping[str, Callable[..., TracedModule]] = {
    "uniform": contestants.uniform,
    "random": contestants.random_channels,
    "fine-tuned": contestants.fine_tuned,
    "same widths": contestants.same_widths,
}
OTHER_METHODS = ("Static", "GMP", "SNIP", "SET", "RigL", "RigLITOP", "GraNet", "MEST", "SRigL", "ACDC")

CHASE: Mapping[str, Any] = {"sparsity": 0.9, "channel_ranking": "coupled"}
REFILLED: Mapping[str, Any] = {"sparsity": 0.3, "refill": 1.0, "channel_ranking": "coupled"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sparsity 0": {**REFILLED, "sparsity": 0.0},
    "group ranking": {**REFILLED, "channel_ranking": "group"},
    "score: taylor, global ranking per FLOP": {
        **REFILLED, "channel_score": "taylor", "channel_ranking": "global", "channel_cost": "flops", "beta": 0.6,
    },
    "sparsity 0.6": {**REFILLED, "sparsity": 0.6},
    "sparsity 0.9": {**REFILLED, "sparsity": 0.9},
    "sparsity 0.9, initial weights rescaled": {**REFILLED, "sparsity": 0.9, "rescale": True},
    "group ranking, sparsity 0": {**REFILLED, "channel_ranking": "group", "sparsity": 0.0},
    "normalised ranking": {**REFILLED, "channel_ranking": "normalised"},
    "global ranking": {**REFILLED, "channel_ranking": "global"},
    "global ranking per FLOP": {**REFILLED, "channel_ranking": "global", "channel_cost": "flops"},
    "channels until 0.3": {**REFILLED, "channels_until": 0.3},
    "channels until 0.7": {**REFILLED, "channels_until": 0.7},
    "events three times as often": {**REFILLED, "channel_interval": 10},
    "score: magnitude": {**REFILLED, "channel_score": "magnitude"},
    "score: taylor": {**REFILLED, "channel_score": "taylor"},
    "score: bn_scale": {**REFILLED, "channel_score": "bn_scale"},
    "score: activation": {**REFILLED, "channel_score": "activation"},
    "score: random": {**REFILLED, "channel_score": "random"},
    "statistics of norms estimated again": {**REFILLED, "recalibrate": True},
}  # fmt: skip
VARIANTS_AT = {0.7: tuple(VARIANTS), 0.85: tuple(VARIANTS)[:3]}
_OTHERS_AT = 0.7


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of the run, unique; its files are called so.
        table: where it is shown: "main", "others" or "variants".
        contestant: the row of the table that it belongs to.
        channel_sparsity: at which it takes part; 0 for the dense network.
        seed: of weights, masks and the order of images.
        method: of :mod:`chase_fx.sparse`, or ``None`` for the dense network and the rivals.
        options: of the method.
        cost_of: the run whose slim module says what this one may cost.
    """

    name: str
    table: str
    contestant: str
    channel_sparsity: float
    seed: int
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cost_of: str | None = None

    def train(self, contest: contestants.Contest, like: TracedModule | None) -> TracedModule:
        """The slim module that this run comes to; ``like`` is that of ``cost_of``."""
        if self.method is not None:
            return contestants.sparse_method(contest, self.method, self.channel_sparsity, **self.options)
        if self.cost_of is None:
            return contestants.dense(contest)
        return RIVALS[self.contestant](contest, like)


def all_runs() -> list[Run]:
    """Every run of the benchmark, each after the one whose cost it needs; what matters most comes first."""
    runs = []
    for seed in SEEDS:
        runs.append(Run(f"dense-s{seed}", "main", "dense", 0.0, seed))
        for sparsity in sorted(SPARSITIES, reverse=True):
            at = f"{100 * sparsity:.0f}-s{seed}"
            first = Run(f"refill-{at}", "main", "Chase + refill", sparsity, seed, "Chase", REFILLED)
            runs += [first, Run(f"chase-{at}", "main", "Chase", sparsity, seed, "Chase", CHASE)]
            runs += [Run(f"{name}-{at}", "main", name, sparsity, seed, cost_of=first.name) for name in RIVALS]
    at = f"{100 * _OTHERS_AT:.0f}-s0"
    runs += [Run(f"{name}-{at}", "others", name, _OTHERS_AT, 0, name, CHASE) for name in OTHER_METHODS]
    for sparsity, names in VARIANTS_AT.items():
        for name in names:
            options, number = VARIANTS[name], tuple(VARIANTS).index(name)
            run = Run(
                f"variant{number}-{100 * sparsity:.0f}-s0", "variants", name, sparsity, 0, "Chase", options
            )  # fmt: skip
            runs.append(run)
            if options["channel_ranking"] != REFILLED["channel_ranking"]:  # then widths and cost are its own
                runs.append(Run(f"uniform-{run.name}", "variants", "uniform", sparsity, 0, cost_of=run.name))
    return runs
