"""What a forward reads of its tensors besides data: properties and sizes. Sizes are live numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from chase_fx.errors import CaptureError
from chase_fx.graphs.assigned import Assigned, NewData, check_data, check_parameters, replaced_buffers, settle
from chase_fx.graphs.counted import Counted
from chase_fx.graphs.decisions import Decisions
from chase_fx.graphs.live import LiveInt, fix, plain
from chase_fx.graphs.source import source_line
from chase_fx.graphs.standins import StandIns
from chase_fx.graphs.tables import table_of_sizes, told_by_sizes

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


class Reads(Decisions):
    """A recording of what is read, and of what is assigned to buffers and properties."""

    def __init__(self, root: nn.Module, device: torch.device | None, *, standins: StandIns | None) -> None:
        super().__init__(root, device, standins=standins)
        self._tables: set[str] = set()  # buffers that this forward replaced by tables
        self._assigned: list[Assigned] = []
        self._new_data: list[NewData] = []
        self._held: dict[str, torch.Tensor] = {}  # what it put in place of a buffer

    def _read_property(self, getter: Any, args: tuple[Any, ...]) -> Any:
        name = getattr(getattr(getter, "__self__", None), "__name__", "")
        tensor = args[0]
        start = len(self.tape.ops)
        with self._paused(), torch._C.DisableTorchFunction():
            out = getter(*args)
        if name in ("shape", "ndim"):
            self._measure(tensor)
            return torch.Size(self._live_dim(tensor, d, n) for d, n in enumerate(out)) if name == "shape" else out
        if name == "nbytes":
            return self._read_size("numel", torch.Tensor.numel, args, {}) * (out // max(tensor.numel(), 1))
        if name == "requires_grad":
            return self.arguments.requires_grad(tensor)
        if name in _PLAIN_PROPERTIES:
            if name == "dtype":
                self._read_dtype(tensor, out)
            return out
        if not isinstance(out, torch.Tensor):
            self._need_values(args, {})
            return out
        node = self.graph.call_function(getattr, (self.arguments.to_fx(tensor), name))
        return self._finish(node, out, args, {}, start, in_place=False)

    def _read_dtype(self, tensor: torch.Tensor, found: torch.dtype) -> None:
        """Precision follows the module; whole numbers among the inputs are of the type that they had in the capture."""
        if found.is_floating_point or found.is_complex:
            self.reads_dtype = True
        elif (node := self.arguments.measured(tensor)) is not None and self.arguments.is_input(node):
            self.arguments.keep_dtype(node, found)

    def _write_property(self, setter: Any, args: tuple[Any, ...]) -> Any:
        """Assignments that change no value (``requires_grad``, ``data`` to itself) pass; of others, ``data`` may."""
        name = getattr(getattr(setter, "__self__", None), "__name__", "")
        same, fits = name == "requires_grad", False
        with self._paused(), torch._C.DisableTorchFunction():
            if name == "data" and len(args) > 1:
                old, new = args[0], args[1]
                fits = old.dtype == new.dtype and old.device == new.device and old.shape == new.shape
                layouts = [(t.untyped_storage()._cdata, t.storage_offset(), t.stride()) for t in (old, new)]
                same = fits and layouts[0] == layouts[1] and not self._was_new(old)
        if not same and not (fits and self._write_data(*args)):
            raise CaptureError(
                f"the forward assigns to a tensor's property '{name}' at {source_line()}; rewrite it as an operation"
            )
        return None

    def _was_new(self, owner: torch.Tensor) -> bool:
        """Whether ``owner`` got other memory before: here it still has the old one, which the forward may give back."""
        slot = self.tape.find(owner)
        return any(each.owner is slot for each in self._new_data)

    def _write_data(self, owner: torch.Tensor, value: torch.Tensor) -> bool:
        """``owner.data = value`` as a write to the memory that ``owner`` has; False if it can't be one."""
        slot = self.tape.operand(value)
        owned = (*self.arguments.parameters.values(), *self.arguments.buffers.values())
        if slot.storage in self.tape.given or not any(held is owner for held in owned):
            return False
        start = len(self.tape.ops)
        with self:
            owner.data.copy_(value.detach())  # by ``data``, for autograd does not see the model's assignment either
        calls = range(start, len(self.tape.ops))
        self._new_data.append(NewData(self.tape.slot_of(owner), slot, calls, len(self.tape.slots), source_line()))
        return True

    def _write_buffer(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """``self.buffer = value`` in a forward: the graph writes the value to the buffer that the module had.

        That one stays as it is here, as it does in the model. A table of another size, which the sizes of the inputs
        alone decide, is made again in every call instead.
        """
        owner = self._names.get(id(module))
        path = f"{owner}.{name}" if owner else name
        buffer = self.arguments.buffers.get(path)
        if buffer is None:
            return
        self._held[path] = value
        if buffer is value and not any(each.path == path for each in self._assigned):
            return
        with torch._C.DisableTorchFunction():
            fits = buffer.shape == value.shape and buffer.dtype == value.dtype
        if not fits and told_by_sizes(self.arguments.node_of(value), self.tape):
            self._tables.add(path)
            self._make_table(value, buffer)
            return
        if not fits or path in self._tables:
            raise CaptureError(f"the forward replaces the buffer '{path}' by another shape or type at {source_line()}")
        paths = [other.rpartition(".") for other, held in self.arguments.buffers.items() if held is buffer]
        if len(paths) > 1 and len({(id(dict(self.modules)[owner]), name) for owner, _, name in paths}) > 1:
            raise CaptureError(
                f"the forward replaces the buffer '{path}' at {source_line()}, and another name of it keeps the old "
                "tensor; write to it instead"
            )
        target = self.arguments.node_of(buffer)
        start = len(self.tape.ops)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            before = buffer.clone()
        with self._paused(), torch._C.DisableTorchFunction():
            buffer.copy_(value)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            buffer.copy_(before)
        source = self.graph.call_method("detach", (self.arguments.node_of(value),))
        source.meta.update(source="", slot=self.tape.slot_of(value))
        node = self.graph.call_method("copy_", (target, source))
        self._finish(node, buffer, (buffer, value), {}, start, in_place=True)
        self.arguments.bind(buffer, target)  # whoever has the old tensor reads that
        self._assigned.append(Assigned(path, self.tape.slot_of(buffer), source.meta["slot"], source, node))

    def _check_state(self, modules: Iterable[nn.Module]) -> None:
        """Write down what became of buffers of ``modules`` otherwise than by assignment; the forward is over."""
        check_parameters(self.modules, self.arguments.parameters)
        for module in modules:
            for name, path, value in replaced_buffers(module, self._names[id(module)], self.arguments.buffers):
                if self._held.get(path) is not value:
                    self._write_buffer(module, name, value)

    def finish(self, out: Any) -> None:
        """Write the forward's result."""
        end = next(iter(reversed(self.graph.nodes)))
        super().finish(out)
        if self._new_data:
            check_data(self.graph, self.tape, self._new_data)
        if self._assigned:
            settle(self.graph, self.tape, self._assigned, end)

    def _make_table(self, value: torch.Tensor, buffer: torch.Tensor) -> None:
        """From here on the forward has ``value`` in place of ``buffer``; what it was made from is another tensor."""
        start = len(self.tape.ops)
        node = self.graph.call_function(table_of_sizes, (self.arguments.node_of(value), self.arguments.node_of(buffer)))
        slots = self.tape.slot_of(value), self.tape.slot_of(buffer)
        with self._paused(), torch._C.DisableTorchFunction():
            made = torch.ops.aten.alias.default(value)
        self.tape.ops[start].args = self.tape.ops[start].read = slots  # channels of the buffer are those of the table
        self._finish(node, made, (value, buffer), {}, start, in_place=False)
        self.tape.replace(value, made)
        self.arguments.bind(value, node)

    def _counted(self, node: Node, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A graph has a node for each part, so at another number of parts it would ignore some."""
        if len(node.args) > 1 and isinstance(node.args[1], (tuple, list)):  # the length of each is given
            return parts
        number = LiveInt(len(parts), self, lambda: self.arguments.number(len, (node,)))

        def report() -> None:
            with self.graph.inserting_before(node.next):  # ahead of the nodes of the parts
                fix(number)

        return Counted(parts, report)

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
