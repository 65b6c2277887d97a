"""Scores of units: a unit is everything that goes together, so all its producers are scored together.

A unit score is a function ``(unit, weights) -> Tensor (size,)`` in float64 on the CPU, one number per unit of the
group; removed first is what scores lowest. Entries of channels already removed count as not there. A function of the
caller's own serves as well as the names in :data:`UNIT_SCORES`, "activation" and "random".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from chase_fx.errors import ArgumentError
from chase_fx.sparse.alive import Alive
from chase_fx.sparse.optim import dense
from chase_fx.sparse.structure import GroupLike
from chase_fx.sparse.watch import Watch

__all__ = [
    "UNIT_SCORES", "Activation", "RandomOrder", "Slices", "UnitScore", "Units", "bn_scale", "gradient_flow",
    "magnitude", "resolve", "taylor", "umm",
]  # fmt: skip


@dataclass(frozen=True)
class Slices:
    """One parameter axis of a group: ``positions[i]`` (size, k) are the indices along ``dim`` of unit i."""

    name: str
    parameter: nn.Parameter
    dim: int
    positions: Tensor
    producer: bool

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum over each unit's slices of ``values`` (the parameter's shape): Tensor (size,), float64, on the CPU."""
        others = [dim for dim in range(values.dim()) if dim != self.dim]
        per_index = values.sum(others, dtype=torch.float64) if others else values.double()
        return per_index.cpu()[self.positions].sum(1)

    def entries(self, alive: Alive) -> Tensor:
        """Entries left in each unit's slices: Tensor (size,), float64."""
        shape = self.parameter.shape
        others = math.prod(count for dim, count in enumerate(alive.counts(self.name, shape)) if dim != self.dim)
        return alive.axis(self.name, shape, self.dim)[self.positions].sum(1, dtype=torch.float64) * others


@dataclass(frozen=True)
class Units:
    """A group with its parameters looked up.

    Attributes:
        group: the group as the analysis gave it.
        slices: its axes that are parameters (buffers are left to the rewrite).
        ids: LongTensor (size,): its units in the numbering of the group when training began.
        first: number of units then.
    """

    group: GroupLike
    slices: tuple[Slices, ...]
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    first: int = 0

    @property
    def producers(self) -> Sequence[Slices]:
        """Output axes of contraction weights; all axes where a group has none (an embedding feeding a norm)."""
        return [part for part in self.slices if part.producer] or self.slices

    @property
    def readers(self) -> Sequence[Slices]:
        """Axes of contraction weights along which the unit's channels are read; the producers where nothing reads.

        A depthwise filter hands a channel on to who reads it next, and counts only where nobody does.
        """
        inside = [part for part in self.slices if not part.producer and part.parameter.dim() > 1]
        contracting = [part for part in inside if part.dim != 0 or part.parameter.shape[1] != 1]
        return contracting or inside or self.producers


UnitScore = Callable[[Units, Alive], Tensor]


def umm(units: Units, alive: Alive) -> Tensor:
    """Unmasked mean magnitude: the mean of ``|w|`` over all entries of all producers of the unit, masked zeros counted.

    That is the unit's density times the mean magnitude of its active weights (Yin et al., arXiv 2305.19454, section
    3.2).
    """
    total = torch.zeros(units.group.size, dtype=torch.float64)
    entries = torch.zeros(units.group.size, dtype=torch.float64)
    for part in units.producers:
        total += part.per_unit(part.parameter.detach().abs())
        entries += part.entries(alive)
    return total / entries.clamp(min=1)


def magnitude(units: Units, alive: Alive) -> Tensor:
    """The root mean square of all entries of the unit, consumers included."""
    total = torch.zeros(units.group.size, dtype=torch.float64)
    entries = torch.zeros(units.group.size, dtype=torch.float64)
    for part in units.slices:
        total += part.per_unit(part.parameter.detach().square())
        entries += part.entries(alive)
    return (total / entries.clamp(min=1)).sqrt()


