"""The module that a capture and a rewrite give: a ``torch.fx.GraphModule`` that keeps the original module tree."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental import _config as fx_config

from chase_fx.errors import ArgumentError
from chase_fx.graphs.branches import nested_code, python_code
from chase_fx.graphs.duplicate import copied_graph, duplicate
from chase_fx.graphs.expected import expect_order
from chase_fx.graphs.forwards import Texts, by_mode, compiled, has_regions, own_code, preserving
from chase_fx.graphs.guards import check
from chase_fx.graphs.leaves import Leaves
from chase_fx.graphs.modes import FLAG, Modes, set_modes
from chase_fx.graphs.pickling import FlatGraph, flatten, restore
from chase_fx.graphs.precision import Change
from chase_fx.graphs.recurrent import join_weights
from chase_fx.graphs.shadows import graph_path, show_shadowed
from chase_fx.graphs.tape import Slot, Tape
from chase_fx.graphs.variants import Variants, by_sizes
from chase_fx.graphs.walk import modules_of, parameters_in

if TYPE_CHECKING:
    from chase_fx.graphs.plan import PruningPlan

__all__ = ["Capture", "OutputLeaf", "TraceInfo", "TracedModule", "capture_of", "decides_by_sizes"]

# What makes up the state of an nn.Module, apart from attributes that only the original forward reads.
_MODULE_STATE = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")


@dataclass(frozen=True)
class OutputLeaf:
    """One tensor of the forward's result: where it lies (``"logits"``, ``"hidden_states.3"``) and its slot."""

    path: str
    slot: Slot


@dataclass(frozen=True)
class Capture:
    """One recorded forward."""

    mode: str  # "eval" or "train"
    tape: Tape
    outputs: tuple[OutputLeaf, ...]
    nodes: frozenset[str] = frozenset()  # the nodes that the graph kept
    conditions: tuple[Slot, ...] = ()  # what data decide by which way runs


@dataclass
class TraceInfo:
    """What the passes need to know about a capture; shared by every copy of the module."""

    model: str
    captures: tuple[Capture, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    specialised: tuple[str, ...] = ()
    structure: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # second names of tied tensors -> the first
    constants: frozenset[str] = frozenset()  # tensors that the model uses but does not register
    leaves: Leaves = field(default_factory=dict)  # the user's own leaf classes and their size attributes
    # line that decides by a size -> the functions that it is in, innermost first, as (module, name)
    deciders: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    reads: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)  # the same for data read into Python
    # arguments of each graph that follow the model's precision; None if no forward reads a tensor's
    follows: tuple[tuple[Change, ...], ...] | None = None
    modes: dict[bool, Modes] = field(default_factory=dict)  # what the model's own train() and eval() do
    train_error: str | None = None  # why the forward could not be captured in train mode
    analyses: dict[Any, Any] = field(default_factory=dict)  # of this structure, by their options

    def __getstate__(self) -> dict[str, Any]:
        """Analyses are made again when they are asked for."""
        return {**self.__dict__, "analyses": {}}


