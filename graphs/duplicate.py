"""Deep copies of module trees and graphs, at a fraction of ``copy.deepcopy``'s time, and of weights on write.

A model is copied by ``trace`` and again by ``rewrite``, and neither copy is written to in between. So tensors are
copied on write (``torch._lazy_clone``): a copy takes no memory until one of the two is written to. Modules are
walked directly, where ``copy.deepcopy`` goes through pickling's protocol for each of a module's dozen dicts. The result
is what ``copy.deepcopy`` gives, but for functions inside (hooks) that hold a part of the model in their closure: theirs
is the part of the copy. Whatever asks for a way of its own gets it.
"""

from __future__ import annotations

import copy
import copyreg
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, map_arg

__all__ = ["copied", "copied_graph", "duplicate"]

_ATOMIC = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type, range, torch.dtype, torch.device, torch.layout,
        types.FunctionType, types.BuiltinFunctionType, type(Ellipsis), type(NotImplemented),
    }
)  # fmt: skip
_DICTS = frozenset({dict, OrderedDict})
_HOOKS = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")


def duplicate(value: Any, memo: dict[int, Any]) -> Any:
    """What ``copy.deepcopy(value, memo)`` gives, with functions that belong to the copy."""
    given = dict(memo)
    functions: dict[int, types.FunctionType] = {}
    new = _copy(value, memo, functions)
    bound = _Functions(memo)
    of_copy = {key: bound.of(function) for key, function in functions.items() if bound.holds(function)}
    if not of_copy:
        return new
    memo.clear()
    memo.update({**given, **of_copy})
    new = _copy(value, memo, {})
    bound.fill(memo)
    return new


