"""Scores of units: a unit is everything that goes together, so all its producers are scored together.

A unit score is a function ``(unit, weights) -> Tensor (size,)`` in float64 on the CPU, one number per unit of the
group; removed first is what scores lowest. Entries of channels already removed count as not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chase_fx.errors import ArgumentError
from chase_fx.sparse.alive import Alive
from chase_fx.sparse.structure import GroupLike

__all__ = ["UNIT_SCORES", "Slices", "UnitScore", "Units", "bn_scale", "magnitude", "resolve", "taylor", "umm"]


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
    """

    group: GroupLike
    slices: tuple[Slices, ...]

    @property
    def producers(self) -> Sequence[Slices]:
        """Output axes of contraction weights; all axes where a group has none (an embedding feeding a norm)."""
        return [part for part in self.slices if part.producer] or self.slices


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
    """``|sum of w * dL/dw|`` over the producers: the first-order change of the loss (arXiv 1906.10771)."""
    del alive
    total = torch.zeros(units.group.size, dtype=torch.float64)
    for part in units.producers:
        if part.parameter.grad is not None:
            total += part.per_unit(part.parameter.detach() * part.parameter.grad)
    return total.abs()


def bn_scale(units: Units, alive: Alive) -> Tensor:
    """The mean ``|gamma|`` of the unit's norms ("Network slimming", arXiv 1708.06519); UMM without norms."""
    gammas = [part for part in units.slices if part.parameter.dim() == 1 and part.name.endswith("weight")]
    if not gammas:
        return umm(units, alive)
    parts = [part.per_unit(part.parameter.detach().abs()) / part.positions.shape[1] for part in gammas]
    return torch.stack(parts).mean(0)


UNIT_SCORES: dict[str, UnitScore] = {"umm": umm, "magnitude": magnitude, "taylor": taylor, "bn_scale": bn_scale}


def resolve(score: str | UnitScore) -> UnitScore:
    """A unit score by name, or the function itself."""
    if callable(score):
        return score
    if score not in UNIT_SCORES:
        msg = f"unknown channel_score {score!r}: expected one of {sorted(UNIT_SCORES)} or a function of (units, alive)"
        raise ArgumentError(msg)
    return UNIT_SCORES[score]