def taylor(units: Units, alive: Alive) -> Tensor:
    """``|sum of w * dL/dw|`` over the weights that read the unit: the first-order change of the loss.

    That sum is ``sum of x * dL/dx`` over the unit's channels ``x`` as they are read, what a gate of Molchanov et al.
    (arXiv 1906.10771) measures. The filters that produce the channels can't tell: behind a norm the loss does not
    depend on their scale, so that ``w * dL/dw`` sums up to zero.
    """
    del alive
    total = torch.zeros(units.group.size, dtype=torch.float64)
    for part in units.readers:
        if part.parameter.grad is not None:
            total += part.per_unit(_finite(part.parameter.detach() * dense(part.parameter.grad)))
    return total.abs()


def bn_scale(units: Units, alive: Alive) -> Tensor:
    """The mean ``|gamma|`` of the unit's norms ("Network slimming", arXiv 1708.06519); UMM without norms."""
    gammas = [part for part in units.slices if part.parameter.dim() == 1 and part.name.endswith("weight")]
    if not gammas:
        return umm(units, alive)
    parts = [part.per_unit(part.parameter.detach().abs()) / part.positions.shape[1] for part in gammas]
    return torch.stack(parts).mean(0)


def gradient_flow(units: Units, alive: Alive) -> Tensor:
    """The root mean square of ``dL/dw`` over the producers: how much the unit still learns.

    A gradient step of rate eta lowers the loss by ``eta * |g|^2``, of which this is the unit's part per entry (Evci et
    al., "Gradient flow in sparse neural networks", arXiv 2010.03533, section 3).
    """
    total = torch.zeros(units.group.size, dtype=torch.float64)
    entries = torch.zeros(units.group.size, dtype=torch.float64)
    for part in units.producers:
        entries += part.entries(alive)
        if part.parameter.grad is not None:
            total += part.per_unit(_finite(dense(part.parameter.grad).square()))
    return (total / entries.clamp(min=1)).sqrt()


def _finite(values: Tensor) -> Tensor:
    """A step that overflowed (GradScaler lets single ones) must not send channels away for good."""
    return values.nan_to_num(0, 0, 0)


class Activation:
    """The mean ``|x|`` of the unit's channels where convolutions and linear layers read them, in the last step.

    So nonlinearities and norms have done their work, and a channel that is silent scores 0 however large its weights
    are (as in Hu et al., "Network trimming", arXiv 1607.03250, with the mean in place of the share of zeros). Several
    consumers are averaged.
    """

    def __init__(self) -> None:
        self.watch: Watch | None = None

    def __call__(self, units: Units, alive: Alive) -> Tensor:
        """One mean per unit."""
        del alive
        watch = self.watch
        readers = [
            (part, watch.inputs[part.name] / watch.seen[part.name])
            for part in units.slices
            if watch is not None and part.name in watch.inputs and watch.input_dim(part.name) == part.dim
        ]
        if not readers:
            msg = (
                f"channel_score='activation' has seen nothing read the channels of group {units.group.name!r}: "
                f"expected a convolution or linear layer without groups that was called in train mode since the last "
                f"trainer.step(); use another channel_score where the group's consumers are of other kinds"
            )
            raise ArgumentError(msg)
        return torch.stack([means[part.positions].mean(1) for part, means in readers]).mean(0)


@dataclass(frozen=True)
class RandomOrder:
    """One random number per unit, fixed by the seed for the whole run: the base line of a random channel choice."""

    seed: int = 0

    def __call__(self, units: Units, alive: Alive) -> Tensor:
        """The units' numbers."""
        del alive
        # Fixed per unit rather than drawn at each event: the choice is then the same with and without live shrink.
        digest = hashlib.sha256(f"{self.seed} {units.group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(units.first, dtype=torch.float64, generator=generator)[units.ids]


UNIT_SCORES: dict[str, UnitScore] = {
    "umm": umm,
    "magnitude": magnitude,
    "taylor": taylor,
    "bn_scale": bn_scale,
    "gradient_flow": gradient_flow,
}


def resolve(score: str | UnitScore, seed: int = 0) -> UnitScore:
    """A unit score by name, or the function itself."""
    if callable(score):
        return score
    if score == "activation":
        return Activation()
    if score == "random":
        return RandomOrder(seed)
    if score not in UNIT_SCORES:
        known = sorted([*UNIT_SCORES, "activation", "random"])
        msg = f"unknown channel_score {score!r}: expected one of {known} or a function of (units, alive)"
        raise ArgumentError(msg)
    return UNIT_SCORES[score]