class _Functions:
    """Functions of a copy, for those that hold a part of what is copied in their closures.

    Args:
        memo: what was copied, by identity.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self._copied = set(memo)
        self._made: dict[int, types.FunctionType] = {}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}

    def holds(self, function: types.FunctionType, seen: frozenset[int] = frozenset()) -> bool:
        """Whether it, or a function that it holds, does."""
        return any(self._is_part(cell, seen | {id(function)}) for cell in function.__closure__ or ())

    def _is_part(self, cell: types.CellType, seen: frozenset[int]) -> bool:
        try:
            held = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            return False
        if isinstance(held, types.FunctionType):
            return id(held) not in seen and self.holds(held, seen)
        if isinstance(held, types.MethodType):
            held = held.__self__
        # A graph module takes over the state of another module, which functions still hold.
        state = held.__dict__.get("_modules") if isinstance(held, nn.Module) else None
        return type(held) not in _ATOMIC and (
            id(held) in self._copied or (state is not None and id(state) in self._copied)
        )

    def of(self, function: types.FunctionType) -> types.FunctionType:
        """That of the copy, whose closure is still empty."""
        if id(function) not in self._made:
            cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
            code, names, name = function.__code__, function.__globals__, function.__name__
            made = types.FunctionType(code, names, name, function.__defaults__, cells)
            made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
            made.__dict__.update(function.__dict__)
            self._made[id(function)] = made
        return self._made[id(function)]

    def _cell(self, cell: types.CellType) -> types.CellType:
        if not self._is_part(cell, frozenset()):
            return cell
        return self._cells.setdefault(id(cell), (cell, types.CellType()))[1]

    def fill(self, memo: dict[int, Any]) -> None:
        """Put the parts of the copy into the closures."""
        for old, new in list(self._cells.values()):
            held = old.cell_contents
            if isinstance(held, types.FunctionType):
                new.cell_contents = self.of(held)
            elif isinstance(held, types.MethodType):
                new.cell_contents = types.MethodType(held.__func__, _copy(held.__self__, memo, {}))
            else:
                new.cell_contents = _copy(held, memo, {})


def _copy(value: Any, memo: dict[int, Any], functions: dict[int, types.FunctionType]) -> Any:
    """What ``copy.deepcopy(value, memo)`` gives; functions with a closure that it meets are noted."""
    cls = type(value)
    if cls is types.FunctionType and value.__closure__:
        functions[id(value)] = value
        return memo.get(id(value), value)
    if cls in _ATOMIC:
        return value
    found = memo.get(id(value))
    if found is not None:
        return found
    new: Any
    if cls in _DICTS:
        new = memo[id(value)] = cls()
        for key, item in value.items():
            new[_copy(key, memo, functions)] = _copy(item, memo, functions)
        return new
    if cls is list:
        new = memo[id(value)] = []
        new.extend(_copy(item, memo, functions) for item in value)
        return new
    if (cls is tuple or cls is set) and all(type(item) in _ATOMIC for item in value):
        if cls is tuple:
            return value
        new = memo[id(value)] = set(value)
        return new
    if cls is nn.Parameter or cls is torch.Tensor:
        new = memo[id(value)] = copied(value, memo)
        return new
    if isinstance(value, nn.Module) and _is_plain(cls, memo):
        state = value.__getstate__()
        if type(state) is dict:
            memo.setdefault(id(memo), []).append(state)  # as deepcopy does: what is in the memo has to stay alive
            new = memo[id(value)] = object.__new__(cls)
            new.__setstate__(_items(state, memo, functions))
            return new
    return copy.deepcopy(value, memo)


def _items(state: dict[str, Any], memo: dict[int, Any], functions: dict[int, types.FunctionType]) -> dict[str, Any]:
    """The attributes of a module. Most are flags and empty tables of hooks, which are not worth a call."""
    new = {}
    for name, item in state.items():
        cls = type(item)
        if cls in _ATOMIC and cls is not types.FunctionType:
            new[name] = item
        elif cls in _DICTS and not item and id(item) not in memo:
            new[name] = memo[id(item)] = cls()
        else:
            new[name] = _copy(item, memo, functions)
    return new


def _is_plain(cls: Any, memo: dict[Any, Any]) -> bool:
    """Whether the class leaves it to Python how its objects are taken apart and made; found once for each copy."""
    if cls in memo:  # its other keys are numbers
        return bool(memo[cls])
    memo[cls] = (
        cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and cls not in copyreg.dispatch_table
        and not any(hasattr(cls, name) for name in _HOOKS)
    )
    return bool(memo[cls])


def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A copy of a tensor, on write where nobody else holds its memory."""
    if not tensor.is_leaf:  # computed by a parametrisation or an earlier forward; its history is not the copy's
        tensor = tensor.detach()
    if not _is_alone(tensor):
        new: torch.Tensor = copy.deepcopy(tensor, memo)
        return new
    lazy = torch._lazy_clone(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(lazy, requires_grad=tensor.requires_grad)
    return lazy.requires_grad_(tensor.requires_grad)


def copied_graph(graph: Graph) -> Graph:
    """What ``copy.deepcopy(graph)`` gives. FX would search the arguments of each node for symbolic numbers first."""
    new = Graph(tracer_cls=graph._tracer_cls)
    twins: dict[Node, Node] = {}
    for node in graph.nodes:
        twin = twins[node] = new.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        twin.args = map_arg(node.args, twins.__getitem__)
        if node.kwargs:
            twin.kwargs = map_arg(node.kwargs, twins.__getitem__)
        twin.meta = copy.copy(node.meta)
    new._codegen = copy.deepcopy(graph._codegen)
    return new


def _is_alone(tensor: torch.Tensor) -> bool:
    """Whether the memory of ``tensor`` belongs to torch, on the CPU, and is reached through this tensor only.

    A write to memory that is shared in another way (views, numpy arrays, other processes) would reach the copy too, and
    pointers into the memory of an accelerator outlive the tensor in captured CUDA graphs.
    """
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj():
        return False
    if not isinstance(tensor, nn.Parameter) and (tensor.__dict__ or not tensor.is_leaf or tensor.grad is not None):
        return False
    storage = tensor.untyped_storage()
    return (
        storage.nbytes() == tensor.numel() * tensor.itemsize
        and not storage.is_shared()
        and storage.resizable()  # not so for memory that came from or went to numpy
        and torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor's and the one held here
    )
