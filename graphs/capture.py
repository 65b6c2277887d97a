"""``trace``: a model and example inputs in, a ``torch.fx.GraphModule`` that is called exactly like the model out.

The model is copied, run in eval mode, and, if anything but a leaf module read ``self.training``, once more in train
mode. Two captures of the same structure become one graph whose differing constants are chosen by the module's mode;
where the structure differs (auxiliary heads) the module keeps both graphs. Where random draws decide which code runs in
train mode (LayerDrop), more captures find the other ways (see :mod:`.ways`).
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from chase_fx.errors import CaptureError, ChaseError
from chase_fx.graphs.ambient import add_regions, asks, inside_region
from chase_fx.graphs.autocast import casts
from chase_fx.graphs.composition import check_combinations, compose
from chase_fx.graphs.deadcode import remove_dead_nodes
from chase_fx.graphs.drawing import Outcomes
from chase_fx.graphs.draws import restored_generators
from chase_fx.graphs.duplicate import duplicate
from chase_fx.graphs.garbage import uncollected
from chase_fx.graphs.guards import expect
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.inputs import add_inputs, check_devices, check_model, faked, given, shapes
from chase_fx.graphs.leaves import Leaves, declared, plain_recurrence
from chase_fx.graphs.live import HashedError, plain
from chase_fx.graphs.loops import DeadPlaceError, Loops, Place
from chase_fx.graphs.merge import merge, share_constants, share_rebuilds
from chase_fx.graphs.modes import FLAG, TrainingFlag, enter_mode, has_own_train, modes_by_train
from chase_fx.graphs.precision import Change, apply_changes, compare, in_precision, may_follow, other_precision
from chase_fx.graphs.recorder import Recorder
from chase_fx.graphs.runs import OtherStructureError, Pool
from chase_fx.graphs.source import line_of_error
from chase_fx.graphs.standins import ValuesNeeded
from chase_fx.graphs.tape import Tape
from chase_fx.graphs.traced import Capture, OutputLeaf, TracedModule, TraceInfo
from chase_fx.graphs.trees import tensors_in
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in
from chase_fx.graphs.ways import decide, take_long_ways
from chase_fx.graphs.whole import Function, functions

__all__ = ["SpecializationWarning", "trace"]

_functional: Any = nn.functional  # its stub leaves out what is private


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
        them free.

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
    inputs = _Inputs(bound, arguments, keywords, device, declared(leaves, model), functions(whole))
    meta = device is not None and device.type == "meta"
    graph, capture, recorder = _record_eval(model, inputs, _Way(training=False, fake=meta))
    root = _copy(model) if meta else recorder.root
    train: tuple[Graph, Capture, Recorder] | None = None
    train_error = None
    if recorder.reads_training:
        try:
            train = _record_train(model, inputs, _Way(training=True, fake=meta))
        except CaptureError as e:  # the model itself can't train on these inputs, so the graph can't either
            train_error = str(e)
    precision = other_precision(root, casts=casts(graph)) if recorder.reads_dtype and not meta else None
    follow = [] if precision is None else _followers(model, inputs, graph, precision, training=False)
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
    _complete(root, model, [recorder] if train is None else [train[2], recorder], constants)
    specialised = [*recorder.specialised, *(train[2].specialised if train is not None else ())]
    if specialised:
        warnings.warn(
            "the forward reads tensor data or random numbers into Python, so the graph holds the way that it took by "
            "them, and refuses data that take another: " + "; ".join(dict.fromkeys(specialised)),
            SpecializationWarning,
            stacklevel=4,  # past the decorators
        )
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
        modes=modes_by_train(_copy(model)) if has_own_train(model) else {},
    )
    return TracedModule.build(root, graph, train_graph, info, type(model).__name__)


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
    model: nn.Module, inputs: _Inputs, graph: Graph, precision: tuple[torch.dtype, torch.dtype], *, training: bool
) -> list[Change]:
    """The arguments in ``graph`` that follow the model's precision, found by a capture in another one.

    On meta tensors first, for that costs no arithmetic; on real ones if the forward depends on data or if torch casts,
    which it does not on meta tensors. Where neither works nothing is known, and nothing follows.
    """
    if not may_follow(graph, precision[0]):
        return []
    root = _copy(model)
    for device in (None,) if casts(graph) else (torch.device("meta"), None):
        with in_precision(root, *precision, device) as moved:
            args, kwargs = moved(inputs.args), moved(inputs.kwargs)
            bound = inspect.BoundArguments(inputs.bound.signature, OrderedDict(moved(dict(inputs.bound.arguments))))
            home = inputs.device if device is None else device
            there = replace(inputs, bound=bound, args=args, kwargs=kwargs, device=home)
            try:
                with device or nullcontext():
                    found = (_record_train if training else _record_eval)(root, there, _Way(training=training))[0]
            except CaptureError:
                continue
        return compare(graph, found, *precision)
    return []


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


@contextmanager
def _quiet_torch(root: nn.Module) -> Iterator[None]:
    """Fast paths off (they hide the operators), and no complaint about batch statistics of a single value."""
    fast = torch.backends.mha.get_fastpath_enabled()
    verify = _functional._verify_batch_size
    torch.backends.mha.set_fastpath_enabled(False)
    _functional._verify_batch_size = lambda _: None
    try:
        with plain_recurrence(root):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        _functional._verify_batch_size = verify


@dataclass(frozen=True)
class _Inputs:
    """What every capture of one model shares."""

    bound: inspect.BoundArguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device | None
    leaves: Leaves
    whole: tuple[Function, ...]


@dataclass(frozen=True)
class _Way:
    """How a forward is captured.

    Attributes:
        training: in train mode.
        fake: on fake tensors, for the model has no data.
        unroll: loops over the places of a mask are unrolled for every place.
        may_hash: live numbers may be hashed, for caches of functions are watched.
        dead: places that unrolled loops leave out.
        values: contractions are computed, however large.
        outcomes: how random draws are to decide.
        ambient: inside a region of autocast.
    """

    training: bool
    fake: bool = False
    unroll: bool = True
    may_hash: bool = False
    dead: frozenset[Place] = frozenset()
    values: bool = False
    outcomes: Outcomes = field(default_factory=Outcomes)
    ambient: bool = False


def _copy(model: nn.Module, fake: FakeTensorMode | None = None) -> nn.Module:
    state = () if fake is None else (*model.parameters(), *model.buffers())
    try:
        return cast("nn.Module", duplicate(model, {id(t): faked(fake, t) for t in state if fake is not None}))
    except Exception as e:
        raise CaptureError(
            f"{type(model).__name__} can't be copied ({type(e).__name__}: {e}); trace works on a copy, so that the "
            "model is not changed"
        ) from e


def _record_eval(model: nn.Module, inputs: _Inputs, way: _Way) -> tuple[Graph, Capture, Recorder]:
    """The first capture. If loops were unrolled further than the model runs them, it has to give the same result."""
    found = _record(model, inputs, way)
    if found[2].unrolled and not way.fake:
        with torch.no_grad():
            want = list(tensors_in(_copy(model).eval()(*inputs.args, **inputs.kwargs)))
        have = found[2].results
        close = len(want) == len(have) and all(
            a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(want, have, strict=True)
        )
        if not close:
            way = replace(way, unroll=False)
            found = _record(model, inputs, way)
    _add_regions(model, inputs, way, found)
    return found


def _record_train(model: nn.Module, inputs: _Inputs, way: _Way) -> tuple[Graph, Capture, Recorder]:
    """The capture in train mode; where random draws decide which code runs, both ways are in it."""
    graph, found, recorder = _record(model, inputs, way)
    if not recorder.decisions:
        _add_regions(model, inputs, way, (graph, found, recorder))
        return graph, found, recorder
    usual, way = recorder.outcomes.usual, replace(way, values=recorder.standins is None, may_hash=recorder.may_hash)

    def capture(told: tuple[bool, ...]) -> Recorder:
        other = _record(model, inputs, replace(way, outcomes=Outcomes(told, usual)))[2]
        readers.update(other.mode_readers)
        return other

    readers = recorder.mode_readers
    try:
        if take_long_ways(recorder, capture, usual):
            graph, found, recorder = _record(model, inputs, replace(way, outcomes=Outcomes((), usual)))
        pool = Pool(recorder.tape, recorder.arguments.constants, recorder.arguments.rebuilds)
        parts = decide(recorder, capture, pool)
        graph, outputs = compose(parts, pool)
        check_combinations(parts, capture, pool)
        recorder.mode_readers |= readers
    except OtherStructureError as e:
        raise CaptureError(f"random draws decide which code runs, and {e}") from e
    for name, rebuild in pool.rebuilds.items():
        recorder.root.add_module(name, rebuild)
    remove_dead_nodes(graph, recorder.root)
    nodes = frozenset(node.name for node in graph.nodes)
    return graph, replace(found, outputs=outputs, nodes=nodes), recorder


def _add_regions(model: nn.Module, inputs: _Inputs, way: _Way, found: tuple[Graph, Capture, Recorder]) -> None:
    """Regions that the forward enters only inside another one; where it can't run there, no call has any."""
    if asks(found[2].code):
        with suppress(CaptureError):
            add_regions(found[0], _record(model, inputs, replace(way, ambient=True))[0])


