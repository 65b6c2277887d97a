"""The channel dependency graph of a traced module: which axes are tied, in which units, by what, and what is frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import torch

from chase_fx.errors import ArgumentError
from chase_fx.graphs import select
from chase_fx.graphs.axes import Atom, Axis, Cat, Picked, Prod, atoms_of, fixed_of, keep_mask, resolve
from chase_fx.graphs.constants import Constants, digest
from chase_fx.graphs.garbage import uncollected
from chase_fx.graphs.hand_masks import masks_by_atom
from chase_fx.graphs.labels import Labelling, Unknown, propagate
from chase_fx.graphs.outputs import Outputs, select_outputs
from chase_fx.graphs.plan import Indices, PruningPlan
from chase_fx.graphs.rules import DEFAULT_RULES, Rules
from chase_fx.graphs.traced import TracedModule, TraceInfo, capture_of
from chase_fx.graphs.units import units_along
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in

__all__ = ["ChannelGraph", "Group", "Member", "analyze"]

AxisName = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis that a group touches.

    Attributes:
        tensor: name of a parameter or buffer.
        dim: the dim of it.
        positions: (size, k) long tensor; row i holds the indices along ``dim`` that belong to unit i.
        producer: whether ``dim`` is the output dim of a contraction weight (the filters of a convolution).
    """

    tensor: str
    dim: int
    positions: torch.Tensor
    producer: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Axes that are coupled. Unit i of a group stands for one slice (or several) of each member: they go together.

    Attributes:
        name: unique and stable: the first axis of the group, such as ``"layer1.0.conv1.weight:0"``.
        size: the number of units.
    """

    name: str
    size: int
    atom: Atom
    _channels: ChannelGraph

    @property
    def least(self) -> int:
        """How many units have to stay: two where a spread is measured over them."""
        return self.atom.least

    @property
    def multiple(self) -> int:
        """The number of units that stay is a multiple of this, unless all of them do."""
        return self.atom.multiple

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Every axis that the group touches, in the model's order."""
        return self._channels.members_of(self.atom)

    def __repr__(self) -> str:
        return f"Group({self.name!r}, size={self.size}, axes={len(self.members)})"


