"""``rewrite``: a traced module and a plan in, a channel-pruned GraphModule out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from chase_fx.errors import ArgumentError, PlanMismatchError
from chase_fx.graphs.axes import Atom, Axis, keep_mask
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.channels import ChannelGraph, analyze
from chase_fx.graphs.deadcode import remove_dead_nodes
from chase_fx.graphs.garbage import uncollected
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.plan import PruningPlan
from chase_fx.graphs.rules.base import Facts, Labels
from chase_fx.graphs.shadows import given_path
from chase_fx.graphs.traced import TracedModule, capture_of
from chase_fx.passes.counts import Counts
from chase_fx.passes.modules import resize, slim_tree
from chase_fx.passes.sizes import CALLS, CallSite

__all__ = ["channels_for", "rewrite"]

LabelsOf = Callable[[Node], Labels | None]


@uncollected()
@normal_tensors()
def rewrite(traced: TracedModule, plan: PruningPlan) -> TracedModule:
    """Apply a plan: slice parameters and buffers, resize modules, replace size arguments.

    ``traced`` is not changed; the result shares no tensor with it. Needs no forward.

    Raises:
        ArgumentError: ``traced`` is no traced module.
        PlanMismatchError: the plan was made for another structure.
        RewriteError: a size argument that can't be replaced, with the node and its source line.

    Example:
        >>> import torch, chase_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = chase_fx.trace(net, torch.zeros(1, 4))
        >>> slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
        >>> slim.get_submodule("0")
        Linear(in_features=4, out_features=4, bias=True)
    """
    info = capture_of(traced)
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"expected a PruningPlan, found {type(plan).__name__}; make one with analyze(traced).plan(...)"
        )
    channels = channels_for(traced, plan)
    masks = channels.masks_of(plan)
    by_name = {group.name: torch.from_numpy(masks[group.atom]) for group in channels.groups if group.atom in masks}
    complete = channels.keep(by_name)
    own = {n: k for n, k in complete.items() if n not in info.constants}
    _check_consistent(plan, own)
    counts = Counts(channels.labelling.axes, {atom: int(mask.sum()) for atom, mask in masks.items()})
    root = nn.Module()
    root.__dict__.update(slim_tree(traced, complete))
    for module in root.modules():
        resize(module, info.leaves)
    places = _Places(root, masks)
    graphs = []
    for k, graph in enumerate(traced.graphs()):
        graphs.append(_rewrite_graph(graph, root, channels, k, counts=counts, places=places))
    train = graphs[1] if len(graphs) > 1 else None
    slim = TracedModule.build(root, graphs[0], train, info, info.model)
    slim.__dict__["plan"] = plan
    for graph in slim.graphs():
        graph.lint()
    return slim


def channels_for(traced: TracedModule, plan: PruningPlan) -> ChannelGraph:
    """The analysis that ``plan`` was made from, or an equal one."""
    info = capture_of(traced)
    own = {n: s for n, s in info.structure.items() if n not in info.constants}
    if dict(plan.shapes) != own:
        wrong = next((n for n in {**own, **plan.shapes} if own.get(n) != plan.shapes.get(n)), "")
        raise PlanMismatchError(
            f"the plan was made for another model: '{wrong}' is {plan.shapes.get(wrong)} in the plan, "
            f"{own.get(wrong)} in the module"
        )
    for (paths, _), (rules, _labelling) in list(info.analyses.items()):
        if paths == plan.outputs:
            channels = analyze(traced, outputs=paths, rules=rules)
            if channels.digest == plan.digest:
                return channels
    channels = analyze(traced, outputs=plan.outputs)
    if channels.digest != plan.digest:
        raise PlanMismatchError(
            f"the plan's structure {plan.digest} is not that of this module, {channels.digest}: the same tensors are "
            "coupled in another way; make the plan with analyze() on this module, with the same rules"
        )
    return channels


def _check_consistent(plan: PruningPlan, complete: dict[str, tuple[torch.Tensor | None, ...]]) -> None:
    for name in {**plan.pruned, **complete}:
        rank = len(plan.shapes[name])
        planned, implied = plan.pruned.get(name, (None,) * rank), complete.get(name, (None,) * rank)
        for dim, (a, b) in enumerate(zip(planned, implied, strict=True)):
            same = (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
            if not same:
                raise PlanMismatchError(
                    f"the plan keeps other indices of '{name}' dim {dim} than the tensors it is coupled with do"
                )


class _Places:
    """Kept indices of axes as buffers of the slim module; graphs share those of the same axis."""

    def __init__(self, root: nn.Module, masks: Mapping[Atom, np.ndarray]) -> None:
        self._root, self._masks = root, masks
        self._names: dict[bytes, str] = {}

    def __call__(self, axis: Axis) -> str:
        """The name of the buffer with the kept indices of ``axis``."""
        mask = keep_mask(axis, self._masks)
        assert mask is not None
        name = self._names.setdefault(mask.tobytes(), f"_chase_kept_{len(self._names)}")
        if name not in self._root._buffers:
            self._root.register_buffer(name, torch.from_numpy(np.flatnonzero(mask)), persistent=False)
        return name


def _rewrite_graph(
    graph: Graph, root: nn.Module, channels: ChannelGraph, capture: int, *, counts: Counts, places: _Places
) -> Graph:
    new = copy.deepcopy(graph)
    slots = channels.labelling.slots[capture]
    facts = channels.labelling.facts[capture]

    def labels(node: Node) -> Labels | None:
        slot = node.meta.get("slot")
        return slots.get(slot.index) if slot is not None else None

    def noted(node: Node) -> Sequence[Facts]:
        start, stop = node.meta.get("tape", (0, 0))
        return [facts[i] for i in range(start, stop) if i in facts]

    for node in list(new.nodes):
        site = CallSite(new, node, counts, labels, noted(node), places)
        if node.op == "call_module":
            _resize_called(root.get_submodule(given_path(str(node.target))), site)
        elif node.op in ("call_function", "call_method"):
            name = call_name(node)
            if name in ("size", "numel"):
                _grow_read(new, node, labels, counts)
            elif name in CALLS and _touches_live(node, labels, counts):
                CALLS[name](site)
    remove_dead_nodes(new, root)
    return new


def _touches_live(node: Node, labels: LabelsOf, counts: Counts) -> bool:
    for other in (node, *node.all_input_nodes, *node.users):
        found = labels(other)
        if found is not None and counts.any_live(found):
            return True
    return False


def _grow_read(graph: Graph, node: Node, labels: LabelsOf, counts: Counts) -> None:
    """A size that is read from a shrunken dim goes on with its dense value."""
    found = labels(cast("Node", node.args[0]))
    if found is None:
        return
    chosen = (found[cast("int", node.args[1])],) if len(node.args) > 1 else found
    if not counts.any_live(chosen):
        return
    users = list(node.users)
    with graph.inserting_after(node):
        mark = graph.call_function(int, (0,))
    with graph.inserting_before(mark):
        dense = counts.grow(graph, node, chosen)
    if "value" in node.meta:
        dense.meta["value"] = node.meta["value"]
    graph.erase_node(mark)
    for user in users:
        user.args = _swap(user.args, node, dense)
        user.kwargs = _swap(user.kwargs, node, dense)


def _swap(value: Any, old: Node, new: Any) -> Any:
    if value is old:
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_swap(v, old, new) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_swap(v, old, new) for v in value)
    if isinstance(value, dict):
        return {k: _swap(v, old, new) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_swap(value.start, old, new), _swap(value.stop, old, new), _swap(value.step, old, new))
    return value


def _resize_called(module: nn.Module, site: CallSite) -> None:
    """Sizes that no tensor of the module tells: groups, and norms without weights."""
    group = site.note("groups")
    if group is not None and isinstance(module, _ConvNd):
        module.groups = site.counts.kept(group)
        resize(module, {})
    if not site.node.args:
        return
    x = site.labels(site.node.args[0]) if isinstance(site.node.args[0], Node) else None
    if x is None:
        return
    if isinstance(module, nn.GroupNorm):
        if group is not None:
            module.num_groups = site.counts.kept(group)
        module.num_channels = site.counts.kept(x[1])
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        n = len(module.normalized_shape)
        module.normalized_shape = tuple(map(site.counts.kept, x[len(x) - n :]))
    elif isinstance(module, _NormBase) and len(x) > 1:
        unbatched = isinstance(module, _InstanceNorm) and len(x) == module._get_no_batch_dim()
        module.num_features = site.counts.kept(x[0 if unbatched else 1])
