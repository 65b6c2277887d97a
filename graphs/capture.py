"""``trace``: a model and example inputs in, a ``torch.fx.GraphModule`` that is called exactly like the model out.

The model is copied, run in eval mode, and, if anything but a leaf module read ``self.training``, once more in train mode.
Two captures of the same structure become one graph whose differing constants are chosen by the module's mode; where the
structure differs (auxiliary heads) the module keeps both graphs.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from chase_fx.errors import ArgumentError, CaptureError, ChaseError, DeviceMismatchError, NothingToPruneError
from chase_fx.graphs.deadcode import remove_dead_nodes
from chase_fx.graphs.recorder import Recorder, _tensors
from chase_fx.graphs.tape import Tape
from chase_fx.graphs.traced import Capture, OutputLeaf, TracedModule, TraceInfo, TrainingFlag

__all__ = ["SpecializationWarning", "expect", "trace"]

_FLAG = "_chase_training"


class SpecializationWarning(UserWarning):
    """The forward read tensor data into Python; the graph holds the value that the example inputs gave."""


def expect(value: Any, expected: Any, name: str) -> None:
    """Refuse a non-tensor argument that differs from the one the graph was captured with."""
    if value is expected:
        return
    if expected is None or value != expected:
        raise ArgumentError(
            f"argument '{name}' was {expected!r} when the graph was captured, found {value!r}; trace again"
        )


def trace(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> TracedModule:
    """Capture ``model`` as it runs on example inputs.

    Args:
        model: any module; it is not changed.
        args: the positional arguments of ``model.forward``: a tuple, or a single tensor.
        kwargs: its keyword arguments.

    Returns:
        A GraphModule over a copy of the model's parameters, with the model's module tree, ``state_dict`` keys, signature
        and output structure. Batch size, resolution and sequence length stay free where the model leaves them free.

    Raises:
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
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    arguments = _as_tuple(args)
    keywords = dict(kwargs or {})
    bound = _bind(model, arguments, keywords)
    device = _check_devices(model, (arguments, keywords))
    root = copy.deepcopy(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device is not None and device.type == "meta" else None
    modes = {id(m): m.training for m in root.modules()}
    graph, capture, recorder = _record(root, bound, device, fake, training=False)
    train: tuple[Graph, Capture, Recorder] | None = None
    if recorder.reads_training:
        train = _record(root, bound, device, fake, training=True)
    for module in root.modules():
        module.training = modes[id(module)]
    constants = dict(recorder.constants)
    captures = [capture]
    train_graph = None
    if train is not None:
        train_graph, train_capture, train_recorder = train
        captures.append(train_capture)
        _rename_constants(train_graph, train_recorder, constants)
        if _merge(graph, train_graph):
            root.add_module(_FLAG, TrainingFlag().train(root.training))
            train_graph = None
    for name, tensor in constants.items():
        root.register_buffer(name, tensor, persistent=False)
    if recorder.specialised:
        warnings.warn(
            "the forward reads tensor data into Python, so the graph holds the values that the example inputs gave: "
            + "; ".join(dict.fromkeys(recorder.specialised)),
            SpecializationWarning,
            stacklevel=2,
        )
    structure: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _named_tensors(root):
        structure[name] = tuple(tensor.shape)
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    info = TraceInfo(
        model=type(model).__name__,
        captures=tuple(captures),
        args=arguments,
        kwargs=keywords,
        specialised=tuple(recorder.specialised),
        structure=structure,
        aliases=aliases,
        constants=frozenset(constants),
    )
    return TracedModule.build(root, graph, train_graph, info, type(model).__name__)


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def _as_tuple(args: Any) -> tuple[Any, ...]:
    if isinstance(args, tuple):
        return args
    return tuple(args) if isinstance(args, list) else (args,)


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise CaptureError(
            f"the example inputs don't fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {e}"
        ) from e


def _check_devices(model: nn.Module, inputs: Any) -> torch.device | None:
    state = list(model.parameters())
    if not state:
        raise NothingToPruneError(f"{type(model).__name__} has no parameters, so there is nothing to prune")
    home = {t.device for t in state}
    given = {t.device for t in _tensors(inputs)}
    # Zero-dim tensors may live anywhere; more than one home is a model split over devices, which knows its own ways.
    if len(home) == 1 and given and not given & home:
        raise DeviceMismatchError(
            f"{type(model).__name__} is on {next(iter(home))} but its example inputs are on "
            f"{', '.join(sorted(map(str, given)))}; move one of them with .to()"
        )
    return next(iter(home)) if len(home) == 1 else None


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Fast paths off (they hide the operators), and no complaint about batch statistics of a single value."""
    fast = torch.backends.mha.get_fastpath_enabled()
    verify = F._verify_batch_size
    torch.backends.mha.set_fastpath_enabled(False)
    F._verify_batch_size = lambda size: None
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        F._verify_batch_size = verify


def _faked(fake: FakeTensorMode, value: Any, memo: dict[int, Any]) -> Any:
    """A meta tensor holds no device, so code that makes tensors of its own would mix devices: a fake one claims the CPU."""
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    with fake:
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    out = nn.Parameter(tensor, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else tensor
    memo[id(value)] = out
    return out


def _record(
    root: nn.Module,
    bound: inspect.BoundArguments,
    device: torch.device | None,
    fake: FakeTensorMode | None,
    *,
    training: bool,
) -> tuple[Graph, Capture, Recorder]:
    if fake is not None:
        memo: dict[int, Any] = {}
        for tensor in (*root.parameters(), *root.buffers()):
            _faked(fake, tensor, memo)
        root = copy.deepcopy(root, memo)
        device = torch.device("cpu")
    root.train(training)
    buffers = {name: b.clone() for name, b in root.named_buffers()}
    recorder = Recorder(root, device)
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with torch.no_grad(), _quiet_torch(), fake or nullcontext():
            args, kwargs = _add_inputs(recorder, fake, bound)
            with recorder.running():
                out = root.forward(*args, **kwargs)
            recorder._active = True  # live sizes in the result still write nodes
            recorder.graph.output(recorder.output_to_fx(out))
            recorder._active = False
    except ChaseError:
        raise
    except Exception as e:
        raise CaptureError(
            f"{type(root).__name__}.forward raised {type(e).__name__} on the example inputs"
            f" ({_shapes(bound)}){_where(e)}: {e}"
        ) from e
    finally:
        torch.set_rng_state(rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)
        with torch.no_grad():
            for name, value in buffers.items():
                owner, _, leaf = name.rpartition(".")
                tensor = root.get_submodule(owner)._buffers.get(leaf)
                if tensor is not None and tensor.shape == value.shape:
                    tensor.copy_(value)
    leaves = tuple(_output_leaves(out, recorder.tape, ""))
    if not leaves:
        raise CaptureError(f"{type(root).__name__}.forward returned no tensor, found {type(out).__name__}")
    recorder.tape.release()
    remove_dead_nodes(recorder.graph, root)
    return recorder.graph, Capture("train" if training else "eval", recorder.tape, leaves), recorder


def _add_inputs(
    recorder: Recorder, fake: FakeTensorMode | None, bound: inspect.BoundArguments
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Placeholders for the whole signature. Inputs are aliased, so that no two arguments are the same object."""
    parameters = bound.signature.parameters
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    nodes: list[tuple[Any, Node, str]] = []
    for name, parameter in parameters.items():
        given = name in bound.arguments
        value = bound.arguments.get(name, parameter.default)
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            value = _fresh(value if given else (), fake)
            nodes.append((value, recorder.add_input(f"*{name}", value, Recorder.NO_DEFAULT), name))
            args.extend(value)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            value = _fresh(value if given else {}, fake)
            nodes.append((value, recorder.add_input(f"**{name}", value, Recorder.NO_DEFAULT), name))
            kwargs.update(value)
        else:
            value = _fresh(value, fake)
            default = Recorder.NO_DEFAULT if parameter.default is inspect.Parameter.empty else parameter.default
            nodes.append((value, recorder.add_input(name, value, default), name))
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                kwargs[name] = value
            elif len(args) == len([n for n in nodes if not n[1].target.startswith("*")]) - 1 - len(kwargs):
                args.append(value)
            else:
                kwargs[name] = value
    for value, node, name in nodes:
        recorder.bind_input(value, node, name, expect)
    return tuple(args), kwargs


def _fresh(value: Any, fake: FakeTensorMode | None) -> Any:
    if isinstance(value, torch.Tensor):
        if fake is not None:
            value = _faked(fake, value, {})
        return value.detach().view_as(value) if value.layout is torch.strided else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_fresh(v, fake) for v in value))
    if type(value) in (tuple, list):
        return type(value)(_fresh(v, fake) for v in value)
    if type(value) is dict:
        return {k: _fresh(v, fake) for k, v in value.items()}
    return value