class ChannelGraph:
    """The result of :func:`analyze`."""

    def __init__(
        self, module: TracedModule, info: TraceInfo, labelling: Labelling, outputs: tuple[str, ...], rules: Rules
    ) -> None:
        self.labelling, self.rules = labelling, rules
        self.outputs = outputs
        self.module = module
        self.info = info
        self._units: dict[Axis, dict[Atom, np.ndarray]] = {}
        self._touched: dict[Atom, list[AxisName]] = {}
        for name, labels in labelling.state.items():
            if name in info.aliases:
                continue
            for d, axis in enumerate(labels):
                for atom in dict.fromkeys(atoms_of(axis)):
                    self._touched.setdefault(atom, []).append((name, d))
        self.groups: tuple[Group, ...] = tuple(self._make_groups())

    def _make_groups(self) -> list[Group]:
        count: dict[str, int] = {}
        groups = []
        for atom, touched in self._touched.items():
            name, dim = touched[0]
            base = f"{name}:{dim}"
            k = count.get(base, 0)
            count[base] = k + 1
            groups.append(Group(f"{base}#{k}" if k else base, atom.size, atom, self))
        return groups

    def members_of(self, atom: Atom) -> tuple[Member, ...]:
        """Every axis that the units of ``atom`` touch, in the model's order."""
        members = []
        for name, d in self._touched[atom]:
            positions = self._units_along(name, d)[atom][:, 1].reshape(atom.size, -1)
            members.append(Member(name, d, torch.from_numpy(positions.copy()), (name, d) in self.labelling.producers))
        return tuple(members)

    def units(self) -> Iterator[tuple[str, int, dict[Atom, np.ndarray]]]:
        """Every axis with units: for each atom in it (m, 2) pairs of unit and position, sorted by both."""
        for axis in dict.fromkeys(axis for touched in self._touched.values() for axis in touched):
            yield *axis, self._units_along(*axis)

    def _units_along(self, name: str, dim: int) -> dict[Atom, np.ndarray]:
        axis = resolve(self.labelling.state[name][dim])
        found = self._units.get(axis)
        if found is None:  # tensors of one layer share their axes
            found = self._units[axis] = units_along(axis)
        return found

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """Operators whose channels were frozen for want of a rule, with the line of user code."""
        return tuple(self.labelling.unknown)

    @cached_property
    def frozen(self) -> Mapping[AxisName, str]:
        """Axes of more than one index that keep some index whatever the plan says, and why."""
        out = {}
        for name, labels in self.labelling.state.items():
            for d, axis in enumerate(labels):
                pieces = [f for f in fixed_of(axis) if f.size > 1 or axis.size == f.size]
                if pieces and axis.size > 1:
                    live = len(atoms_of(axis))
                    out[name, d] = ("in part: " if live else "") + str(pieces[0].cause)
        return out

    @cached_property
    def graph(self) -> nx.MultiDiGraph:
        """Nodes are axes ``(name, dim)``; edges are couplings with the FX node, the operator and the source line."""
        graph = nx.MultiDiGraph()
        frozen = self.frozen
        group_of = {axis: group.name for group in self.groups for axis in self._touched[group.atom]}
        for name, labels in self.labelling.state.items():
            for d, axis in enumerate(labels):
                key = (name, d)
                graph.add_node(key, size=axis.size, group=group_of.get(key), frozen=frozen.get(key))
        for (a, b), cause in dict.fromkeys((edge, tie.cause) for tie in self.labelling.ties for edge in tie.edges()):
            for end in (a, b):
                if end not in graph:
                    graph.add_node(end, size=None, group=None, frozen=None)
            graph.add_edge(a, b, node=cause.node, op=cause.op, source=cause.source)
        return graph

    def explain(self, a: AxisName | str, b: AxisName | str) -> str:
        """The shortest path of couplings between two axes, one line per coupling.

        Args:
            a: an axis such as ``("layer1.0.conv1.weight", 0)``; a name alone means its dim 0.
            b: the other axis.

        Raises:
            ArgumentError: an axis that the model does not have.
        """
        start, end = self._axis(a), self._axis(b)
        undirected = self.graph.to_undirected(as_view=True)
        try:
            path = nx.shortest_path(undirected, start, end)
        except nx.NetworkXNoPath:
            return f"{_show(start)} and {_show(end)} are not coupled"
        lines = [_show(start)]
        for x, y in pairwise(path):
            data = next(iter(undirected.get_edge_data(x, y).values()))
            where = f" ({data['source']})" if data["source"] else ""
            lines.append(f"  -- {data['op']} at '{data['node']}'{where} -->  {_show(y)}")
        return "\n".join(lines)

    def _axis(self, axis: AxisName | str) -> AxisName:
        key = (axis, 0) if isinstance(axis, str) else axis
        if not isinstance(key, tuple) or key not in self.graph:
            raise ArgumentError(
                f"no axis {key!r}; axes are (parameter name, dim), e.g. {next(iter(self.graph.nodes))!r}"
            )
        return key

    def draw(self, path: str | Path) -> Path:
        """Write the graph as ``.dot``, ``.svg`` (needs Graphviz' ``dot``) or ``.html``; the suffix decides."""
        from chase_fx.graphs.draw import draw

        return draw(self, path)

    def __str__(self) -> str:
        """A stable text dump: each tensor with its axes, a group named by its first axis."""
        names = {group.atom: group.name for group in self.groups}
        lines = []
        known: dict[Axis, str] = {}
        for name, labels in self.labelling.state.items():
            normal = [resolve(axis) for axis in labels]
            for axis in normal:
                if axis not in known:
                    known[axis] = _text(axis, names)
            if labels:
                lines.append(f"{name}: " + " x ".join(known[axis] for axis in normal))
        return "\n".join(lines)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the model's structure: names, shapes and couplings."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:32]

    # -- plans --------------------------------------------------------------------------------------------------------

    @uncollected()
    def plan(
        self,
        channel_sparsity: float = 0.5,
        score: str | Callable[[Group], torch.Tensor] = "magnitude",
        round_to: int = 1,
        *,
        scope: str = "group",
    ) -> PruningPlan:
        """Choose the units that stay.

        Args:
            channel_sparsity: share of the channels of each coupled axis to remove, in [0, 1).
            score: ``"magnitude"`` (L2 norm over all members), ``"random"``, or a function from a group to a tensor of
                ``size`` scores; the lowest go first.
            round_to: kept widths are multiples of this where the dense width allows it.
            scope: ``"group"`` removes the same share everywhere, ``"global"`` ranks all units together.

        Raises:
            ArgumentError: a value out of range.
            NothingToPruneError: every channel is frozen.
        """
        kept = select.choose(self, channel_sparsity, score, round_to, scope)
        return self.plan_keeping(kept)

    def plan_keeping(self, kept: Mapping[str, torch.Tensor]) -> PruningPlan:
        """The plan that keeps the given units: group name -> (size,) bool; groups that are missing stay whole.

        Raises:
            ArgumentError: a mask that is none of a group's, or that keeps fewer units than the group's ``least`` or no
                multiple of its ``multiple``.
        """
        pruned = self.keep(kept)
        own = {n: s for n, s in self.info.structure.items() if n not in self.info.constants}
        return PruningPlan(self.digest, self.outputs, own, {n: p for n, p in pruned.items() if n in own})

    def keep(self, kept: Mapping[str, torch.Tensor]) -> dict[str, Indices]:
        """Kept indices of every tensor that the given units change, the constants of a forward included."""
        masks = masks_by_atom(self.groups, kept)
        pruned: dict[str, Indices] = {}
        # Tensors of one layer share their axes.
        known: dict[Axis, torch.Tensor | None] = {}
        for name, labels in self.labelling.state.items():
            stay = []
            for axis in map(resolve, labels):
                if axis not in known:
                    found = keep_mask(axis, masks)
                    known[axis] = None if found is None else torch.from_numpy(np.flatnonzero(found))
                stay.append(known[axis])
            if any(indices is not None for indices in stay):
                pruned[name] = tuple(stay)
        return pruned

    def masks_of(self, plan: PruningPlan) -> dict[Atom, np.ndarray]:
        """The kept units of each atom that a plan for this structure implies."""
        masks: dict[Atom, np.ndarray] = {}
        for atom, touched in self._touched.items():
            own = [(n, d) for n, d in touched if n not in self.info.constants]
            if not own:
                continue
            name, dim = own[0]
            kept = plan.pruned.get(name, ())
            indices = kept[dim] if kept else None
            if indices is None:
                continue
            present = np.zeros(self.labelling.state[name][dim].size, dtype=np.bool_)
            present[indices.numpy()] = True
            units = self._units_along(name, dim)[atom]
            mask = np.zeros(atom.size, dtype=np.bool_)
            mask[units[present[units[:, 1]], 0]] = True
            if not mask.all():
                masks[atom] = mask
        return masks


