"""What removing a unit saves: parameters, or multiplications. A cost-aware ranking removes the least score per cost.

A cost is a function ``(units, alive) -> Tensor (size,)`` in float64: what each unit of the group costs as long as it is
there, given the channels left elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chase_fx.errors import ArgumentError
from chase_fx.sparse.alive import Alive
from chase_fx.sparse.unit_score import Units
from chase_fx.sparse.watch import Watch

__all__ = ["Flops", "UnitCost", "parameters", "resolve"]

UnitCost = Callable[[Units, Alive], Tensor]


def parameters(units: Units, alive: Alive) -> Tensor:
    """Entries left in all slices of the unit."""
    total = torch.zeros(units.group.size, dtype=torch.float64)
    for part in units.slices:
        total += part.entries(alive)
    return total


class Flops:
    """Multiplications: each entry of a contraction weight counts as often as the last forward pass used it.

    Weights that no module of type convolution or linear applies count once per entry.
    """

    def __init__(self) -> None:
        self.watch: Watch | None = None

    def __call__(self, units: Units, alive: Alive) -> Tensor:
        """One cost per unit."""
        uses = {} if self.watch is None else self.watch.uses
        if not uses:
            msg = (
                "channel_cost='flops' has seen no forward pass of a convolution or linear layer in this step: call the "
                "module in train mode between two trainer.step(), or use channel_cost='parameters'"
            )
            raise ArgumentError(msg)
        total = torch.zeros(units.group.size, dtype=torch.float64)
        for part in units.slices:
            total += part.entries(alive) * uses.get(part.name, 1.0)
        return total


def resolve(cost: str | UnitCost | None) -> UnitCost | None:
    """A cost by name ("parameters", "flops"), the function itself, or ``None``: scores are ranked as they are."""
    if cost is None or callable(cost):
        return cost
    if cost == "parameters":
        return parameters
    if cost == "flops":
        return Flops()
    msg = f"unknown channel_cost {cost!r}: expected 'parameters', 'flops', None or a function of (units, alive)"
    raise ArgumentError(msg)