def _shapes(bound: inspect.BoundArguments) -> str:
    parts = []
    for name, value in bound.arguments.items():
        shapes = [str(tuple(t.shape)) for t in _tensors(value)]
        parts.append(f"{name}: {', '.join(shapes)}" if shapes else f"{name}={value!r}")
    return "; ".join(parts)


def _where(error: BaseException) -> str:
    """The innermost line of the user's code that the exception passed through."""
    from chase_fx.graphs.recorder import _SKIPPED_DIRS

    found = ""
    tb = error.__traceback__
    while tb is not None:
        filename = tb.tb_frame.f_code.co_filename
        if not filename.startswith(_SKIPPED_DIRS):
            found = f" at {filename}:{tb.tb_lineno}"
        tb = tb.tb_next
    return found


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


def _rename_constants(graph: Graph, recorder: Recorder, constants: dict[str, torch.Tensor]) -> None:
    """Constants of the second capture that equal one of the first share it; the others get names of their own."""
    names: dict[str, str] = {}
    for name, tensor in recorder.constants.items():
        same = constants.get(name)
        if same is not None and same.dtype == tensor.dtype and torch.equal(same, tensor):
            names[name] = name
            continue
        names[name] = f"{name}_train"
        constants[names[name]] = tensor
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = names[node.target]
    for slot in recorder.tape.slots:
        if slot.kind == "constant" and slot.name in names:
            slot.name = names[slot.name]


