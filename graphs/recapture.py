"""One more capture of a model, from the module that its first capture became.

The first capture keeps a copy of the model without values. With the module's tensors in it, it is the model again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from chase_fx.errors import CaptureError, ChaseError
from chase_fx.graphs.attempts import copy_of
from chase_fx.graphs.autocast import casts
from chase_fx.graphs.duplicate import copied, duplicate
from chase_fx.graphs.forwards import forward_of
from chase_fx.graphs.modes import FLAG, TrainingFlag
from chase_fx.graphs.opaque import Rebuild
from chase_fx.graphs.precision import Change, compare, in_precision
from chase_fx.graphs.shadows import given_path
from chase_fx.graphs.traced import TracedModule, TraceInfo, capture_of
from chase_fx.graphs.variants import Variant
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in

__all__ = ["Recapture", "added", "calls_of", "check_state", "move_in", "state_of", "variant_of", "written"]


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, under each of its names."""
    modules = modules_of(module)
    return {**parameters_in(modules), **buffers_in(modules)}


class Recapture:
    """Captures a model again, on other inputs.

    Args:
        trace: makes a traced module of a model, its arguments and its keyword arguments.
        model: the one that was captured.
    """

    def __init__(self, trace: Callable[..., TracedModule], model: nn.Module) -> None:
        self._trace = trace
        self._model = copy_of(model, lambda tensor: torch.empty_like(tensor, device="meta"))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variant:
        """The graph for these inputs, for a module that nothing was cut from."""
        traced = self.capture(state_of(module), args, kwargs)
        with added(module) as names:
            flag = move_in(module, traced)
        return variant_of(traced, traced.graphs(), flag, names)

    def follows(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: torch.dtype, other: torch.dtype
    ) -> tuple[tuple[Change, ...], ...] | None:
        """What follows the precision in each graph between these two; None if graphs differ, or nothing can tell."""
        graphs = [self._blank_graphs(args, kwargs, own, kind) for kind in (own, other)]
        if graphs[0] is None or graphs[1] is None or len(graphs[0]) != len(graphs[1]):
            return None
        pairs = zip(graphs[0], graphs[1], strict=True)
        found = [compare(ours, theirs, own, other, strict=True) for ours, theirs in pairs]
        return None if any(changes is None for changes in found) else tuple(tuple(changes or ()) for changes in found)

    def _blank_graphs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: torch.dtype, kind: torch.dtype
    ) -> list[Graph] | None:
        """The graphs of the model in precision ``kind``, captured without values; None if it needs them.

        On meta tensors torch does not cast by itself.
        """
        with warnings.catch_warnings(), in_precision(self._model, own, kind, torch.device("meta")) as moved:
            warnings.simplefilter("ignore")
            try:
                graphs = self._trace(self._model, moved(args), moved(dict(kwargs))).graphs()
            except ChaseError:
                return None
        return None if any(map(casts, graphs)) else graphs

    def capture(
        self, tensors: Mapping[str, torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedModule:
        """The model with ``tensors`` as its parameters and buffers, captured.

        Raises:
            CaptureError: they don't fit, or the model can't be captured on these inputs.
        """
        memo: dict[int, Any] = {}
        for name, blank in state_of(self._model).items():
            if id(blank) in memo:  # tied to one that came before
                continue
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != blank.shape:
                found = "is gone" if tensor is None else f"has shape {tuple(tensor.shape)}, not {tuple(blank.shape)}"
                raise CaptureError(f"'{name}' {found}, so the module is no longer the model that was captured")
            new = copied(tensor.detach(), {})
            if isinstance(blank, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(blank)] = new
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said at the first capture
            traced = self._trace(duplicate(self._model, memo), args, kwargs)
        check_state(traced)
        return traced


def variant_of(traced: TracedModule, graphs: Sequence[Graph], flag: str, names: Sequence[str]) -> Variant:
    """``graphs``, which were made of those of ``traced``, as other graphs of the module that they were moved into."""
    info = capture_of(traced)
    forward = forward_of(graphs, info.train_error, flag)
    return Variant(forward, tuple(names), calls_of(graphs), written(info, "parameter"), ())


def written(info: TraceInfo, kind: str) -> frozenset[str]:
    """The tensors of the model of one kind that a forward writes to, by a call that says so."""
    found: set[str] = set()
    for capture in info.captures:
        storages = {slot.storage for op in capture.tape.ops for slot in op.writes()}
        found |= {str(s.name) for s in capture.tape.slots if s.kind == kind and s.storage in storages}
    return frozenset(found)


def check_state(traced: TracedModule) -> None:
    """Refuses state in tensors that are not registered: each graph has those as constants of its own.

    Raises:
        CaptureError: a forward writes to such a tensor.
    """
    if names := written(capture_of(traced), "constant"):
        raise CaptureError(
            f"the forward writes to a tensor that the model has not registered ({', '.join(sorted(names))}), which one "
            "graph would not share with another; make it a buffer"
        )


def calls_of(graphs: Iterable[Graph]) -> frozenset[str]:
    """The submodules that graphs call, by the names that the model has for them."""
    return frozenset(given_path(str(n.target)) for graph in graphs for n in graph.nodes if n.op == "call_module")


@contextmanager
def added(module: nn.Module) -> Iterator[list[str]]:
    """Gives the names of what is added to ``module`` inside the block, once it has ended; nothing after an error."""
    before = {*module._buffers, *module._modules}
    names: list[str] = []
    try:
        yield names
    except BaseException:
        for name in {*module._buffers, *module._modules} - before:
            delattr(module, name)
        raise
    names += [name for name in (*module._buffers, *module._modules) if name not in before]


def move_in(module: nn.Module, traced: TracedModule) -> str:
    """Let the graphs of ``traced``, another capture of the same model, run on ``module``.

    ``module`` gets what they need besides the model's own, under new names. Returns that of the module that tells which
    of two graphs runs.
    """
    children = [name for name, child in traced._modules.items() if isinstance(child, (Rebuild, TrainingFlag))]
    new = _new_names(module, [*capture_of(traced).constants, *children])
    for name, buffer in traced._buffers.items():
        if name in new:
            module.register_buffer(new[name], buffer, persistent=False)
    for name, child in traced._modules.items():
        if name in new:
            moved = _flag_of(module, child) if isinstance(child, TrainingFlag) else child
            module.add_module(new[name], moved)
    for graph in traced.graphs():
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target in new:
                node.target = new[node.target]
    return new.get(FLAG, FLAG)


def _new_names(module: nn.Module, names: list[str]) -> dict[str, str]:
    taken = {*module._buffers, *module._modules}
    number = next(n for n in range(1, len(taken) + 2) if taken.isdisjoint(f"{name}_{n}" for name in names))
    return {name: f"{name}_{number}" for name in names}


def _flag_of(module: nn.Module, flag: TrainingFlag) -> TrainingFlag:
    """The same for the modules of ``module``."""
    captured = {name: (pair[0], pair[1]) for name, *pair in zip(flag.names, *flag.captured, strict=True)}
    return TrainingFlag(dict(modules_of(module)), captured).train(module.training)
