"""Recording of a forward: torch-level calls into an FX graph, ATen calls onto a tape.

Nothing is proxied: the model runs on its real tensors, so all Python control flow resolves by itself. A
``TorchFunctionMode`` sees every call of the torch API, a patched ``Module.__call__`` sees every module.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from chase_fx.errors import CaptureError
from chase_fx.graphs.leaves import is_leaf, may_be_leaf
from chase_fx.graphs.live import LiveInt, is_live
from chase_fx.graphs.tape import Tape, TapeMode

__all__ = ["Recorder"]

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIRS = tuple(
    os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir, d)) + os.sep
    for d in ("graphs", "passes", "chase_fx")
)
_SKIPPED_DIRS = (_TORCH_DIR, *_OWN_DIRS, os.path.dirname(__file__) + os.sep)

# Python functions that torch presents as one call although they hold sizes (embed_dim == heads * head_dim).
_EXPANDED: frozenset[Callable[..., Any]] = frozenset({F.multi_head_attention_forward})

# Properties whose value is no tensor and no size; reading them leaves no trace.
_PLAIN_PROPERTIES = frozenset(
    {
        "dtype", "device", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "ndim",
        "is_leaf", "grad_fn", "grad", "names", "is_nested", "itemsize", "is_mps", "is_xpu", "is_xla", "_version",
        "_backward_hooks", "output_nr", "_base", "name", "is_mkldnn", "is_sparse_csr", "is_ipu", "is_vulkan", "is_ort",
        "is_hpu", "is_maia", "is_mtia",
    }
)  # fmt: skip
# Calls whose result is a Python value computed from tensor *data*: the graph is specialised to it.
_READS_DATA = frozenset(
    {
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "equal", "allclose",
        "is_nonzero", "__array__", "__contains__",
    }
)  # fmt: skip
_SIZE_CALLS = frozenset({"size", "numel", "nelement", "__len__", "dim", "ndimension"})
_MAGIC = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


class Recorder(TorchFunctionMode):
    """Writes one forward of ``root`` to ``graph`` and ``tape``."""

    def __init__(self, root: nn.Module, device: torch.device | None) -> None:
        super().__init__()
        self.root = root
        self.graph = Graph()
        self.tape = Tape()
        self.tape_mode = TapeMode(self.tape)
        self.device = device
        self.constants: dict[str, torch.Tensor] = {}
        self.specialised: list[str] = []
        self.reads_training = False
        self._nodes: dict[int, Node] = {}
        self._alive: list[Any] = []
        self._state: dict[int, str] = {}
        self._names = {id(m): name for name, m in reversed(list(root.named_modules(remove_duplicate=False)))}
        self._active = False
        self._leaf_reads_training = False
        self._device_node: Node | None = None
        self._first_input: Node | None = None
        for kind, items in (("parameter", root.named_parameters), ("buffer", root.named_buffers)):
            for name, tensor in items(remove_duplicate=False):
                if id(tensor) not in self._state:
                    self._state[id(tensor)] = name
                    self.tape.add(tensor, kind, name)

    # -- running ------------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record everything inside the block."""
        training = {id(m): m.training for m in self.root.modules()}
        hidden = [m for m in self.root.modules() if not is_leaf(m)]
        original_call, original_getattr = nn.Module.__call__, nn.Module.__getattr__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not recorder._active:
                return original_call(module, *args, **kwargs)
            return recorder._call_module(module, original_call, args, kwargs)

        def getattribute(module: nn.Module, name: str) -> Any:
            if name == "training" and id(module) in training:
                if recorder._active:
                    recorder.reads_training = True
                else:
                    recorder._leaf_reads_training = True
                return training[id(module)]
            return original_getattr(module, name)

        for module in hidden:  # so that reading self.training comes through __getattr__ and is noticed
            module.__dict__.pop("training", None)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = getattribute  # type: ignore[method-assign]
        try:
            with self.tape_mode, self:
                self._active = True
                yield
        finally:
            self._active = False
            nn.Module.__call__ = original_call  # type: ignore[method-assign]
            nn.Module.__getattr__ = original_getattr  # type: ignore[method-assign]
            for module in hidden:
                module.__dict__.setdefault("training", training[id(module)])

    def recording(self) -> bool:
        """Whether live numbers are to write their arithmetic down."""
        return self._active

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._active = False
        try:
            yield
        finally:
            self._active = True

    # -- modules ------------------------------------------------------------------------------------------------------

    def _call_module(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self._names.get(id(module))
        if not name:  # the root itself, or a module made during the forward
            return original(module, *args, **kwargs)
        if is_leaf(module):
            out, start = self._run_leaf(module, original, args, kwargs)
            return self._record_leaf(name, args, kwargs, out, start)
        if may_be_leaf(module) and len(args) >= 1 and isinstance(args[0], torch.Tensor):
            self._leaf_reads_training = False
            rng = torch.get_rng_state()
            mark = len(self.tape.ops)
            out, start = self._run_leaf(module, original, args, kwargs)
            with torch._C.DisableTorchFunction():
                same_shape = isinstance(out, torch.Tensor) and out.shape == args[0].shape
            if self._leaf_reads_training and same_shape:
                return self._record_leaf(name, args, kwargs, out, start)
            del self.tape.ops[mark:]
            torch.set_rng_state(rng)
        return original(module, *args, **kwargs)

    def _run_leaf(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, int]:
        start = len(self.tape.ops)
        with self._paused(), torch._C.DisableTorchFunction():
            return original(module, *args, **kwargs), start

    def _record_leaf(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, start: int) -> Any:
        fx_args, fx_kwargs = self.to_fx(args), self.to_fx(kwargs)
        node = self.graph.call_module(name, fx_args, fx_kwargs)
        return self._finish(node, out, args, kwargs, start, in_place=False)

    # -- functions ----------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._active:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read_property(func, args)
        if name in _SIZE_CALLS:
            return self._read_size(name, func, args, kwargs)
        if name in ("__set__", "__delete__"):
            where = source_line()
            raise CaptureError(
                f"the forward assigns to a tensor's property ({func}) at {where}; rewrite it as an operation"
            )
        if func in _EXPANDED:
            return self._expand(func, args, kwargs)
        start = len(self.tape.ops)
        with self._paused():
            out = func(*args, **kwargs)
        if not _holds_tensor(out) and name != "__setitem__":
            if name in _READS_DATA:
                self.specialised.append(f"{name} at {source_line()}")
            return out
        target = _MAGIC.get(name, func)
        fx_args, fx_kwargs = self.to_fx(tuple(args)), self.to_fx(dict(kwargs))
        if _is_method(target):
            node = self.graph.call_method(name, fx_args, fx_kwargs)
        else:
            node = self.graph.call_function(target, fx_args, fx_kwargs)
        in_place = _is_in_place(name) or "out" in kwargs
        return self._finish(node, out, args, kwargs, start, in_place)

    def _expand(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the body of a Python function of torch under the recorder, instead of taking it as one call."""
        module = sys.modules[func.__module__]
        original = module.has_torch_function  # type: ignore[attr-defined]
        module.has_torch_function = lambda _: False  # type: ignore[attr-defined]
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            module.has_torch_function = original  # type: ignore[attr-defined]

    def _finish(
        self, node: Node, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], start: int, in_place: bool
    ) -> Any:
        source = source_line()
        node.meta["source"] = source
        node.meta["in_place"] = in_place
        if not in_place:
            given = {id(t) for t in _tensors((args, kwargs))}
            if any(id(t) in given for t in _tensors(out)):
                # Same object in, same object out (dropout in eval mode): give it an identity of its own, or a later use of
                # the input would be mistaken for a use of the output.
                with self._paused(), torch._C.DisableTorchFunction():
                    out = _map_tensors(out, lambda t: torch.ops.aten.alias.default(t) if id(t) in given else t)
        operands = tuple(self.tape.slot_of(t) for t in _tensors((args, kwargs)))
        call = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        for op in self.tape.ops[start:]:
            op.node, op.source, op.call, op.operands = node.name, source, call, operands
        node.meta["tape"] = (start, len(self.tape.ops))
        self.bind(out, node)
        return out

    def bind(self, value: Any, node: Node) -> None:
        """``node`` computes ``value``; elements of tuples and lists get a ``getitem`` each."""
        if isinstance(value, torch.Tensor):
            self._nodes[id(value)] = node
            self._alive.append(value)
            node.meta["slot"] = self.tape.slot_of(value)
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                if _holds_tensor(item):
                    self.bind(item, self.call(operator.getitem, (node, i), plain=True))
        elif isinstance(value, dict):
            for key, item in value.items():
                if _holds_tensor(item):
                    self.bind(item, self.call(operator.getitem, (node, key), plain=True))
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                if _holds_tensor(getattr(value, f.name)):
                    self.bind(getattr(value, f.name), self.call(getattr, (node, f.name), plain=True))

    # -- sizes and properties -----------------------------------------------------------------------------------------

    def _read_property(self, getter: Any, args: tuple[Any, ...]) -> Any:
        name = getattr(getattr(getter, "__self__", None), "__name__", "")
        tensor = args[0]
        start = len(self.tape.ops)
        with self._paused(), torch._C.DisableTorchFunction():
            out = getter(*args)
        if name == "shape":
            return self._live_size(tensor, out)
        if name in _PLAIN_PROPERTIES:
            return out
        if not isinstance(out, torch.Tensor):
            return out
        node = self.graph.call_function(getattr, (self.to_fx(tensor), name))
        return self._finish(node, out, args, {}, start, in_place=False)

    def _read_size(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._paused(), torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        if name in ("dim", "ndimension", "__len__"):
            return out
        tensor = args[0] if args else kwargs["input"]
        if name == "size":
            if isinstance(out, torch.Size):
                return self._live_size(tensor, out)
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._live_dim(tensor, int(dim) % tensor.dim(), out)
        source = self.to_fx(tensor)
        return LiveInt(out, self, lambda: self.graph.call_method("numel", (source,)))

    def _live_size(self, tensor: torch.Tensor, size: torch.Size) -> torch.Size:
        return torch.Size(self._live_dim(tensor, d, n) for d, n in enumerate(size))

    def _live_dim(self, tensor: torch.Tensor, dim: int, size: int) -> LiveInt:
        source = self.to_fx(tensor)
        return LiveInt(size, self, lambda: self.call(torch.Tensor.size, (source, dim), plain=True, method="size"))

    # -- translation to FX ----------------------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], *, plain: bool = False, method: str = "") -> Node:
        """Write ``fn(*args)``; with ``plain`` the arguments are FX arguments already."""
        fx_args = args if plain else self.to_fx(args)
        node = self.graph.call_method(method, fx_args) if method else self.graph.call_function(fn, fx_args)
        node.meta["source"] = ""
        return node

    def to_fx(self, value: Any) -> Any:
        """``value`` as an FX argument: tensors and live numbers become nodes."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if value is None or type(value) in (
            bool,
            int,
            float,
            str,
            complex,
            torch.dtype,
            torch.layout,
            torch.memory_format,
        ):
            return value
        if is_live(value):
            return value.node()
        if isinstance(value, torch.Size):
            return tuple(self.to_fx(v) for v in value)
        if isinstance(value, (tuple, list)):
            items = [self.to_fx(v) for v in value]
            return (
                type(value)(*items)
                if hasattr(value, "_fields")
                else (items if isinstance(value, list) else tuple(items))
            )
        if isinstance(value, dict):
            return {k: self.to_fx(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.to_fx(value.start), self.to_fx(value.stop), self.to_fx(value.step))
        if isinstance(value, torch.device):
            return self._device(value)
        if isinstance(value, (np.integer, np.floating, np.bool_)):
            return value.item()
        if isinstance(value, np.ndarray):
            return self.node_of(torch.from_numpy(value))
        if isinstance(value, range):
            return value
        if isinstance(value, int) and not isinstance(value, enum.Enum):
            return int(value)
        if value is Ellipsis or isinstance(value, (enum.Enum, types.FunctionType, types.BuiltinFunctionType)):
            return value
        if isinstance(value, torch.Generator):
            raise CaptureError(f"a torch.Generator is passed to an operation at {source_line()}; graphs can't hold one")
        return value

    def node_of(self, tensor: torch.Tensor) -> Node:
        """The node that computes ``tensor``; a ``get_attr`` for parameters, buffers and constants."""
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        name = self._state.get(id(tensor))
        if name is None:
            name = self._constant(tensor)
        # FX wants targets that exist on the owning module; they do by the time a GraphModule is made.
        node = self.graph.create_node("get_attr", name, (), {})
        node.meta["slot"] = self.tape.slot_of(tensor)
        node.meta["source"] = ""
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        return node

    def _constant(self, tensor: torch.Tensor) -> str:
        known = self.tape._by_id.get(id(tensor))
        made_here = known is not None and any(known in op.outs for op in reversed(self.tape.ops))
        lifted = (
            made_here
            and known is not None
            and all(op.op is torch.ops.aten.lift_fresh.default for op in self.tape.ops if known in op.outs)
        )
        if (made_here and not lifted) or tensor.grad_fn is not None:
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} used at {source_line()} was computed outside of the torch API "
                "(torch.jit.script, vmap, or a cache of an earlier forward), so its origin can't be captured; compute it "
                "with torch operations inside forward, or register it as a buffer"
            )
        name = f"_chase_constant_{len(self.constants)}"
        self.constants[name] = tensor
        self._state[id(tensor)] = name
        slot = self.tape.slot_of(tensor)
        slot.kind, slot.name = "constant", name
        return name

    def _device(self, value: torch.device) -> Any:
        """A device is read from an input, so that the graph still works after ``.to()``."""
        if self.device is None or torch.device(value) != self.device or self._first_input is None:
            return value
        if self._device_node is None:
            with self.graph.inserting_after(self._first_input):
                self._device_node = self.graph.call_function(getattr, (self._first_input, "device"))
            self._device_node.meta["source"] = ""
        return self._device_node

    def add_input(self, name: str, value: Any, default: Any) -> Node:
        """A placeholder for one parameter of the forward's signature."""
        args = () if default is Recorder.NO_DEFAULT else (default,)
        node = self.graph.create_node("placeholder", name, args, {})
        node.meta["source"] = ""
        return node

    NO_DEFAULT = object()

    def bind_input(self, value: Any, node: Node, path: str, guard: Callable[..., Any]) -> None:
        """Tie the tensors inside ``value`` to ``node``; other leaves are guarded, for the graph is specialised to them."""
        if isinstance(value, torch.Tensor):
            slot = self.tape.add(value, "input", path)
            self._nodes[id(value)] = node
            self._alive.append(value)
            node.meta["slot"] = slot
            if self._first_input is None:
                self._first_input = node
        elif isinstance(value, (tuple, list)) and (_holds_tensor(value) or len(value) > 0):
            for i, item in enumerate(value):
                self.bind_input(item, self.call(operator.getitem, (node, i), plain=True), f"{path}[{i}]", guard)
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                self.bind_input(item, self.call(operator.getitem, (node, key), plain=True), f"{path}[{key!r}]", guard)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for f in dataclasses.fields(value):
                item = getattr(value, f.name)
                self.bind_input(item, self.call(getattr, (node, f.name), plain=True), f"{path}.{f.name}", guard)
        elif value is None or isinstance(value, (bool, int, float, str)):
            self.call(guard, (node, value, path), plain=True)

    def output_to_fx(self, value: Any) -> Any:
        """The forward's result as an FX argument; containers are rebuilt by their own class."""
        if isinstance(value, dict) and type(value) is not dict:
            items = {k: self.output_to_fx(v) for k, v in value.items()}
            if dataclasses.is_dataclass(value):
                return self._construct(type(value), (), items)
            return self._construct(type(value), (items,), {})
        if isinstance(value, dict):
            return {k: self.output_to_fx(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items_ = [self.output_to_fx(v) for v in value]
            if hasattr(value, "_fields"):
                return type(value)(*items_)
            return items_ if isinstance(value, list) else tuple(items_)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: self.output_to_fx(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return self._construct(type(value), (), fields)
        return self.to_fx(value)

    def _construct(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self.graph.call_function(cls, args, kwargs)
        node.meta["source"] = ""
        return node


def source_line() -> str:
    """``file.py:line`` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    fallback = ""
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_SKIPPED_DIRS):
            short = filename.rpartition("site-packages" + os.sep)[2] or filename
            return f"{short}:{frame.f_lineno}"
        if not fallback and filename.startswith(_TORCH_DIR) and f"nn{os.sep}modules" in filename:
            fallback = filename
        frame = frame.f_back  # type: ignore[assignment]
    return fallback


def _is_method(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    found = getattr(torch.Tensor, name, None)
    if found is func:
        return True
    return isinstance(func, (types.MethodDescriptorType, types.WrapperDescriptorType))


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name, None))


def _holds_tensor(value: Any) -> bool:
    return next(_tensors(value), None) is not None


def _map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(v, fn) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(v, fn) for v in value)
    return value
