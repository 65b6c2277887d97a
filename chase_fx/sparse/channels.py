"""The channel rule: when units are removed, how many, and what happens to their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chase_fx.errors import ArgumentError
from chase_fx.sparse.alive import Alive
from chase_fx.sparse.masks import SparseWeights
from chase_fx.sparse.ranking import ChannelCount, Ranking, choose, comparable
from chase_fx.sparse.schedule import cubic
from chase_fx.sparse.structure import GroupLike, MemberLike
from chase_fx.sparse.unit_cost import Flops, UnitCost
from chase_fx.sparse.unit_score import Activation, Slices, Units, UnitScore, umm
from chase_fx.sparse.watch import Watch

__all__ = ["ChannelRule", "ChannelState", "floor_of"]


def floor_of(size: int, channel_sparsity: float, beta: float) -> int:
    """Units that a group of ``size`` must keep: ``floor(size * (1 - S_c) * beta)``, at least one.

    >>> floor_of(64, 0.5, 0.2), floor_of(4, 0.9, 0.2)
    (6, 1)
    """
    return max(1, math.floor(size * (1 - channel_sparsity) * beta + 1e-9))


@dataclass(frozen=True)
class ChannelRule:
    """Remove the share ``S_c`` of all prunable channels along a cubic, an event every ``interval`` steps up to ``end``.

    Attributes:
        start: the step after which the first channels go.
        sparsity: S_c, the share of prunable channels removed in the end.
        beta: how much of its uniform share each group must keep.
        score: the unit score.
        round_to: groups give units so that the number left is a multiple of it.
        cost: what a unit saves; scores are divided by it.
        ranking: how scores of different groups compare.
    """

    sparsity: float
    interval: int
    end: int
    beta: float = 0.2
    score: UnitScore = umm
    round_to: int = 1
    cost: UnitCost | None = None
    ranking: Ranking = "global"
    start: int = 0

    def __str__(self) -> str:
        """What tells one rule from another, the same in every process."""
        names = [getattr(part, "__name__", None) or type(part).__name__ for part in (self.score, self.cost)]
        seed = getattr(self.score, "seed", None)
        return (
            f"{self.sparsity} every {self.interval} from {self.start} to {self.end}, beta {self.beta}, "
            f"round_to {self.round_to}, by {names[0]}{'' if seed is None else f'({seed})'} / {names[1]}, {self.ranking}"
        )

    def watch(self, module: nn.Module) -> Watch | None:
        """What records the forward passes of ``module`` for the score and the cost, if they need any."""
        watching = [part for part in (self.score, self.cost) if isinstance(part, (Activation, Flops))]
        if not watching or not self.sparsity:
            return None
        watch = Watch(module)
        for part in watching:
            part.watch = watch
        return watch

    def at(self, step: int) -> float | None:
        """The share removed after the event at ``step``, or ``None`` when there is no event.

        >>> rule = ChannelRule(0.5, interval=10, end=20)
        >>> rule.at(5), rule.at(10), rule.at(20), rule.at(30)
        (None, 0.4375, 0.5, None)
        """
        if not self.sparsity or not self.start < step <= self.end:
            return None
        if (step - self.start) % self.interval and step != self.end:
            return None
        return self.sparsity * cubic(step, self.start, self.end)


class ChannelState:
    """What is left of each group, and the history of removals.

    ``kept`` and ``history`` are in the numbering of the groups as they were when training began. After a live shrink
    the parameters have fewer indices than that; ``ids`` maps the units they still have to the first numbering.
    """

    def __init__(self, groups: Sequence[GroupLike], module: nn.Module, rule: ChannelRule) -> None:
        self.rule = rule
        self.first = tuple(groups)
        self.kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
        # A group of one unit can never lose it: it is no prunable channel and does not count in the share.
        self.count = ChannelCount.of([group for group in groups if group.size > 1])
        self.channels = self.count.total({group.name: group.size for group in groups})
        self.floors = {g.name: max(g.least, floor_of(g.size, rule.sparsity, rule.beta)) for g in groups}
        self.multiples = {g.name: math.lcm(rule.round_to, g.multiple) for g in groups}
        self.history: list[dict[str, Any]] = []
        self.shortfall = 0
        self.rebase(groups, module)

    def rebase(self, groups: Sequence[GroupLike], module: nn.Module) -> None:
        """Look the groups' parameters up; again after a live shrink, with the groups of what is left."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        canonical = {id(parameter): name for name, parameter in module.named_parameters()}
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        self.ids = {name: mask.nonzero().squeeze(1) for name, mask in self.kept.items()}
        self.units = tuple(
            Units(
                group,
                tuple(s for m in group.members if (s := _slices(m, parameters, canonical, buffers))),
                self.ids[group.name],
                len(self.kept[group.name]),
            )
            for group in groups
        )

    @property
    def left(self) -> dict[str, int]:
        """Units left per group."""
        return {name: int(mask.count_nonzero()) for name, mask in self.kept.items()}

    @property
    def removed(self) -> int:
        """Channels removed so far; a product axis counts its channels, not its units."""
        return self.channels - self.count.total(self.left)

    def event(self, step: int, share: float, weights: SparseWeights) -> bool:
        """Remove what the schedule wants removed at ``step``; whether anything was."""
        quota = round(share * self.channels) - self.removed
        ranked = [units for units in self.units if units.group.name in self._ranked]
        kept = {units.group.name: self.kept[units.group.name][units.ids] for units in ranked}
        scores = {
            units.group.name: comparable(
                self._score(units, weights),
                kept[units.group.name],
                units.first,
                self.rule.ranking,
                sum(part.producer for part in units.slices) or 1,
            )
            for units in ranked
        }
        gone = choose(scores, kept, self.floors, self.count, quota=quota, multiples=self.multiples)
        self.remove({name: self.ids[name][indices] for name, indices in gone.items()}, weights)
        if gone:
            self.history.append(
                {"step": step, "removed": {name: self.ids[name][i].tolist() for name, i in gone.items()}}
            )
        self.shortfall = max(0, round(share * self.channels) - self.removed)
        return bool(gone)

    @property
    def _ranked(self) -> set[str]:
        return {name for term in self.count.terms for name in term}

    def _score(self, units: Units, weights: SparseWeights) -> Tensor:
        scores = _one_per_unit("channel score", self.rule.score(units, weights.alive), units)
        if self.rule.cost is None:
            return scores
        costs = _one_per_unit("channel cost", self.rule.cost(units, weights.alive), units)
        # A unit that saves nothing goes last, which the division by the least positive number sees to.
        return scores / costs.clamp(min=torch.finfo(torch.float64).tiny)

    def shapes_keeping(self, kept: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of all groups, once all units but ``kept`` (in the first numbering) are cut off."""
        alive, shapes = Alive(), {}
        for units in self.units:
            gone = (~kept[units.group.name][units.ids]).nonzero().squeeze(1)
            for part in units.slices:
                alive.remove(part.name, part.parameter.shape, part.dim, part.positions[gone])
                shapes[part.name] = part.parameter.shape
        return {name: tuple(alive.counts(name, shape)) for name, shape in shapes.items()}

    def remove(self, gone: Mapping[str, Tensor], weights: SparseWeights) -> None:
        """Take units (in the first numbering) away: masks of every member follow, weights at the next ``apply``."""
        for units in self.units:
            name = units.group.name
            if name not in gone:
                continue
            self.kept[name][gone[name]] = False
            local = torch.isin(self.ids[name], gone[name]).nonzero().squeeze(1)
            for part in units.slices:
                weights.remove(part.name, part.parameter, part.dim, part.positions[local])
        weights.settle()


def _one_per_unit(what: str, values: Tensor, units: Units) -> Tensor:
    values = values.detach().double().cpu()
    if values.shape != (units.group.size,):
        msg = (
            f"the {what} gave shape {tuple(values.shape)} for group {units.group.name!r}; expected one number per "
            f"unit, ({units.group.size},)"
        )
        raise ArgumentError(msg)
    return values


def _slices(
    member: MemberLike, parameters: Mapping[str, nn.Parameter], canonical: Mapping[int, str], buffers: set[str]
) -> Slices | None:
    if member.tensor in buffers:
        return None
    if member.tensor not in parameters:
        msg = (
            f"the channel groups name {member.tensor!r}, which is no parameter or buffer of the module; analyse the "
            f"very module that is trained"
        )
        raise ArgumentError(msg)
    parameter = parameters[member.tensor]
    # Tied parameters are known by the first of their names, so that both names lead to the same masks.
    return Slices(canonical[id(parameter)], parameter, member.dim, member.positions.cpu(), member.producer)
