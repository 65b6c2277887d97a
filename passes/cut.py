"""What a plan does to the graphs of a capture: size arguments and the sizes of modules follow the kept units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from chase_fx.errors import PlanMismatchError, RewriteError
from chase_fx.graphs.axes import Atom, Axis, BoolArray, keep_mask
from chase_fx.graphs.branches import BEGINNINGS, join, otherwise
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.channels import ChannelGraph
from chase_fx.graphs.deadcode import remove_dead_nodes
from chase_fx.graphs.duplicate import copied_graph
from chase_fx.graphs.plan import Indices, PruningPlan
from chase_fx.graphs.provenance import tell_data_from_sizes
from chase_fx.graphs.rules.base import Facts, Labels
from chase_fx.graphs.shadows import given_path
from chase_fx.graphs.traced import TracedModule
from chase_fx.graphs.walk import modules_of, parameters_in
from chase_fx.passes.counts import Counts
from chase_fx.passes.modules import resize
from chase_fx.passes.sites import CallSite, KeptBuffers, Places
from chase_fx.passes.sizes import CALLS

__all__ = ["Cut"]

LabelsOf = Callable[[Node], Labels | None]


class Cut:
    """A plan, and the analysis of the capture that it is applied to.

    Args:
        channels: the analysis.
        plan: for the same tensors.
        unused: tensors that nothing is computed with, which may be cut in any way.

    Attributes:
        kept: kept indices of every tensor that changes, constants of the forward included.

    Raises:
        PlanMismatchError: the plan keeps other indices of some tensor than those that it is coupled with allow.
    """

    def __init__(self, channels: ChannelGraph, plan: PruningPlan, *, unused: Collection[str] = ()) -> None:
        self._channels = channels
        self._masks = channels.masks_of(plan)
        by_name = {g.name: torch.from_numpy(self._masks[g.atom]) for g in channels.groups if g.atom in self._masks}
        self.kept = channels.keep(by_name)
        ignored = channels.info.constants.union(unused)
        planned, implied = ({n: k for n, k in d.items() if n not in ignored} for d in (plan.pruned, self.kept))
        _check_consistent(plan.shapes, planned, implied)
        self._counts = Counts(self._masks)

    def graphs(self, traced: TracedModule, root: nn.Module, settled: Iterable[nn.Module] = ()) -> list[Graph]:
        """The graphs of ``traced`` for the cut tensors of ``root``; its modules get sizes that graphs alone tell.

        Raises:
            RewriteError: a size argument that can't be replaced, or a module of ``root`` that would need two sizes, or
                another one than it has if it is one of ``settled``.
        """
        buffers, sizes = _Buffers(root, self._masks), _ModuleSizes(settled)
        return [
            _rewrite_graph(graph, root, self._channels, k, counts=self._counts, buffers=buffers, sizes=sizes)
            for k, graph in enumerate(traced.graphs())
        ]


def _check_consistent(
    shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, Indices], complete: Mapping[str, Indices]
) -> None:
    for name in {**plan, **complete}:
        rank = len(shapes[name])
        planned, implied = plan.get(name, (None,) * rank), complete.get(name, (None,) * rank)
        for dim, (a, b) in enumerate(zip(planned, implied, strict=True)):
            same = (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
            if not same:
                raise PlanMismatchError(
                    f"the plan keeps other indices of '{name}' dim {dim} than the tensors it is coupled with do"
                )


class _Buffers(KeptBuffers):
    """Kept indices of axes as buffers of the slim module; graphs share those of the same axis."""

    def __init__(self, root: nn.Module, masks: Mapping[Atom, np.ndarray]) -> None:
        self._root, self._masks = root, masks
        self._names: dict[bytes, str] = {}
        self._places: dict[bytes, str] = {}
        devices = {p.device for p in parameters_in(modules_of(root)).values()} - {torch.device("meta")}
        self._device = devices.pop() if len(devices) == 1 else torch.device("cpu")

    def __call__(self, axis: Axis) -> str:
        """The name of the buffer with the kept indices of ``axis``."""
        mask = self.mask(axis)
        name = self._names.get(mask.tobytes())
        if name is None:
            name = self._names[mask.tobytes()] = self._add("_chase_kept", np.flatnonzero(mask))
        return name

    def places(self, axis: Axis) -> str:
        """The name of the buffer with the place of each dense index of ``axis``; removed ones are out of range."""
        mask = self.mask(axis)
        name = self._places.get(mask.tobytes())
        if name is None:
            places = np.where(mask, np.cumsum(mask) - 1, mask.size)
            name = self._places[mask.tobytes()] = self._add("_chase_places", places)
        return name

    def mask(self, axis: Axis) -> BoolArray:
        """Which indices of a live axis stay."""
        mask = keep_mask(axis, self._masks)
        assert mask is not None
        return mask

    def _add(self, kind: str, values: np.ndarray) -> str:
        taken = self._root._buffers
        name = next(n for k in range(len(taken) + 1) if (n := f"{kind}_{k}") not in taken)
        self._root.register_buffer(name, torch.from_numpy(values).to(self._device), persistent=False)
        return name


class _ModuleSizes:
    """Sizes of modules that graphs alone tell: a module that is called in several places has one of each."""

    def __init__(self, settled: Iterable[nn.Module]) -> None:
        self._settled = {id(module) for module in settled}
        self._set: set[tuple[int, str]] = set()

    def __call__(self, site: CallSite, module: nn.Module, name: str, value: Any) -> None:
        """Set attribute ``name`` of ``module``, which is called at ``site``."""
        known = id(module) in self._settled or (id(module), name) in self._set
        found = getattr(module, name)
        if known and found != value:
            raise RewriteError(
                f"{site.where()}: '{site.node.target}' needs {name}={value} here and {name}={found} where it is called "
                "elsewhere; use a module for each"
            )
        self._set.add((id(module), name))
        setattr(module, name, value)


def _rewrite_graph(
    graph: Graph,
    root: nn.Module,
    channels: ChannelGraph,
    capture: int,
    *,
    counts: Counts,
    buffers: _Buffers,
    sizes: _ModuleSizes,
) -> Graph:
    new = copied_graph(graph)
    slots = channels.labelling.slots[capture]
    facts = channels.labelling.facts[capture]

    def labels(node: Node) -> Labels | None:
        slot = node.meta.get("slot")
        return slots.get(slot.index) if slot is not None else None

    def noted(node: Node) -> Sequence[Facts]:
        start, stop = node.meta.get("tape", (0, 0))
        return [facts[i] for i in range(start, stop) if i in facts]

    modules = dict(modules_of(root))
    places: Places = {}
    around: list[Places] = []  # what was known before the branches that the node is in
    for node in list(new.nodes):
        if node.target in BEGINNINGS:
            around.append(dict(places))
        elif node.target in (otherwise, join):
            places = dict(around[-1]) if node.target is otherwise else around.pop()
        site = CallSite(new, node, counts, labels, noted(node), buffers, places)
        if node.op == "call_module":
            _resize_called(modules[given_path(str(node.target))], site, sizes)
        elif node.op in ("call_function", "call_method"):
            name = call_name(node)
            if name in ("size", "numel"):
                _grow_read(new, node, labels, counts)
            elif name in CALLS and _touches_live(node, labels, counts):
                CALLS[name](site)
    remove_dead_nodes(new, root)
    tell_data_from_sizes(new, channels.info.captures[capture].tape)
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
    dense.meta["grown"] = node
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


def _resize_called(module: nn.Module, site: CallSite, sizes: _ModuleSizes) -> None:
    """Sizes that no tensor of the module tells: groups, and norms without weights."""
    group = site.note("groups")
    if group is not None and isinstance(module, _ConvNd):
        sizes(site, module, "groups", site.counts.kept(group))
        resize(module, {})
    if not site.node.args:
        return
    x = site.labels(site.node.args[0]) if isinstance(site.node.args[0], Node) else None
    if x is None:
        return
    if isinstance(module, nn.GroupNorm):
        if group is not None:
            sizes(site, module, "num_groups", site.counts.kept(group))
        module.num_channels = site.counts.kept(x[1])  # nothing is computed with it
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        n = len(module.normalized_shape)
        sizes(site, module, "normalized_shape", tuple(map(site.counts.kept, x[len(x) - n :])))
    elif isinstance(module, _NormBase) and len(x) > 1:
        unbatched = isinstance(module, _InstanceNorm) and len(x) == module._get_no_batch_dim()
        module.num_features = site.counts.kept(x[0 if unbatched else 1])  # nor with this
