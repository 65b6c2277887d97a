"""What a forward reads of its tensors: properties, sizes, and numbers from their data.

Sizes are live numbers. A number from data stays live where it is an argument; what Python does with it is fixed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.live import LiveFloat, LiveInt, fix, plain
from chase_fx.graphs.recording import Recording
from chase_fx.graphs.source import source_line
from chase_fx.graphs.whole import enclosing

__all__ = ["SIZE_CALLS", "Reads"]

SIZE_CALLS = frozenset({"size", "numel", "nelement", "__len__", "dim", "ndimension", "stride"})
# Properties whose value is no tensor and no size; reading them leaves no trace.
_PLAIN_PROPERTIES = frozenset(
    {
        "dtype", "device", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
        "ndim", "is_leaf", "grad_fn", "grad", "names", "is_nested", "itemsize", "is_mps", "is_xpu", "is_xla",
        "_version", "_backward_hooks", "output_nr", "_base", "name", "is_mkldnn", "is_sparse_csr", "is_ipu",
        "is_vulkan", "is_ort", "is_hpu", "is_maia", "is_mtia",
    }
)  # fmt: skip
# Calls whose result is a Python value computed from tensor *data*: the graph is specialised to it.
_READS_DATA = frozenset(
    {
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "equal", "allclose",
        "is_nonzero", "__array__", "__contains__",
    }
)  # fmt: skip
_READS_NUMBERS = frozenset({"item", "tolist"})
# Calls that give a Python value which does not depend on the data.
_ABOUT = frozenset(
    {
        "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_conj", "is_neg", "is_inference", "stride",
        "storage_offset", "element_size", "get_device", "type", "has_names", "is_same_size", "result_type", "can_cast",
        "is_tensor", "is_storage", "is_pinned", "is_shared", "__hash__", "register_hook",
    }
)  # fmt: skip


class Reads(Recording):
    """A recording of what is read, and of what is assigned to buffers and properties."""

    def _read_property(self, getter: Any, args: tuple[Any, ...]) -> Any:
        name = getattr(getattr(getter, "__self__", None), "__name__", "")
        tensor = args[0]
        start = len(self.tape.ops)
        with self._paused(), torch._C.DisableTorchFunction():
            out = getter(*args)
        if name in ("shape", "ndim"):
            self._measure(tensor)
            return torch.Size(self._live_dim(tensor, d, n) for d, n in enumerate(out)) if name == "shape" else out
        if name == "requires_grad":
            return self.arguments.requires_grad(tensor)
        if name in _PLAIN_PROPERTIES:
            self.reads_dtype = self.reads_dtype or (name == "dtype" and (out.is_floating_point or out.is_complex))
            return out
        if not isinstance(out, torch.Tensor):
            self._need_values(args, {})
            return out
        node = self.graph.call_function(getattr, (self.arguments.to_fx(tensor), name))
        return self._finish(node, out, args, {}, start, in_place=False)

    def _write_property(self, setter: Any, args: tuple[Any, ...]) -> Any:
        """Assignments that change no value (``requires_grad``, ``data`` to itself) pass; others can't be captured."""
        name = getattr(getattr(setter, "__self__", None), "__name__", "")
        same = name == "requires_grad"
        with self._paused(), torch._C.DisableTorchFunction():
            if name == "data" and len(args) > 1:
                old, new = args[0], args[1]
                same = old.dtype == new.dtype and old.device == new.device and old.shape == new.shape
                same = same and old.untyped_storage()._cdata == new.untyped_storage()._cdata
        if not same:
            raise CaptureError(
                f"the forward assigns to a tensor's property '{name}' at {source_line()}; rewrite it as an operation"
            )
        return None

    def _write_buffer(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """``self.buffer = value`` in a forward: the graph writes the value to the buffer that the module had."""
        owner = self._names.get(id(module))
        path = f"{owner}.{name}" if owner else name
        buffer = self.arguments.buffers.get(path)
        if buffer is None or buffer is value:
            return
        with torch._C.DisableTorchFunction():
            fits = buffer.shape == value.shape and buffer.dtype == value.dtype
        if not fits:
            raise CaptureError(f"the forward replaces the buffer '{path}' by another shape or type at {source_line()}")
        target = self.arguments.node_of(buffer)
        start = len(self.tape.ops)
        with self._paused(), torch._C.DisableTorchFunction():
            buffer.copy_(value)
        source = self.graph.call_method("detach", (self.arguments.node_of(value),))
        source.meta.update(source="", slot=self.tape.slot_of(value))
        node = self.graph.call_method("copy_", (target, source))
        self._finish(node, buffer, (buffer, value), {}, start, in_place=True)

    def _read_size(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._paused(), torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        tensor = args[0] if args else kwargs["input"]
        self._measure(tensor)
        if name in ("dim", "ndimension"):
            return out
        if name == "__len__":  # Python makes a plain int of whatever it is given
            return fix(self._live_dim(tensor, 0, out))
        if name in ("size", "stride"):
            if isinstance(out, tuple):
                return type(out)(self._live_dim(tensor, d, n, name) for d, n in enumerate(out))
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._live_dim(tensor, plain(dim) % tensor.dim(), out, name)
        source = self.arguments.measured(tensor)
        return out if source is None else LiveInt(out, self, lambda: self.arguments.size("numel", source))

    def _measure(self, tensor: torch.Tensor) -> None:
        """The forward looks at the shape of a tensor that depends on the inputs."""
        if not self._measures_at and self.arguments.measured(tensor) is not None:
            self._measures_at = source_line()

    def _live_dim(self, tensor: torch.Tensor, dim: int, size: int, method: str = "size") -> int:
        source = self.arguments.measured(tensor)
        return size if source is None else LiveInt(size, self, lambda: self.arguments.size(method, source, dim))

    def _python_value(self, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose result is no tensor: the graph holds the value, if anything was done with it."""
        if name in _READS_DATA:
            line = source_line()
            self.specialised.append(f"{name} at {line}")
            self.reads.setdefault(line, enclosing())
        if name not in _ABOUT:
            self._need_values(args, kwargs)
        return self._read_numbers(name, args[0], out) if name in _READS_NUMBERS and args else out

    def _read_numbers(self, name: str, tensor: torch.Tensor, out: Any) -> Any:
        """Numbers read from data stay live: the graph reads them again where they are arguments of its calls.

        How many there are is fixed, for Python counts a list without asking anybody.
        """
        for d, n in enumerate(self.tape.slot_of(tensor).shape):
            fix(self._live_dim(tensor, d, n))
        node = self.graph.call_method(name, (self.arguments.to_fx(tensor),))
        node.meta["source"] = ""

        def element(build: Callable[[], Node], place: int) -> Node:
            return self.arguments.number(operator.getitem, (build(), place))

        def live(value: Any, build: Callable[[], Node]) -> Any:
            if isinstance(value, list):
                return [live(v, functools.partial(element, build, i)) for i, v in enumerate(value)]
            if type(value) is int:
                return LiveInt(value, self, build)
            return LiveFloat(value, self, build) if type(value) is float else value

        return live(out, lambda: node)