def _record(model: nn.Module, inputs: _Inputs, way: _Way) -> tuple[Graph, Capture, Recorder]:
    """One capture, at first without values where they can be done without.

    Every attempt has a copy of the model of its own: what one forward leaves in its modules (a cache of a result) would
    be a constant of the next.
    """
    if inputs.device is None or inputs.device.type != "cpu":
        way = replace(way, values=True)
    while True:
        try:
            return _record_once(model, inputs, way)
        except HashedError:  # from here on caches are watched
            way = replace(way, may_hash=True)
        except (ValuesNeeded, Exception) as e:
            if isinstance(e, DeadPlaceError):
                way = replace(way, dead=way.dead | {e.place})
            elif way.values:
                raise
            way = replace(way, values=True)  # whatever went wrong, the run on real values has the last word


def _record_once(model: nn.Module, inputs: _Inputs, way: _Way) -> tuple[Graph, Capture, Recorder]:
    bound = inputs.bound
    fake = FakeTensorMode(allow_non_fake_inputs=True) if way.fake else None
    device = inputs.device if fake is None else torch.device("cpu")
    root = _copy(model, fake)
    enter_mode(root, training=way.training)
    buffers = [(m, name, b, b.clone()) for m in root.modules() for name, b in m._buffers.items() if b is not None]
    recorder = Recorder(root, device, inputs.leaves, inputs.whole, values=way.values)
    recorder.unroll, recorder.may_hash, recorder.loops = way.unroll, way.may_hash, Loops(way.dead)
    recorder.arguments.model, recorder.outcomes, recorder.training = model, way.outcomes, way.training
    trainable = [p for p in root.parameters() if p.requires_grad]
    try:
        # Gradients stay enabled, so that a no_grad region of the forward can be told from what surrounds it; no
        # parameter asks for one, so no autograd graph is built.
        for p in trainable:
            p.requires_grad = False
        with restored_generators() as state, torch.enable_grad(), _quiet_torch(root), fake or nullcontext():
            args, kwargs = add_inputs(recorder.arguments, fake, bound, len(inputs.args), expect)
            recorder.watch_generators(state)
            with inside_region(device) if way.ambient else nullcontext(), recorder.running():
                out = root(*args, **kwargs)  # with the hooks that it has
            recorder.check_generators()
            recorder.finish(out)
    except ChaseError:
        raise
    except Exception as e:
        place = recorder.loops.dead_place()
        if place is not None:
            raise DeadPlaceError(place) from e
        line = line_of_error(e)
        raise CaptureError(
            f"{type(root).__name__}.forward raised {type(e).__name__} on the example inputs"
            f" ({shapes(bound)}){f' at {line}' if line else ''}: {e}"
        ) from e
    finally:
        for p in trainable:
            p.requires_grad = True
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer
    if recorder.standins is not None:
        _check(recorder, {id(buffer) for _, _, buffer, _ in buffers})
    recorder.results = tuple(tensors_in(out)) if recorder.unrolled else ()
    leaves = tuple(_output_leaves(out, recorder.tape, ""))
    if not leaves:
        raise CaptureError(f"{type(root).__name__}.forward returned no tensor, found {type(plain(out)).__name__}")
    recorder.outputs = leaves
    recorder.tape.release()
    for name, rebuild in recorder.arguments.rebuilds.items():
        root.add_module(name, rebuild)
    composed = way.training and recorder.decisions  # with other captures, in which other nodes are dead
    erased = [] if composed else remove_dead_nodes(recorder.graph, root)
    if any(node.meta.get("by_mode") for node in erased):  # a dropout that nobody reads draws all the same
        recorder.reads_training = True
    nodes = frozenset(node.name for node in recorder.graph.nodes)
    return recorder.graph, Capture("train" if way.training else "eval", recorder.tape, leaves, nodes), recorder


def _check(recorder: Recorder, known: set[int]) -> None:
    """Values are needed if the forward asked for some, or registered new buffers that depend on them."""
    standins, tape = recorder.standins, recorder.tape
    assert standins is not None
    made = [tape.find(buffer) for buffer in recorder.root.buffers() if id(buffer) not in known]
    if standins.gave_up or standins.marks(slot for slot in made if slot is not None):
        raise ValuesNeeded


def _output_leaves(value: Any, tape: Tape, path: str) -> Iterator[OutputLeaf]:
    if isinstance(value, torch.Tensor):
        yield OutputLeaf(path or "output", tape.slot_of(value))
        return
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif hasattr(value, "__dataclass_fields__"):
        items = [(f, getattr(value, f)) for f in value.__dataclass_fields__]
    for key, item in items:
        yield from _output_leaves(item, tape, f"{path}.{key}" if path else str(key))
