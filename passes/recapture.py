"""Graphs of a slim module for sizes at which its model runs other code than its own graph has.

The model is captured again with the slim module's tensors in their places and zeros where channels were removed, and
what was captured is cut as the slim module was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from chase_fx.errors import PlanMismatchError
from chase_fx.graphs.channels import ChannelGraph, analyze
from chase_fx.graphs.outputs import select_outputs
from chase_fx.graphs.plan import PruningPlan
from chase_fx.graphs.precision import Change
from chase_fx.graphs.recapture import Recapture, added, calls_of, move_in, state_of, variant_of
from chase_fx.graphs.rules import DEFAULT_RULES
from chase_fx.graphs.traced import TracedModule, TraceInfo, capture_of
from chase_fx.graphs.variants import Variant
from chase_fx.passes.cut import Cut
from chase_fx.passes.modules import slice_tensor

__all__ = ["SlimRecapture"]


class SlimRecapture:
    """Captures the model of a slim module again, on other inputs, and cuts what it captured by the module's plan.

    Args:
        dense: captures the dense model.
        channels: the analysis that the plan is for.
    """

    def __init__(self, dense: Recapture, channels: ChannelGraph) -> None:
        self._dense = dense
        self._rules = None if channels.rules is DEFAULT_RULES else channels.rules  # the default ones don't pickle
        every = channels.outputs == select_outputs(channels.info, None)
        self._outputs = None if every else channels.outputs

    def follows(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: torch.dtype, other: torch.dtype
    ) -> tuple[tuple[Change, ...], ...] | None:
        """As of the dense model."""
        return self._dense.follows(args, kwargs, own, other)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variant:
        """The graph for these inputs.

        Raises:
            ChaseError: the model can't be captured on them, or couples channels there that the plan tells apart.
        """
        assert isinstance(module, TracedModule)
        plan = module.plan
        assert plan is not None
        traced = self._dense.capture(_grown(state_of(module), plan), args, kwargs)
        info = capture_of(traced)
        if {n: s for n, s in info.structure.items() if n not in info.constants} != dict(plan.shapes):
            raise PlanMismatchError("the model has other parameters and buffers than when the plan was made")
        cut = Cut(analyze(traced, self._outputs, rules=self._rules or DEFAULT_RULES), plan, unused=_unused(info))
        for name in info.constants & cut.kept.keys():
            traced._buffers[name] = slice_tensor(traced.get_buffer(name), cut.kept[name])
        with added(module) as names:
            flag = move_in(module, traced)
            called = calls_of(module.graphs()).union(*(variant.calls for variant in module.variants.others))
            graphs = cut.graphs(traced, module, map(module.get_submodule, called))
        return variant_of(traced, graphs, flag, names)


def _unused(info: TraceInfo) -> frozenset[str]:
    """The tensors of the model that these captures don't read: whatever was removed from them does not matter."""
    read = {leaf.slot.name for capture in info.captures for leaf in capture.outputs}
    read |= {slot.name for capture in info.captures for op in capture.tape.ops for slot in op.inputs()}
    return frozenset(info.structure) - read - info.aliases.keys() - set(info.aliases.values())


def _grown(tensors: Mapping[str, torch.Tensor], plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The tensors in their dense shapes."""
    grown = dict(tensors)
    for name, kept in plan.pruned.items():
        found = tensors.get(name)
        if found is None or found.shape != plan.new_shape(name):
            what = "gone" if found is None else f"of shape {tuple(found.shape)}"
            raise PlanMismatchError(f"'{name}' is {what}, and should be {plan.new_shape(name)} by the module's plan")
        tensor = found.detach()
        for dim, indices in enumerate(kept):
            if indices is not None:
                shape = [*tensor.shape]
                shape[dim] = plan.shapes[name][dim]
                tensor = tensor.new_zeros(shape).index_copy(dim, indices.to(tensor.device), tensor)
        grown[name] = tensor.requires_grad_(found.requires_grad)
    return grown