# -- one graph for train and eval ---------------------------------------------------------------------------------------


def by_mode(training: bool, in_train: Any, in_eval: Any) -> Any:
    """The constant that belongs to the module's mode."""
    return in_train if training else in_eval


def _merge(graph: Graph, train: Graph) -> bool:
    """Make ``graph`` serve both modes, if the two differ in constants only."""
    ours, theirs = list(graph.nodes), list(train.nodes)
    if len(ours) != len(theirs):
        return False
    twin = dict(zip(theirs, ours, strict=True))
    edits: list[tuple[Node, tuple[Any, ...], dict[str, Any]]] = []
    differ = _Differences(twin)
    for a, b in zip(ours, theirs, strict=True):
        if a.op != b.op or a.target != b.target or len(a.args) != len(b.args) or set(a.kwargs) != set(b.kwargs):
            return False
        marks = [differ(x, y) for x, y in zip(a.args, b.args, strict=True)]
        kmarks = {k: differ(a.kwargs[k], b.kwargs[k]) for k in a.kwargs}
        if differ.failed or (differ.found and a.op == "get_attr"):
            return False
        if differ.found:
            edits.append((a, tuple(marks), kmarks))
            differ.found = False
    if not edits:
        return True
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        flag = graph.call_module(_FLAG)
        flag.meta["source"] = ""
    for node, args, kwargs in edits:
        with graph.inserting_before(node):
            node.args = tuple(_place(graph, flag, a) for a in args)
            node.kwargs = {k: _place(graph, flag, v) for k, v in kwargs.items()}
    return True


class _Choice:
    def __init__(self, in_train: Any, in_eval: Any) -> None:
        self.in_train, self.in_eval = in_train, in_eval


class _Differences:
    """Compares two argument trees; constants that differ become a :class:`_Choice`."""

    def __init__(self, twin: dict[Node, Node]) -> None:
        self.twin = twin
        self.found = self.failed = False

    def __call__(self, a: Any, b: Any) -> Any:
        if isinstance(b, Node) or isinstance(a, Node):
            self.failed = self.failed or not isinstance(b, Node) or self.twin.get(b) is not a
            return a
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            items = [self(x, y) for x, y in zip(a, b, strict=True)]
            return type(a)(items) if not hasattr(a, "_fields") else type(a)(*items)
        if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
            return {k: self(a[k], b[k]) for k in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(self(a.start, b.start), self(a.stop, b.stop), self(a.step, b.step))
        if type(a) is type(b) and a == b:
            return a
        if isinstance(a, (bool, int, float)) and isinstance(b, (bool, int, float)):
            self.found = True
            return _Choice(b, a)
        self.failed = True
        return a


def _place(graph: Graph, flag: Node, value: Any) -> Any:
    if isinstance(value, _Choice):
        if value.in_train is True and value.in_eval is False:
            return flag
        node = graph.call_function(by_mode, (flag, value.in_train, value.in_eval))
        node.meta["source"] = ""
        return node
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_place(graph, flag, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_place(graph, flag, v) for v in value)
    if isinstance(value, dict):
        return {k: _place(graph, flag, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_place(graph, flag, value.start), _place(graph, flag, value.stop), _place(graph, flag, value.step))
    return value