class TracedModule(GraphModule):
    """A GraphModule over the original module tree.

    ``graph`` is what runs in eval mode, and in train mode too unless the model's structure differs there
    (auxiliary heads); then ``train_graph`` is what runs in train mode.
    """

    plan: PruningPlan | None = None
    train_graph: Graph | None = None
    info: TraceInfo | None = None
    variants: Variants
    compiled_texts: Texts = MappingProxyType({})

    @classmethod
    def build(
        cls,
        root: nn.Module,
        graphs: tuple[Graph, Graph | None],
        info: TraceInfo,
        class_name: str,
        like: TracedModule | None = None,
    ) -> TracedModule:
        """A module that runs ``graphs`` on the parameters and submodules of ``root``, which it takes over.

        Those that read as the graphs of the module ``like`` are not compiled again.
        """
        module = cls(nn.Module(), Graph(), class_name)
        for name in _MODULE_STATE:
            module.__dict__[name] = root.__dict__[name]
        show_shadowed(module)
        join_weights(module)  # whoever made the root copied or cut its tensors one by one
        module.__dict__["info"] = info
        module.__dict__["train_graph"] = graphs[1]
        module.__dict__["compiled_texts"] = {} if like is None else like.compiled_texts
        for g in graphs:
            if g is not None:
                g.owning_module = module
        assigned: Any = GraphModule.graph  # nn.Module would take the assignment for one to a child of that name
        assigned.fset(module, graphs[0])
        return module

    def recompile(self) -> Any:
        """Regenerate ``forward`` from the graphs. Graphs for other sizes are those of the graph before, and go."""
        if self.info is None and not len(self.graph.nodes):  # ``build`` gives it its graph when it is made
            return None
        cls = type(self)
        if fx_config.enrich_profiler_metadata:  # the text then names its file, which FX gives it
            with nested_code(self.graph):
                code = super().recompile()
            own = {code.src: cls.forward}
        else:
            with own_code(self.graph) as code:
                super().recompile()
            own = {code.src: compiled(code, self.compiled_texts)}
            self.__dict__["_code"] = code.src
        evaluate, train = own[code.src], None
        if self.train_graph is not None:
            other = python_code(self.train_graph)
            train = own[other.src] = compiled(other, self.compiled_texts)
        self.__dict__["compiled_texts"] = own
        if "variants" in self.__dict__:
            self.variants.forget(self)
        self.__dict__["variants"] = Variants()
        cls.forward = by_mode(evaluate, train, self.info.train_error if self.info is not None else None, FLAG)
        if (self.info is not None and self.info.follows is not None) or any(map(decides_by_sizes, self.graphs())):
            cls.forward = by_sizes(cls.forward)
        if any(map(has_regions, self.graphs())):
            cls.forward = preserving(cls.forward)
        return code

    def train(self, mode: bool = True) -> Self:
        """As of the model, which may have a ``train`` or ``eval`` of its own that keeps some layers in eval mode."""
        super().train(mode)
        if self.info is not None and self.info.modes:
            set_modes(self, self.info.modes[mode])
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Graphs belong to a precision, for a model may decide by it."""
        before = self._dtypes()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before != self._dtypes():
            self.moved()
        return self

    def moved(self) -> None:
        """Find out which graphs hold in a precision that the parameters were moved to otherwise than by ``to``."""
        self.variants.forget(self)
        self.variants.foreign = self._is_foreign()

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {name: p.dtype for name, p in parameters_in(modules_of(self)).items()}

    def _is_foreign(self) -> bool:
        """Whether the model might do something else in the precision that the module has now than its graphs do."""
        info = self.info
        if info is None or info.follows is None:
            return False
        slots = [slot for capture in info.captures for slot in capture.tape.slots if slot.kind == "parameter"]
        now = self._dtypes()
        moves = {(slot.dtype, now[slot.name]) for slot in slots if slot.name in now}
        moves -= {(kind, kind) for kind, _ in moves}
        if not moves:
            return False
        if len(moves) > 1 or self.variants.recapture is None:
            return True
        return self.variants.recapture.follows(info.args, info.kwargs, *moves.pop()) != info.follows

    def get_submodule(self, target: str) -> nn.Module:
        """The model's own submodule of that name."""
        return super().get_submodule(graph_path(target))

    def graphs(self) -> list[Graph]:
        """The graph of each captured mode, in the order of ``info.captures``."""
        return [self.graph] if self.train_graph is None else [self.graph, self.train_graph]

    def __reduce__(self) -> Any:
        train = flatten(self.train_graph) if self.train_graph is not None else None
        others = self.variants.names()
        state = {name: self.__dict__[name] for name in _MODULE_STATE}
        for name in ("_buffers", "_modules"):
            state[name] = {key: value for key, value in state[name].items() if key not in others}
        extras = {"plan": self.plan, "meta": dict(self.meta), "variants": self.variants}
        return _unpickle, (state, (flatten(self.graph), train), self.info, type(self).__name__, extras)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        root = nn.Module()
        for name in _MODULE_STATE:
            root.__dict__[name] = duplicate(self.__dict__[name], memo)
        assert self.info is not None
        graphs = (copied_graph(self.graph), None if self.train_graph is None else copied_graph(self.train_graph))
        new = TracedModule.build(root, graphs, self.info, type(self).__name__, like=self)
        memo[id(self)] = new
        new.__dict__["variants"] = copy.copy(self.variants)
        new.__dict__["meta"] = dict(self.__dict__["meta"])
        if self.plan is not None:
            new.__dict__["plan"] = self.plan
        return new


def _unpickle(
    state: dict[str, Any],
    graphs: tuple[FlatGraph, FlatGraph | None],
    info: TraceInfo,
    class_name: str,
    extras: dict[str, Any],
) -> TracedModule:
    root = nn.Module()
    root.__dict__.update(state)
    restored = (restore(graphs[0]), None if graphs[1] is None else restore(graphs[1]))
    new = TracedModule.build(root, restored, info, class_name)
    new.__dict__.update(extras)
    return new


def decides_by_sizes(graph: Graph) -> bool:
    """Whether a graph refuses some sizes, or an order of keyword arguments, that the model may take."""
    return any(node.target is check or (node.target is expect_order and len(node.args[1]) > 1) for node in graph.nodes)


def capture_of(module: torch.nn.Module) -> TraceInfo:
    """The capture that ``module`` was made from."""
    info = getattr(module, "info", None)
    if not isinstance(module, TracedModule) or not isinstance(info, TraceInfo):
        raise ArgumentError(
            f"expected a module made by chase_fx.trace, found {type(module).__name__}; "
            "call chase_fx.trace(model, args) first"
        )
    return info
