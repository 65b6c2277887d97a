"""``trace``: a model and example inputs in, a ``torch.fx.GraphModule`` that is called exactly like the model out.

The model is copied, run in eval mode, and, if anything but a leaf module read ``self.training``, once more in train
mode. Two captures of the same structure become one graph whose differing constants are chosen by the module's mode;
where the structure differs (auxiliary heads) the module keeps both graphs. Where data or, in train mode, random draws
decide which code runs, more captures find the other ways (see :mod:`.alternatives`).
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from chase_fx.errors import CaptureError
from chase_fx.graphs.alternatives import both_ways
from chase_fx.graphs.attempts import Captured, Inputs, Way, copy_of
from chase_fx.graphs.autocast import casts
from chase_fx.graphs.duplicate import duplicate
from chase_fx.graphs.garbage import uncollected
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.inputs import check_devices, check_model, given
from chase_fx.graphs.leaves import Leaves, declared
from chase_fx.graphs.merge import merge, share_constants, share_rebuilds
from chase_fx.graphs.modes import FLAG, TrainingFlag, has_own_train, modes_by_train
from chase_fx.graphs.precision import Change, apply_changes, compare, in_precision, may_follow, other_precision
from chase_fx.graphs.provenance import tell_data_from_sizes
from chase_fx.graphs.recapture import Recapture, written
from chase_fx.graphs.recorder import Recorder
from chase_fx.graphs.remembered import Attributes, decides_by_memory, remade
from chase_fx.graphs.traced import TracedModule, TraceInfo, decides_by_sizes
from chase_fx.graphs.untouched import check_untouched, held_tensors
from chase_fx.graphs.variants import Variants
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in
from chase_fx.graphs.whole import Function, functions

__all__ = ["SpecializationWarning", "trace"]


class SpecializationWarning(UserWarning):
    """The forward read tensor data into Python; the graph refuses data by which Python would decide otherwise."""


@uncollected()
@normal_tensors()
def trace(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaves: Leaves | None = None,
    whole: Sequence[Function] = (),
) -> TracedModule:
    """Capture ``model`` as it runs on example inputs.

    Args:
        model: any module; it is not changed.
        args: the positional arguments of ``model.forward``: a tuple, or a single tensor.
        kwargs: its keyword arguments.
        leaves: classes of your own modules that stay whole in the graph, each with the size attributes that follow
            its tensors: ``{MyLinear: (("out_features", "weight", 0), ("in_features", "weight", 1))}``. Their
            ``forward`` must take its sizes from these attributes or from tensors.
        whole: functions (of the top level of a Python module) that stay one call, for the data decides what they do:
            ``[torchvision.ops.boxes.batched_nms]``. What goes in and comes out keeps its channels.

    Returns:
        A GraphModule over a copy of the model's parameters, with the model's module tree, ``state_dict`` keys,
        signature and output structure. Batch size, resolution and sequence length stay free where the model leaves
        them free. Where sizes decide which code runs, the first call with sizes that lead another way captures it too.

    Raises:
        ArgumentError: an argument of a type that no call could honour.
        NothingToPruneError: the model has no parameters.
        DeviceMismatchError: model and inputs are on different devices.
        CaptureError: the model failed on the inputs (its own exception is the cause), or its forward did something
            whose origin can't be captured.

    Example:
        >>> import torch, chase_fx
        >>> traced = chase_fx.trace(torch.nn.Linear(4, 2), torch.zeros(3, 4))
        >>> traced(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """
    check_model(model)
    arguments, keywords, bound = given(model, args, kwargs)
    device = check_devices(model, (arguments, keywords))
    held = held_tensors(model)
    inputs = Inputs(bound, arguments, keywords, device, declared(leaves, model), functions(whole))
    meta = device is not None and device.type == "meta"
    graph, capture, recorder = both_ways(model, inputs, Way(training=False, fake=meta))
    if not meta and (memories := _memories(model, inputs, graph, recorder)):
        inputs = replace(inputs, forgotten=memories)
        graph, capture, recorder = both_ways(model, inputs, Way(training=False))
    root = copy_of(model) if meta else recorder.root
    train: Captured | None = None
    train_error = None
    if recorder.reads_training:
        try:
            train = both_ways(model, inputs, Way(training=True, fake=meta))
        except CaptureError as e:  # the model itself can't train on these inputs, so the graph can't either
            train_error = str(e)
    precision = other_precision(root, casts=casts(graph)) if recorder.reads_dtype and not meta else None
    follow = () if precision is None else _followers(model, inputs, graph, precision, training=False)
    follows: tuple[tuple[Change, ...], ...] = (follow,)
    constants = dict(recorder.arguments.constants)
    captures = [capture]
    train_graph = None
    if train is not None:
        train_graph, train_capture, train_recorder = train
        captures.append(train_capture)
        share_constants(train_graph, train_recorder.tape, train_recorder.arguments.constants, constants)
        readers = sorted(recorder.mode_readers | train_recorder.mode_readers)
        modes = {name: (recorder.modes[name], train_recorder.modes[name]) for name in readers}
        root.add_module(FLAG, TrainingFlag(dict(modules_of(root)), modes))
        share_rebuilds(train_graph, train_recorder.arguments.rebuilds, recorder.arguments.rebuilds)
        if merge(graph, train_graph):
            train_graph = None
    if precision is not None:
        apply_changes(graph, follow, root, precision[0])
        if train_graph is not None:
            again = _followers(model, inputs, train_graph, precision, training=True)
            apply_changes(train_graph, again, root, precision[0])
            follows = (follow, again)
    _complete(root, model, [recorder] if train is None else [train[2], recorder], constants)
    specialised = [*recorder.specialised, *(train[2].specialised if train is not None else ())]
    read = [*specialised, *recorder.decided, *(train[2].decided if train is not None else ())]
    if read:
        warnings.warn(
            "the forward reads tensor data or random numbers into Python. Where the graph can't hold both ways, and "
            "where it is compiled, it keeps the way that the example took and refuses data that take another: "
            + "; ".join(dict.fromkeys(read)),
            SpecializationWarning,
            stacklevel=4,  # past the decorators
        )
    check_untouched(model, held, root)
    structure, aliases = _structure(root)
    info = TraceInfo(
        model=type(model).__name__,
        captures=tuple(captures),
        args=arguments,
        kwargs=keywords,
        specialised=tuple(specialised),
        structure=structure,
        aliases=aliases,
        constants=frozenset(constants),
        train_error=train_error,
        leaves=inputs.leaves,
        deciders=recorder.deciders,
        reads=recorder.reads,
        follows=follows if any(r.reads_dtype for r in (recorder, *([] if train is None else [train[2]]))) else None,
        modes=modes_by_train(copy_of(model)) if has_own_train(model) else {},
    )
    return _built(root, (graph, train_graph), info, model, partial(trace, leaves=leaves, whole=whole))


def _built(
    root: nn.Module,
    graphs: tuple[Graph, Graph | None],
    info: TraceInfo,
    model: nn.Module,
    again: Callable[..., TracedModule],
) -> TracedModule:
    """The module, with the means to capture again where a graph refuses sizes or does not hold in another precision."""
    for graph, capture in zip(graphs, info.captures, strict=False):
        if graph is not None:
            tell_data_from_sizes(graph, capture.tape)
    traced = TracedModule.build(root, graphs, info, info.model)
    if info.follows is not None or any(map(decides_by_sizes, traced.graphs())):
        traced.variants = Variants(Recapture(again, model), written(info, "parameter"))
    return traced


def _memories(model: nn.Module, inputs: Inputs, graph: Graph, recorder: Recorder) -> Attributes:
    """What the model remembers of earlier forwards, where the graph holds for the sizes of these only."""

    def run(prepare: Callable[[nn.Module], None]) -> tuple[nn.Module, Any]:
        root = copy_of(model).eval()
        prepare(root)
        args, kwargs = duplicate((inputs.args, inputs.kwargs), {})
        return root, root(*args, **kwargs)

    return remade(run, model, decides_by_memory(graph, model, recorder.code))


def _complete(
    root: nn.Module, model: nn.Module, recorders: Sequence[Recorder], constants: Mapping[str, torch.Tensor]
) -> None:
    """Give the module tree the modes of the model, and what the graphs need besides the model's own."""
    modes = {name: m.training for name, m in modules_of(model)}
    for name, module in modules_of(root):
        if module.training is not modes.get(name, model.training):
            module.training = not module.training
    for recorder in recorders:
        for name, rebuild in recorder.arguments.rebuilds.items():
            root.add_module(name, rebuild)
    for name, tensor in constants.items():
        root.register_buffer(name, tensor, persistent=False)


def _followers(
    model: nn.Module, inputs: Inputs, graph: Graph, precision: tuple[torch.dtype, torch.dtype], *, training: bool
) -> tuple[Change, ...]:
    """The arguments in ``graph`` that follow the model's precision, found by a capture in another one.

    On meta tensors first, for that costs no arithmetic; on real ones if the forward depends on data or if torch casts,
    which it does not on meta tensors. Where neither works nothing is known, and nothing follows.
    """
    if not may_follow(graph, precision[0]):
        return ()
    root = copy_of(model)
    for device in (None,) if casts(graph) else (torch.device("meta"), None):
        with in_precision(root, *precision, device) as moved:
            args, kwargs = moved(inputs.args), moved(inputs.kwargs)
            bound = inspect.BoundArguments(inputs.bound.signature, OrderedDict(moved(dict(inputs.bound.arguments))))
            home = inputs.device if device is None else device
            there = replace(inputs, bound=bound, args=args, kwargs=kwargs, device=home)
            try:
                with device or nullcontext():
                    found = both_ways(root, there, Way(training=training))[0]
            except CaptureError:
                continue
        return tuple(compare(graph, found, *precision) or ())
    return ()


def _structure(root: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, and the first name of every tensor that has several."""
    structure: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _named_tensors(root):
        structure[name] = tuple(tensor.shape)
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return structure, aliases


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    modules = modules_of(root)
    yield from parameters_in(modules).items()
    yield from buffers_in(modules).items()
