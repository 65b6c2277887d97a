"""What a channel graph says, as tables for a terminal: groups, frozen axes, and what a plan would leave."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from chase_fx.graphs.channels import ChannelGraph
from chase_fx.graphs.plan import PruningPlan

__all__ = ["frozen_table", "group_table", "kept_parameters", "plan_table"]

_NAMES_SHOWN = 4


def group_table(channels: ChannelGraph) -> Table:
    """One row a group: its units, the filters that produce its channels, and how many other axes go along."""
    table = Table(title=f"{len(channels.groups)} channel groups", title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("units", justify="right")
    table.add_column("filters that go together", overflow="fold")
    table.add_column("axes that follow", justify="right")
    for group in channels.groups:
        filters = [member.tensor for member in group.members if member.producer]
        others = len(group.members) - len(filters)
        table.add_row(escape(group.name), str(group.size), escape(_some(filters)), str(others))
    return table


def frozen_table(channels: ChannelGraph) -> Table:
    """One row a kind of reason, with the axes that it keeps from being pruned and the first place where it arises."""
    axes_of: dict[str, list[str]] = defaultdict(list)
    places_of: dict[str, dict[str, None]] = defaultdict(dict)
    for (tensor, dim), reason in channels.frozen.items():
        kind, _, place = reason.partition(": ")
        axes_of[kind].append(f"{tensor}:{dim}")
        places_of[kind][place] = None
    table = Table(title=f"{len(channels.frozen)} frozen axes", title_justify="left")
    table.add_column("axes", overflow="fold")
    table.add_column("why they stay", overflow="fold")
    for kind, places in places_of.items():
        first, *others = places
        more = f" and {len(others)} more places" if others else ""
        table.add_row(escape(_some(axes_of[kind])), escape(f"{kind}: {first}{more}" if first else kind))
    return table


def plan_table(channels: ChannelGraph, plan: PruningPlan, model: nn.Module) -> Table:
    """One row a group: units before and after; the title has the parameters before and after."""
    masks = channels.masks_of(plan)
    dense, slim = kept_parameters(model, plan.kept_indices())
    table = Table(
        title=f"the plan leaves {slim:,} of {dense:,} parameters ({slim / dense:.1%})",
        min_width=60,
        title_justify="left",
    )
    table.add_column("group", overflow="fold")
    table.add_column("units", justify="right")
    table.add_column("kept", justify="right")
    for group in channels.groups:
        mask = masks.get(group.atom)
        table.add_row(escape(group.name), str(group.size), str(group.size if mask is None else int(mask.sum())))
    return table


def kept_parameters(model: nn.Module, kept: Mapping[str, tuple[Tensor | None, ...]]) -> tuple[int, int]:
    """Count the model's parameters, before and after the kept indices are applied."""
    dense = slim = 0
    for name, parameter in model.named_parameters():
        dense += parameter.numel()
        indices = kept.get(name, (None,) * parameter.dim())
        sizes = (size if index is None else len(index) for size, index in zip(parameter.shape, indices, strict=True))
        slim += math.prod(sizes)
    return dense, slim


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
