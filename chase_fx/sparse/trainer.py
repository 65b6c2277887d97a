"""The engine: one stateful object that turns a dense training loop into a sparse one.

Every method is this class with another :class:`~chase_fx.sparse.recipe.Recipe`; see :mod:`chase_fx.sparse.methods`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from chase_fx.errors import ArgumentError, NothingToPruneError
from chase_fx.sparse import distributed
from chase_fx.sparse import distribution as distributions
from chase_fx.sparse.channels import ChannelRule, ChannelState
from chase_fx.sparse.check import check_choice, check_count, check_order, check_share
from chase_fx.sparse.checkpoint import Stateful, save_run
from chase_fx.sparse.empty_rows import require_empty_rows
from chase_fx.sparse.masks import Choice, SparseWeights, maskable
from chase_fx.sparse.optim import require_held, require_optimizer, require_sliceable
from chase_fx.sparse.ranking import RANKINGS, Ranking
from chase_fx.sparse.recipe import Counts, Recipe
from chase_fx.sparse.restore import Restore
from chase_fx.sparse.schedule import Refill, Targets, interval_for
from chase_fx.sparse.shrink import shrink_in_place
from chase_fx.sparse.state import RunState
from chase_fx.sparse.structure import ChannelsLike, Rewrite, Shrinker, provided
from chase_fx.sparse.tools import Tools
from chase_fx.sparse.unit_cost import UnitCost
from chase_fx.sparse.unit_cost import resolve as resolve_cost
from chase_fx.sparse.unit_score import UnitScore
from chase_fx.sparse.unit_score import resolve as resolve_score

__all__ = ["SparseTrainer"]


class SparseTrainer:
    """Keeps a module sparse while it trains, and removes channels on the way.

    The loop is ``loss.backward(); optimizer.step(); trainer.step(); optimizer.zero_grad()``: the gradients must still
    be there in ``trainer.step()``, where they serve as the dense gradients of update steps. Build the trainer before
    any state is loaded: it draws its first masks, and zeroes the weights outside, at once.

    With several processes, build it alike on each. Give it the DistributedDataParallel wrapper, which live shrink then
    rebuilds in place; a module without one must have its gradients averaged by the caller before ``optimizer.step()``.

    Args:
        module: what is trained; any module where no channels go, else a traced one (or give ``channels`` and
            ``rewrite``). It may be wrapped in DistributedDataParallel or ``torch.compile``.
        optimizer: holds the module's parameters; any optimizer, its state is recognised by shape.
        recipe: the method.
        total_steps: length of the run in optimizer steps; all schedules are stretched over it.
        sparsity: share of the masked weights that is zero at the end, in [0, 1).
        channel_sparsity: share of the prunable channels removed at the end, in [0, 1).
        beta: every group keeps ``floor(size * (1 - channel_sparsity) * beta)`` units, at least one.
        channel_interval: steps between channel events; ``None``: 1000, or total_steps / 25 in a shorter run.
        channels_from: share of the run before the first channel goes: scores mean little in a network that has hardly
            been trained, and the cubic takes most channels early.
        channels_until: share of the run after which the channel set is final; ``None``: 0.8, or 0.5 with ``refill``.
        channel_score: name or function, see :mod:`chase_fx.sparse.unit_score`.
        channel_cost: "parameters" or "flops" ranks by score per parameter or multiplication saved; or a function, see
            :mod:`chase_fx.sparse.unit_cost`.
        channel_ranking: "global" compares the scores of all groups, "normalised" relative to their group's mean,
            "group" takes the same share of each group, "coupled" less of a group that several layers write to.
        round_to: groups keep multiples of this many units where they start with one.
        live_shrink: cut removed channels off during training, not only at the end.
        refill: share of the empty places in the kept channels that is filled up again once the channel set is final.
        seed: of the trainer's own random generator; the global one is neither read nor changed.
        channels: the channel groups; ``None``: those of the traced module.
        rewrite, shrink: cut a module to a plan, and in place; ``None``: those of the traced module.
        parameters: names of, or a predicate for, the weights to mask; ``None``: see
            :func:`~chase_fx.sparse.masks.maskable`.
        embeddings: whether embedding tables are masked by default.

    Raises:
        ArgumentError: a value that no run could honour.
        NothingToPruneError: no weights to mask, or channels to remove but none that can go.
        OptimizerMismatchError: the optimizer does not hold the module's weights.
        RanksDisagreeError: the processes of the run were built differently.
    """

    restore = Restore()

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        recipe: Recipe,
        *,
        total_steps: int,
        sparsity: float = 0.9,
        channel_sparsity: float = 0.0,
        beta: float = 0.2,
        channel_interval: int | None = None,
        channels_from: float = 0.0,
        channels_until: float | None = None,
        channel_score: str | UnitScore = "umm",
        channel_cost: str | UnitCost | None = None,
        channel_ranking: Ranking = "global",
        round_to: int = 1,
        live_shrink: bool = False,
        refill: float = 0.0,
        seed: int = 0,
        channels: ChannelsLike | None = None,
        rewrite: Rewrite | None = None,
        shrink: Shrinker | None = None,
        parameters: Choice = None,
        embeddings: bool = True,
    ) -> None:
        check_share("sparsity", sparsity)
        check_share("channel_sparsity", channel_sparsity)
        check_share("beta", beta, closed=True)
        check_share("refill", refill, closed=True)
        check_count("total_steps", total_steps)
        check_count("round_to", round_to)
        check_count("channel_interval", channel_interval)
        check_choice("channel_ranking", channel_ranking, RANKINGS)
        until = channels_until if channels_until is not None else (0.5 if refill else 0.8)
        check_order("channels_from", channels_from, "channels_until", until)
        require_optimizer(optimizer)
        module, ddp = distributed.unwrap(module)
        distributed.refuse_sharded(module)
        self._wrappers = [ddp] if ddp is not None else []
        self.module, self.optimizer, self.recipe = module, optimizer, recipe
        self.total_steps, self.sparsity, self.channel_sparsity = total_steps, sparsity, channel_sparsity
        self._weights = SparseWeights(maskable(module, parameters, embeddings=embeddings), optimizer)
        require_held(optimizer, zip(self._weights.names, self._weights.parameters, strict=True))
        tools = Tools.find(module, channels, rewrite, shrink, removes=bool(channel_sparsity), live_shrink=live_shrink)
        self.channels, self._rewrite, self._shrink = tools.channels, tools.rewrite, tools.shrink
        rule = ChannelRule(
            channel_sparsity,
            interval=channel_interval or interval_for(total_steps, 1000, 25),
            start=min(round(channels_from * total_steps), max(1, round(until * total_steps)) - 1),
            end=max(1, round(until * total_steps)),
            beta=beta,
            score=resolve_score(channel_score, seed),
            round_to=round_to,
            cost=resolve_cost(channel_cost),
            ranking=channel_ranking,
        )
        self._channels = ChannelState(self._groups(), module, rule)
        self._touched = {
            p.name: p.parameter for units in self._channels.units for p in units.slices if p.parameter.requires_grad
        }
        require_held(optimizer, self._touched.items())
        require_empty_rows(module, self._weights.names, () if live_shrink else self._touched)
        if channel_sparsity and not self._channels.channels:
            msg = (
                f"channel_sparsity={channel_sparsity}, but {type(module).__name__} has no channel that could go: found "
                f"{len(self._channels.first)} groups, none with more than one unit; see channels.frozen for the reasons"
            )
            raise NothingToPruneError(msg)
        self._live_shrink = live_shrink and bool(channel_sparsity)
        self._followers: list[nn.Module] = []
        self._watch = rule.watch(module)
        self._schedule = recipe.schedule
        if refill:
            start = rule.end if channel_sparsity else max(1, total_steps // 2)
            interval = interval_for(total_steps, 1000, 50)
            self._schedule = Refill(
                recipe.schedule, 1 - sparsity, refill, interval, start, max(start, round(0.9 * total_steps))
            )
        self._run = RunState(
            {
                "method": recipe.name,
                "total_steps": total_steps,
                "sparsity": sparsity,
                "channel_sparsity": channel_sparsity,
                "live_shrink": self._live_shrink,
                "size": self._weights.size,
                "schedule": repr(self._schedule),
                "channel_rule": str(rule) if channel_sparsity else "none",
            },
            self._weights,
            self._channels,
            torch.Generator().manual_seed(seed),
            self._cut if self._live_shrink else None,
        )
        self._draw()

    def _groups(self) -> Any:
        return self.channels.groups if self.channels is not None and self.channel_sparsity else ()

    @torch.no_grad()
    def _draw(self) -> None:
        """The initial masks, and the update that the recipe wants before the first step."""
        weights, recipe, generator = self._weights, self.recipe, self._run.generator
        shapes = [list(parameter.shape) for parameter in self.module.parameters()]
        slopes = weights.has_gradients if recipe.at_start is not None else None
        distributed.agree("settings or modules", (), dict(self._run.identity), weights.names, shapes, slopes)
        state = generator.get_state()
        distributed.broadcast([state])
        generator.set_state(state)
        sizes = weights.capacities()
        budget = distributions.dense_count(sizes, recipe.density)
        counts = recipe.update.start(weights.shapes, recipe.distribution(weights.shapes, budget))
        for mask, count in zip(weights.masks, counts, strict=True):
            if count < mask.numel():
                mask.copy_(recipe.update.draw(mask.shape, count, generator))
        distributed.broadcast(weights.masks)
        self._run.budget = weights.nnz
        weights.apply()
        if recipe.at_start is not None and weights.has_gradients:
            self._average_gradients()
            self._update(recipe.at_start)
        self._arm()

    @torch.no_grad()
    def step(self) -> None:
        """Do what is due after one optimizer step: mask, and on update steps remove channels, drop and grow."""
        self._run.step += 1
        step, weights = self._run.step, self._weights
        if self._live_shrink and step == 1:  # the optimizer has its state from now on
            require_sliceable(self.optimizer, self._touched.items())
        weights.apply()
        targets, share = self._schedule.at(step), self._channels.rule.at(step)
        if targets is None and share is None:
            self._arm()
            return
        self._average_gradients()
        if share is not None and self._watch is not None:
            self._watch.collect()
        removed = share is not None and self._channels.event(step, share, weights)
        if removed:
            weights.apply()
            if self._live_shrink:
                self._cut()
        if targets is not None:
            self._update(targets)
        elif removed:
            self._update(Targets(self._run.budget / weights.size))
        self._agree()
        self._arm()

    def _arm(self) -> None:
        """Record the forward passes of the next step where its channel event needs them."""
        if self._watch is not None:
            self._watch.arm(self._channels.rule.at(self._run.step + 1) is not None)

    def _average_gradients(self) -> None:
        if not self._wrappers:  # DDP has averaged them
            distributed.average_gradients([p for p in self.module.parameters() if p.requires_grad])

    def _agree(self) -> None:
        run, tensors = self._run, [*self._weights.masks, *self._channels.kept.values()]
        distributed.agree(f"masks at step {run.step}", [*tensors, run.generator.get_state()], run.step, run.budget)

    def _cut(self) -> None:
        assert self._shrink is not None, "live shrink without a shrinker is refused when the trainer is built"
        shrink_in_place(self.module, self._weights, self._channels, self._shrink, self._followers)
        for wrapper in self._wrappers:
            distributed.rebuild(wrapper)

    def follow(self, other: nn.Module) -> None:
        """Let live shrink take ``other`` along.

        Args:
            other: an AveragedModel or any copy with the same parameter names, which is cut alike; or a
                DistributedDataParallel around the module that the trainer was built on, which is rebuilt in place.

        Raises:
            ArgumentError: a wrapper around another module.
        """
        if not isinstance(other, DistributedDataParallel):
            self._followers.append(other.module if isinstance(other, AveragedModel) else other)
        elif other.module is self.module:
            self._wrappers.append(other)
        else:
            msg = (
                f"follow() was given a DistributedDataParallel around another {type(other.module).__name__} than the "
                f"one that is trained; wrap trainer.module"
            )
            raise ArgumentError(msg)

    def _update(self, targets: Targets) -> None:
        weights = self._weights
        counts = Counts.of(targets, weights.size, weights.capacity())
        self._run.budget = self.recipe.update(weights, counts, targets.fill > 0, self._run.generator)
        weights.note_coverage()

    def finalize(self) -> nn.Module:
        """The trained module without its removed channels, for ``torch.compile``; weights outside the masks are zero.

        Returns:
            ``rewrite(module, channels.plan_keeping(kept))`` where the module is traced or ``rewrite`` was given: a slim
            copy. The module itself where nothing can cut it, or where live shrink has cut it already.
        """
        self._weights.apply()
        self.release()
        if self._rewrite is None or self._live_shrink:
            return self.module
        channels = self.channels
        if channels is None and (provider := provided(self.module)) is not None:
            channels = provider.analyze(self.module)
        if channels is None:
            return self.module
        return self._rewrite(self.module, channels.plan_keeping(dict(self._channels.kept)))

    def release(self) -> None:
        """Take the trainer's hooks off the module."""
        if self._watch is not None:
            self._watch.remove()

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Per masked weight a BoolTensor of its shape, True where it is active."""
        return MappingProxyType(dict(zip(self._weights.names, self._weights.masks, strict=True)))

    @property
    def nnz(self) -> int:
        """Active weights, counted now."""
        return self._weights.nnz

    @property
    def budget(self) -> int:
        """What ``nnz`` must equal right now: the aim of the latest update, or all places left where they are fewer."""
        return self._run.budget

    @property
    def channels_left(self) -> Mapping[str, int]:
        """Units left per group."""
        return MappingProxyType(self._channels.left)

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """Per group a BoolTensor (size,) of the units left, in the numbering of the groups when training began."""
        return MappingProxyType(self._channels.kept)

    @property
    def channel_history(self) -> list[dict[str, Any]]:
        """Every channel event that removed something: its step and the units removed per group."""
        return list(self._channels.history)

    @property
    def channel_shortfall(self) -> int:
        """Channels that the latest event should have removed and could not, because of floors or rounding."""
        return self._channels.shortfall

    @property
    def steps_done(self) -> int:
        """Calls of :meth:`step` so far."""
        return self._run.step

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on beside module and optimizer: tensors, numbers and strings.

        To resume bit-exactly: build module, optimizer and trainer as before, then load this state, the module's and the
        optimizer's, in this order.
        """
        return self._run.pack()

    def check_state(self, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Whether :meth:`load_state_dict` would take ``state``; the shapes of the parameters that it would cut.

        Raises:
            CheckpointError: the state belongs to another method, module or budget.
        """
        return self._run.check(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            CheckpointError: the state belongs to another method, module or budget.
            RanksDisagreeError: the processes of the run load different states.
        """
        self._run.unpack(state)
        self._agree()
        self._arm()

    def save(self, path: str | os.PathLike[str], **others: Stateful) -> None:
        """Write a checkpoint of the whole run: module, optimizer, masks, schedule, channel history, random generators.

        One safetensors file with JSON in its header, written all or nothing; the file that was at ``path`` becomes
        ``<path>.previous``. With several processes call it on every rank: rank 0 writes, all wait. Save after
        :meth:`step` and ``scheduler.step()``; gradients are not stored.

        Args:
            path: the file.
            others: what else the run needs, by names of your choice: ``scheduler=``, ``scaler=``, ``average=``... Any
                object with ``state_dict`` and ``load_state_dict`` made of tensors, numbers, strings and containers.

        Raises:
            ArgumentError: a state holds something else.
            CheckpointError: rank 0 could not write the file.
        """
        save_run(path, self, self.module, self.optimizer, others)