def _show(axis: AxisName) -> str:
    return f"{axis[0]}[dim {axis[1]}]"


def _text(axis: Axis, names: Mapping[Atom, str]) -> str:
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return f"{axis.size}<{names.get(axis, '?')}>"
    if isinstance(axis, Cat):
        return "(" + " + ".join(_text(p, names) for p in axis.parts) + ")"
    if isinstance(axis, Prod):
        return "(" + " * ".join(_text(f, names) for f in axis.factors) + ")"
    if isinstance(axis, Picked):
        return f"{_text(axis.base, names)}[{hashlib.sha256(axis.index.tobytes()).hexdigest()[:16]}]"
    return str(axis.size)


def _tensors(traced: TracedModule) -> dict[str, torch.Tensor]:
    modules = modules_of(traced)
    return {**parameters_in(modules), **buffers_in(modules)}


def _constants(traced: TracedModule, info: TraceInfo) -> list[Constants]:
    """For each capture; two that are one graph have the same."""
    tensors, tapes = _tensors(traced), [capture.tape for capture in info.captures]
    found = [
        Constants(tensors, info.aliases, graph, [tapes[k], *tapes[:k], *tapes[k + 1 :]])
        for k, graph in enumerate(traced.graphs())
    ]
    return found + found[:1] * (len(tapes) - len(found))


def _holds(labelling: Labelling, traced: TracedModule) -> bool:
    """Whether the indices that an analysis goes by are those of this copy of the module, if it has values."""
    if not labelling.told:
        return True
    tensors = _tensors(traced)
    return all(tensors[name].is_meta or digest(tensors[name]) == told for name, told in labelling.told.items())


@uncollected()
def analyze(
    traced: TracedModule, outputs: Outputs = None, *, rules: Rules = DEFAULT_RULES, on_unknown: str = "freeze"
) -> ChannelGraph:
    """Find which channels of a traced module are coupled.

    Args:
        traced: what :func:`trace` gave.
        outputs: which outputs must keep their shape: a path such as ``"logits"``, an index, several of them, or a
            predicate on paths; default all.
        rules: the operator rules; extend the default ones by value.
        on_unknown: ``"freeze"`` the channels of operators without a rule (reported in ``.unknown``), or ``"raise"``.

    Raises:
        ArgumentError: ``traced`` is no traced module, or ``outputs`` selects nothing.
        UnsupportedOpError: an operator without a rule, with ``on_unknown="raise"``.

    Example:
        >>> import torch, chase_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> channels = chase_fx.analyze(chase_fx.trace(net, torch.zeros(1, 4)))
        >>> channels.groups
        (Group('0.weight:0', size=8, axes=3),)
    """
    info = capture_of(traced)
    if traced.plan is not None:
        raise ArgumentError(
            "this module is pruned already, and what was captured describes it before that; "
            "call chase_fx.trace(slim, args) to capture the slim module"
        )
    if on_unknown not in ("freeze", "raise"):
        raise ArgumentError(f"on_unknown must be 'freeze' or 'raise', found {on_unknown!r}")
    paths = select_outputs(info, outputs)
    key = (paths, id(rules))
    found = info.analyses.get(key)
    if found is None or on_unknown == "raise" or not _holds(found[1], traced):
        raise_on_unknown = on_unknown == "raise"
        labelling = propagate(info, rules, paths, _constants(traced, info), raise_on_unknown=raise_on_unknown)
        found = info.analyses[key] = (rules, labelling)
    # Labels depend on the structure alone and are shared by every copy of the module; scores read weights, so a
    # channel graph belongs to its module.
    own: dict[object, ChannelGraph] = traced.__dict__.setdefault("channel_graphs", {})
    if key not in own or own[key].labelling is not found[1]:
        own[key] = ChannelGraph(traced, info, found[1], paths, rules)
    return own[key]
