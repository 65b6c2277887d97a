"""Sparse training of traced modules: tells the methods of :mod:`chase_fx.sparse` how graphs are analysed and cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chase_fx.graphs.axes import atoms_of
from chase_fx.graphs.channels import ChannelGraph, analyze
from chase_fx.graphs.recurrent import join_weights
from chase_fx.graphs.traced import TracedModule
from chase_fx.passes.rewrite import rewrite
from chase_fx.sparse import ACDC, GMP, MEST, SET, SNIP, Chase, GraNet, RigL, RigLITOP, SRigL, Static, provide

__all__ = ["ACDC", "GMP", "MEST", "SET", "SNIP", "Chase", "GraNet", "RigL", "RigLITOP", "SRigL", "Static"]


class GraphProvider:
    """Analyses, rewrites and shrinks the modules that ``chase_fx.trace`` makes."""

    def handles(self, module: nn.Module) -> bool:
        """Whether ``module`` is a traced one."""
        return isinstance(module, TracedModule)

    def analyze(self, module: nn.Module) -> ChannelGraph:
        """Its channel groups, with every output keeping its shape."""
        assert isinstance(module, TracedModule)
        return analyze(module)

    def normalised(self, channels: Any) -> Mapping[str, str]:
        """The groups over whose units a norm runs."""
        return _normalised(channels) if isinstance(channels, ChannelGraph) else {}

    def rewrite(self, module: nn.Module, plan: Any) -> TracedModule:
        """A slim copy."""
        assert isinstance(module, TracedModule)
        return rewrite(module, plan)

    def shrinker(self, module: nn.Module, channels: Any) -> GraphShrinker:
        """What live shrink calls after it has cut the parameters."""
        assert isinstance(module, TracedModule)
        return GraphShrinker(module, channels)


def _normalised(channels: ChannelGraph) -> dict[str, str]:
    """Groups over whose units a mean, a variance or a norm runs, and where: what it counts changes with them."""
    group_of = {group.atom: group.name for group in channels.groups}
    labelling, found = channels.labelling, dict[str, str]()
    for capture, labels, facts in zip(channels.info.captures, labelling.slots, labelling.facts, strict=True):
        for position, fact in facts.items():
            # Whole groups of a group norm go with their statistics; only what goes inside one changes them.
            whole = atoms_of(fact.notes["groups"]) if "groups" in fact.notes else ()
            for slot, dim in fact.reduced:
                for atom in atoms_of(labels[slot.index][dim]):
                    if atom in group_of and atom not in whole:
                        op = capture.tape.ops[position]
                        found.setdefault(group_of[atom], f"{op.node} ({op.op}, {op.source})")
    return found


class GraphShrinker:
    """Makes a traced module fit parameters that were just cut, in place.

    Every cut starts again from the module as it was when training began: a skeleton with its graph and shapes, on the
    meta device, is rewritten to the units kept so far, and the result's graph, sizes and buffers are put into the
    module that trains. So no rewrite is ever made of a rewrite, and ``module.plan`` is always a plan for the original.
    """

    def __init__(self, module: TracedModule, channels: ChannelGraph) -> None:
        self._skeleton = copy.deepcopy(module).to("meta")
        self._channels = channels

    def __call__(self, module: nn.Module, kept: Mapping[str, Tensor]) -> None:
        """Cut buffers, sizes and graphs of ``module``, whose parameters fit ``kept`` already."""
        assert isinstance(module, TracedModule)
        plan = self._channels.plan_keeping(kept)
        slim = rewrite(self._skeleton, plan)
        # What was cut before travels with the module and its copies, so that an average made later can follow too.
        before = self._channels.keep(module.meta.get(_KEPT, {}))
        now = self._channels.keep(kept)
        for name, buffer in list(module.named_buffers()):
            if name in now:
                for dim, (old, new) in enumerate(zip(before.get(name, (None,) * buffer.dim()), now[name], strict=True)):
                    if new is not None:
                        here = new if old is None else torch.searchsorted(old, new)
                        buffer.data = buffer.data.index_select(dim, here.to(buffer.device))
        for name, part in slim.named_modules():
            _copy_sizes(part, module.get_submodule(name))
        join_weights(module)
        module.meta[_KEPT] = {name: mask.clone() for name, mask in kept.items()}
        module.__dict__["plan"] = plan
        module.__dict__["train_graph"] = slim.train_graph
        module.graph = slim.graph
        module.variants = slim.variants
        own = {name for name, _ in self._skeleton.named_buffers(recurse=False)}
        for name, _ in list(module.named_buffers(recurse=False)):
            if name not in own:
                delattr(module, name)  # places that an earlier cut kept
        device = next(module.parameters()).device
        for name, buffer in slim.named_buffers(recurse=False):
            if name not in own:
                module.register_buffer(name, buffer.to(device), persistent=False)


_KEPT = "chase_fx.kept"


def _copy_sizes(source: nn.Module, target: nn.Module) -> None:
    """Take over size attributes: whole numbers and tuples of them, ``out_channels`` or ``normalized_shape``."""
    for key, value in vars(source).items():
        if isinstance(value, (int, tuple)) and not isinstance(value, bool) and not key.startswith("_"):
            setattr(target, key, value)


provide(GraphProvider())
