"""Translation of Python values to FX: which node computes a tensor, and what a value looks like as an argument.

Inputs become placeholders, parameters, buffers and constants ``get_attr`` nodes, sizes the nodes of live numbers;
containers are rebuilt around them.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.changed import Given
from chase_fx.graphs.draws import DrawnArray
from chase_fx.graphs.gradients import Gradients
from chase_fx.graphs.guards import check
from chase_fx.graphs.hidden import recover
from chase_fx.graphs.live import fix, is_live, plain
from chase_fx.graphs.opaque import Rebuild
from chase_fx.graphs.shadows import graph_path
from chase_fx.graphs.source import source_line
from chase_fx.graphs.tape import Tape
from chase_fx.graphs.trees import holds_tensor
from chase_fx.graphs.walk import Modules, buffers_in, parameters_in

__all__ = ["NO_DEFAULT", "Arguments"]

NO_DEFAULT = object()  # an input without a default value

_CLASSES = {int: torch.int64, float: torch.float64, bool: torch.bool, complex: torch.complex128}  # given as a dtype

# Arguments of these types are written as they are.
_PLAIN = frozenset(
    {type(None), bool, int, float, str, complex, torch.dtype, torch.layout, torch.memory_format, range}
)  # fmt: skip
# Types of Python that stand for a dtype; generated code can't name them.
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


class Arguments:
    """The FX side of every value of one forward.

    Attributes:
        gradients: which values ask for a gradient.
        constants: tensors that the forward uses without computing or registering them, by the name of their buffer.
    """

    def __init__(self, modules: Modules, graph: Graph, tape: Tape, device: torch.device | None) -> None:
        self.graph = graph
        self.tape = tape
        self.device = device
        self.constants: dict[str, torch.Tensor] = {}
        self._modules = modules
        self.parameters = parameters = parameters_in(modules)
        self.buffers = buffers_in(modules)  # as they were before the forward
        self.rebuilds: dict[str, Rebuild] = {}
        self.held: dict[str, tuple[Any, str]] = {}  # inputs by path that the graph compares by a text of their value
        self.containers: dict[int, Given] = {}  # among the inputs, by identity
        self.written: list[tuple[str, torch.Tensor]] = []  # the tensors that the forward put into them, by path
        self.specialised: list[str] = []  # what the forward read from data, with the line
        self._nodes: dict[int, Node] = {}
        self.gradients = Gradients(graph, parameters, self._nodes, tape)
        self._alive: list[torch.Tensor] = []
        self._state: dict[int, str] = {}
        self.model: nn.Module | None = None  # of which the modules are a copy
        self._of_model: dict[int, tuple[str, str]] | None = None
        self._numbers: dict[tuple[Any, ...], Node] = {}
        self._device_node: Node | None = None
        self._inputs: dict[Node, int] = {}
        self._end: int | None = None
        self._kept_sizes: set[tuple[Node, int]] = set()
        self.mapped_once: list[Any] = []  # live numbers: the sizes, all 1, that a vmap ran over
        for kind, items in (("parameter", parameters), ("buffer", self.buffers)):
            for name, tensor in items.items():
                if id(tensor) not in self._state:
                    self._state[id(tensor)] = name
                    tape.add(tensor, kind, name)

    # -- values to arguments ------------------------------------------------------------------------------------------

    def to_fx(self, value: Any) -> Any:
        """``value`` as an FX argument: tensors and live numbers become nodes."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if type(value) in _PLAIN:
            return value
        if is_live(value):
            return self._number(value)
        if isinstance(value, (tuple, list)):
            items = [self.to_fx(v) for v in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {k: self.to_fx(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self._bound(value.start), self._bound(value.stop), self._bound(value.step))
        return self._leaf_to_fx(value)

    def given(self, args: Any, kwargs: Mapping[str, Any], start: int) -> tuple[Any, dict[str, Any]]:
        """Arguments of a call as they were before it: its ATen calls, from ``start`` on, may write to them."""
        self._end = start
        try:
            return self.to_fx(tuple(args)), self.to_fx(dict(kwargs))
        finally:
            self._end = None

    def _bound(self, value: Any) -> Any:
        """A bound of a slice; a tensor of one number is read as such."""
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return self.to_fx(value)
        node = self.graph.call_method("item", (self.node_of(value),))
        with torch._C.DisableTorchFunction():
            node.meta.update(source="", value=int(value))
        return node

    def _leaf_to_fx(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self._device(value)
        if isinstance(value, np.generic):
            found = value.item()
            return found if not isinstance(found, np.generic) else float(found)  # there are longer ones than Python's
        if isinstance(value, type) and value in _DTYPES:
            return _DTYPES[value]
        if isinstance(value, DrawnArray):
            return value.node
        if isinstance(value, np.ndarray):
            return self.node_of(torch.from_numpy(value))
        if isinstance(value, (int, float)) and not isinstance(value, enum.Enum):
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, type(torch.FloatTensor)):  # ``x.type(torch.FloatTensor)``: no name that code can import
            return f"{value.__module__}.{value.__name__}"
        if isinstance(value, type):
            return _CLASSES.get(value, value)
        if isinstance(value, torch.Generator):
            raise CaptureError(f"a torch.Generator is passed to an operation at {source_line()}; graphs can't hold one")
        return value  # enums, functions, Ellipsis...

    # -- nodes --------------------------------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], *, plain: bool = False) -> Node:
        """Write ``fn(*args)``; with ``plain`` the arguments are FX arguments already."""
        node = self.graph.call_function(fn, args if plain else self.to_fx(args))
        node.meta["source"] = ""
        return node

    def number(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write arithmetic of numbers; the same one only once."""
        fx_args = self.to_fx(args)
        key = (fn, *((type(a), a) for a in fx_args))
        if key not in self._numbers:
            self._numbers[key] = self.call(fn, fx_args, plain=True)
        return self._numbers[key]

    def size(self, method: str, source: Node, *args: int, **kwargs: Any) -> Node:
        """Write a size that is read from the tensor of ``source``, once."""
        key = (method, source, *args, *kwargs.items())
        if key not in self._numbers:
            with self.graph.inserting_after(source):  # before anything reshapes it in place
                self._numbers[key] = self.graph.call_method(method, (source, *args), kwargs)
            self._numbers[key].meta["source"] = ""
        return self._numbers[key]

    def measured(self, tensor: torch.Tensor) -> Node | None:
        """The node to read sizes of ``tensor`` from; none for parameters, buffers and constants: theirs are fixed."""
        node = self._nodes.get(id(tensor))
        if node is None:
            return None if id(tensor) in self._state or self.tape.find(tensor) is None else self.node_of(tensor)
        return None if node.op == "get_attr" else node

    def _number(self, value: Any) -> Any:
        """The node of a live number; one that an earlier capture left in some cache is a plain number."""
        return value.node() if value._recorder.recording() else plain(value)

    def is_input(self, node: Node) -> bool:
        """Whether ``node`` gives one of the inputs."""
        return node in self._inputs

    def keep_dtype(self, node: Node, dtype: torch.dtype) -> None:
        """The graph only serves tensors of this type."""
        key = ("dtype", node)
        if key not in self._numbers:
            self._numbers[key] = self.call(getattr, (node, "dtype"), plain=True)
            self.call(check, (self._numbers[key], "==", dtype, True, source_line()), plain=True)

    def bind(self, value: Any, node: Node) -> None:
        """``node`` computes ``value``; elements of tuples and lists get a ``getitem`` each."""
        if isinstance(value, torch.Tensor):
            node.meta["slot"] = self.tape.slot_of(value)
            written = self.gradients.off and node.meta.get("in_place") and id(value) in self._nodes
            if not written:  # a write without gradients does not cut the tensor off from its own
                self._tie(value, self.gradients.here(node))
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                if holds_tensor(item):
                    self.bind(item, self.call(operator.getitem, (node, i), plain=True))
        elif isinstance(value, dict):
            for key, item in value.items():
                if holds_tensor(item):
                    self.bind(item, self.call(operator.getitem, (node, key), plain=True))
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                if holds_tensor(getattr(value, f.name)):
                    self.bind(getattr(value, f.name), self.call(getattr, (node, f.name), plain=True))

    def _tie(self, tensor: torch.Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def node_of(self, tensor: torch.Tensor) -> Node:
        """The node that computes ``tensor``; a ``get_attr`` for parameters, buffers and constants."""
        node = self._nodes.get(id(tensor))
        if node is not None:
            outside = self.gradients.outside(tensor, node, self.tape.slot_of(tensor))
            if outside is not node:
                self._tie(tensor, outside)
            return self.gradients.here(outside)
        name = self._state.get(id(tensor)) or self._name_in_model(tensor)
        twin = self.tape.twin(tensor) if name is None else None
        if twin is not None:
            node = self._wrapped(tensor, twin)
            self._tie(tensor, node)
            return self.gradients.here(node)
        if name is None and self._made_here(tensor):
            node = self._hidden(tensor)
            self._tie(tensor, node)
            return self.gradients.here(node)
        if name is None:
            name = self._constant(tensor)
        # FX wants targets that exist on the owning module; they do by the time a GraphModule is made.
        node = self.graph.create_node("get_attr", graph_path(name), (), {})
        node.meta["slot"] = self.tape.slot_of(tensor)
        node.meta["source"] = ""
        node.meta["grad"] = name in self.gradients.trainable
        self._tie(tensor, node)
        return self.gradients.here(node)

    def requires_grad(self, tensor: torch.Tensor) -> bool:
        """What ``tensor.requires_grad`` is outside of the capture, which runs without gradients."""
        node = self._nodes.get(id(tensor))
        if node is None:
            return self._state.get(id(tensor)) in self.gradients.trainable
        return self.gradients.needed(node)

    def _made_here(self, tensor: torch.Tensor) -> bool:
        """Whether the forward computed ``tensor``, as it did not a literal that it turned into a tensor."""
        known = self.tape.find(tensor)
        ops = self.tape.ops if known is not None else []
        makers = [op.op for op in ops if known in op.outs and known not in op.inputs()]  # others write to what there is
        return any(op is not torch.ops.aten.lift_fresh.default for op in makers) or tensor.grad_fn is not None

    def _wrapped(self, tensor: torch.Tensor, twin: torch.Tensor) -> Node:
        """Another object for ``twin``; a parameter is one that no gradient leaves."""
        node = self.node_of(twin)
        slot = self.tape.slot_of(twin)
        self.tape.replace(tensor, twin)
        if isinstance(tensor, torch.nn.Parameter):
            node = self.graph.call_method("detach", (node,))
            node.meta.update(source=source_line(), slot=slot)
        return node

    def _hidden(self, tensor: torch.Tensor) -> Node:
        """A tensor that no call of the torch API gave, by its ATen calls."""
        found = recover(tensor, self.graph, self.tape, self.gradients, (self.node_of, self.to_fx), end=self._end)
        if found is None:
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} used at {source_line()} was computed outside of the torch "
                "API (inside an autograd function, or a cache of an earlier forward), so its origin can't be captured; "
                "compute it with torch operations inside forward, or register it as a buffer"
            )
        for index, node in found.nodes.items():
            self._nodes.setdefault(id(self.tape.tensor_of(self.tape.slots[index])), node)
        if found.once:
            for number in self.mapped_once:
                fix(number)
        if not found.certain:
            self.keep_sizes(found.read)
        return found.nodes[self.tape.slot_of(tensor).index]

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a node computes ``tensor``, or the module holds it."""
        return id(tensor) in self._nodes or id(tensor) in self._state

    def keep_sizes(self, nodes: Iterable[Node] = ()) -> None:
        """From here on the graph only serves inputs of the example's sizes, and tensors of ``nodes`` of theirs."""
        line = source_line()
        for node in dict.fromkeys((*self._inputs, *nodes)):
            sizes = node.meta["slot"].shape if node.op != "get_attr" else ()
            for dim, n in enumerate(sizes):
                if (node, dim) not in self._kept_sizes:
                    self._kept_sizes.add((node, dim))
                    size = self.size("size", node, dim)
                    with self.graph.inserting_after(size):
                        self.call(check, (size, "==", n, True, line), plain=True)

    def _name_in_model(self, tensor: torch.Tensor) -> str | None:
        """A function inside the copy may hold on to the model: its tensors stand for those of the copy."""
        if self.model is None:
            return None
        if self._of_model is None:
            parts = (("parameter", self.model.named_parameters()), ("buffer", self.model.named_buffers()))
            self._of_model = {id(t): (kind, name) for kind, items in parts for name, t in items}
        kind, name = self._of_model.get(id(tensor), ("", ""))
        if not name or name not in self._state.values():
            return None
        self._state[id(tensor)] = name
        slot = self.tape.slot_of(tensor)
        slot.kind, slot.name = kind, name
        return name

    def _computed_before(self, tensor: torch.Tensor) -> str | None:
        """The attribute of the model that holds ``tensor`` and was computed from its parameters, if one does."""
        given = dict(self.model.named_modules()) if self.model is not None else {}
        for name, module in self._modules:
            for attribute, value in vars(module).items():
                if value is tensor and name in given:
                    original = vars(given[name]).get(attribute)
                    if isinstance(original, torch.Tensor) and original.grad_fn is not None:
                        return f"{name}.{attribute}" if name else attribute
        return None

    def _constant(self, tensor: torch.Tensor) -> str:
        computed = self._computed_before(tensor)
        if computed is not None:
            raise CaptureError(
                f"the forward uses '{computed}' at {source_line()}, computed from parameters before the capture "
                "and would not follow them; compute it in the forward, or register it as a buffer"
            )
        name = f"_chase_constant_{len(self.constants)}"
        self.constants[name] = tensor
        self._state[id(tensor)] = name
        slot = self.tape.slot_of(tensor)
        slot.kind, slot.name = "constant", name
        return name

    def _device(self, value: torch.device) -> Any:
        """A device is read from an input, so that the graph still works after ``.to()``."""
        first = next(iter(self._inputs), None)
        if self.device is None or torch.device(value) != self.device or first is None:
            return value
        if self._device_node is None:
            with self.graph.inserting_after(first):
                self._device_node = self.graph.call_function(getattr, (first, "device"))
            self._device_node.meta["source"] = ""
        return self._device_node

    # -- inputs -------------------------------------------------------------------------------------------------------

    def add_input(self, name: str, default: Any) -> Node:
        """A placeholder for one parameter of the forward's signature."""
        args = () if default is NO_DEFAULT else (default,)
        node = self.graph.create_node("placeholder", name, args, {})
        node.meta["source"] = ""
        return node

    def guard_ranks(self, where: str) -> None:
        """The forward looked at shapes, so an input with another number of dims would mean something else."""
        for node, rank in self._inputs.items():
            with self.graph.inserting_after(node):
                found = self.graph.call_method("dim", (node,))
            with self.graph.inserting_after(found):
                guard = self.graph.call_function(check, (found, "==", rank, True, where))
            found.meta["source"] = guard.meta["source"] = ""

    def tie_input(self, tensor: torch.Tensor, node: Node, path: str) -> None:
        """``node`` computes ``tensor``, one of the inputs."""
        slot = self.tape.add(tensor, "input", path)
        self._tie(tensor, node)
        node.meta["grad"] = tensor.is_floating_point() or tensor.is_complex()
        node.meta["slot"] = slot
        self._inputs[node] = tensor.dim()
