"""One capture of a forward: the attempts that it takes, each on a copy of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from chase_fx.errors import CaptureError, ChaseError
from chase_fx.graphs.ambient import inside_region
from chase_fx.graphs.binding import check_unchanged
from chase_fx.graphs.branches import follow
from chase_fx.graphs.deadcode import remove_dead_nodes
from chase_fx.graphs.draws import restored_generators
from chase_fx.graphs.duplicate import duplicate
from chase_fx.graphs.hooks import HookedError
from chase_fx.graphs.inputs import Blank, add_inputs, faked, shapes
from chase_fx.graphs.kernels import plain_kernels
from chase_fx.graphs.leaves import Leaves
from chase_fx.graphs.live import HashedError, forget_texts, plain
from chase_fx.graphs.loops import DeadPlaceError, Loops, Place
from chase_fx.graphs.modes import enter_mode
from chase_fx.graphs.outcomes import Outcomes
from chase_fx.graphs.recorder import Recorder
from chase_fx.graphs.remembered import Attributes, forget
from chase_fx.graphs.restored import restore
from chase_fx.graphs.source import line_of_error
from chase_fx.graphs.standin_results import Zeros
from chase_fx.graphs.standins import StandIns, ValuesNeeded
from chase_fx.graphs.tape import Slot
from chase_fx.graphs.traced import Capture, OutputLeaf
from chase_fx.graphs.trees import named_tensors, tensors_in
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in
from chase_fx.graphs.whole import Function

__all__ = ["Captured", "Inputs", "Way", "captured", "copy_of", "quiet_torch", "record"]

_functional: Any = nn.functional  # its stub leaves out what is private
Captured = tuple[Graph, Capture, Recorder]


@dataclass(frozen=True)
class Inputs:
    """What every capture of one model shares.

    Attributes:
        forgotten: what its copies are not to remember of earlier forwards.
    """

    bound: inspect.BoundArguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device | None
    leaves: Leaves
    whole: tuple[Function, ...]
    forgotten: Attributes = frozenset()


@dataclass(frozen=True)
class Way:
    """How a forward is captured.

    Attributes:
        training: in train mode.
        fake: without data, for the model has none.
        unroll: loops over the places of a mask are unrolled for every place.
        may_hash: live numbers may be hashed, for caches of functions are watched.
        dead: places that unrolled loops leave out.
        values: contractions are computed, however large; without data, all tensors are fake.
        outcomes: how decisions are to go.
        ambient: inside a region of autocast.
        apart: modules with hooks are taken apart.
    """

    training: bool
    fake: bool = False
    unroll: bool = True
    may_hash: bool = False
    dead: frozenset[Place] = frozenset()
    values: bool = False
    outcomes: Outcomes = field(default_factory=Outcomes)
    ambient: bool = False
    apart: bool = False


@contextmanager
def quiet_torch(root: nn.Module) -> Iterator[None]:
    """Fast paths off (they hide the operators), and no complaint about batch statistics of a single value."""
    fast = torch.backends.mha.get_fastpath_enabled()
    verify = _functional._verify_batch_size
    torch.backends.mha.set_fastpath_enabled(False)
    _functional._verify_batch_size = lambda _: None
    try:
        with plain_kernels(root):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        _functional._verify_batch_size = verify


def copy_of(model: nn.Module, blank: Blank | None = None) -> nn.Module:
    """A copy of ``model`` to run, whose tensors ``blank`` makes."""
    state = () if blank is None else (*model.parameters(), *model.buffers())
    try:
        return cast("nn.Module", duplicate(model, {id(t): _made(blank, t) for t in state if blank is not None}))
    except Exception as e:
        raise CaptureError(
            f"{type(model).__name__} can't be copied ({type(e).__name__}: {e}); trace works on a copy, so that the "
            "model is not changed"
        ) from e


def _made(blank: Blank, tensor: torch.Tensor) -> torch.Tensor:
    made = blank(tensor)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def record(model: nn.Module, inputs: Inputs, way: Way) -> Recorder:
    """One capture, at first without values where they can be done without.

    Every attempt has a copy of the model of its own: what one forward leaves in its modules (a cache of a result) would
    be a constant of the next. A model without data runs on stand-ins alone at first, then on fake tensors, which are
    slower but hold for every operator.
    """
    if not way.fake and (inputs.device is None or inputs.device.type != "cpu"):
        way = replace(way, values=True)
    while True:
        try:
            return _once(model, inputs, way)
        except HashedError:  # from here on caches are watched
            way = replace(way, may_hash=True)
        except HookedError:
            way = replace(way, apart=True)
        except (ValuesNeeded, Exception) as e:
            if isinstance(e, DeadPlaceError):
                way = replace(way, dead=way.dead | {e.place})
            elif way.values:
                raise
            way = replace(way, values=True)  # whatever went wrong, the run on real values has the last word


def _once(model: nn.Module, inputs: Inputs, way: Way) -> Recorder:
    bound = inputs.bound
    fake = FakeTensorMode(allow_non_fake_inputs=True) if way.fake and way.values else None
    zeros = Zeros()
    blank = partial(faked, fake) if fake is not None else zeros.laid_out_as if way.fake else None
    device = torch.device("cpu") if way.fake else inputs.device
    root = copy_of(model, blank)
    forget(root, inputs.forgotten)
    enter_mode(root, training=way.training)
    standins = None if way.values else StandIns(zeros, hollow=way.fake)
    recorder = Recorder(root, device, inputs.leaves, inputs.whole, standins=standins)
    recorder.unroll, recorder.may_hash, recorder.given.apart = way.unroll, way.may_hash, way.apart
    recorder.arguments.model, recorder.loops, recorder.outcomes, recorder.training = (
        model,
        Loops(way.dead),
        way.outcomes,
        way.training,
    )
    trainable = [p for p in parameters_in(recorder.modules).values() if p.requires_grad]
    owned = [(m, name, b) for _, m in recorder.modules for name, b in m._buffers.items() if b is not None]
    buffers = [(m, name, b, b if way.fake else b.clone()) for m, name, b in owned]
    try:
        # Gradients stay enabled, so that a no_grad region of the forward can be told from what surrounds it; no
        # parameter asks for one, so no autograd graph is built.
        for p in trainable:
            p.requires_grad = False
        with restored_generators() as state, torch.enable_grad(), quiet_torch(root), fake or nullcontext():
            args, kwargs = add_inputs(recorder.arguments, blank, bound, len(inputs.args))
            recorder.watch_generators(state)
            with inside_region(device) if way.ambient else nullcontext(), recorder.running():
                out = root(*args, **kwargs)  # with the hooks that it has
            recorder.check_generators()
            check_unchanged(recorder.arguments)
            recorder.finish(out)
            restore(root, None if way.fake else model, recorder.tape, recorder.arguments.constants)
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
        forget_texts()  # the numbers hold the recorder, and that the model
        _put_back(trainable, buffers)
    if recorder.standins is not None:
        _check(recorder, {id(buffer) for _, _, buffer, _ in buffers})
    recorder.results = tuple(tensors_in(out)) if recorder.unrolled else ()
    leaves = tuple(
        OutputLeaf(path, recorder.tape.slot_of(t)) for path, t in (*named_tensors(out), *recorder.arguments.written)
    )
    if not leaves:
        raise CaptureError(f"{type(root).__name__}.forward returned no tensor, found {type(plain(out)).__name__}")
    recorder.outputs = leaves
    recorder.tape.release()
    for name, rebuild in recorder.arguments.rebuilds.items():
        root.add_module(name, rebuild)
    return recorder


def _put_back(
    trainable: Iterable[nn.Parameter], buffers: Iterable[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]
) -> None:
    """The copy is as it was before the forward: which parameters are trained, and the values of buffers."""
    for p in trainable:
        p.requires_grad = True
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer


def captured(recorder: Recorder) -> Captured:
    """What is left of a recording without dead nodes."""
    erased = remove_dead_nodes(recorder.graph, recorder.root)
    if any(node.meta.get("by_mode") for node in erased):  # a dropout that nobody reads draws all the same
        recorder.reads_training = True
    nodes = frozenset(node.name for node in recorder.graph.nodes)
    mode = "train" if recorder.training else "eval"
    conditions = tuple(slot for node in recorder.graph.nodes if node.target is follow for slot in _slots_behind(node))
    return recorder.graph, Capture(mode, recorder.tape, recorder.outputs, nodes, conditions), recorder


def _slots_behind(node: Node) -> Iterator[Slot]:
    """The tensors that ``node`` is made of, directly or by way of numbers."""
    for part in node.all_input_nodes:
        if isinstance(part.meta.get("slot"), Slot):
            yield part.meta["slot"]
        else:
            yield from _slots_behind(part)


def _check(recorder: Recorder, known: set[int]) -> None:
    """Values are needed if the forward asked for some, or registered new buffers that depend on them."""
    standins, tape = recorder.standins, recorder.tape
    assert standins is not None
    buffers = buffers_in(modules_of(recorder.root)).values()
    made = [tape.find(buffer) for buffer in buffers if id(buffer) not in known]
    kept = standins.hollow and bool(recorder.arguments.constants)  # which may be made of what holds no data
    if kept or standins.gave_up or standins.marks(slot for slot in made if slot is not None):
        raise ValuesNeeded
