"""Recording of a forward: torch-level calls into an FX graph, ATen calls onto a tape.

Nothing is proxied: the model runs on its real tensors, so all Python control flow resolves by itself. A
``TorchFunctionMode`` sees every call of the torch API, a patched ``Module.__call__`` sees every module.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.dropout import _DropoutNd
from torch.random import get_rng_state, set_rng_state

from chase_fx.graphs.autocast import Regions, preserved_modes
from chase_fx.graphs.caches import uncached
from chase_fx.graphs.calls import DATA_SIZED, call_name, is_in_place
from chase_fx.graphs.constructors import sizes_of_new
from chase_fx.graphs.copies import deep_copies
from chase_fx.graphs.freed import setting
from chase_fx.graphs.given import Given
from chase_fx.graphs.hidden import transformed
from chase_fx.graphs.hooks import check_backward_hooks
from chase_fx.graphs.inference import without_inference_mode
from chase_fx.graphs.inside import Inside
from chase_fx.graphs.leaves import Leaves, has_parameter, is_leaf, may_be_leaf
from chase_fx.graphs.live import Watchful, plain
from chase_fx.graphs.loops import Loops
from chase_fx.graphs.patches import Patch, patched
from chase_fx.graphs.pycalls import live_calls
from chase_fx.graphs.reach import attribute_homes, reachable_code
from chase_fx.graphs.reads import SIZE_CALLS
from chase_fx.graphs.recording import CAUGHT
from chase_fx.graphs.shadows import graph_path
from chase_fx.graphs.source import source_line
from chase_fx.graphs.standins import StandIns
from chase_fx.graphs.trees import holds_tensor, map_tensors, only_tensors
from chase_fx.graphs.whole import Function, bindings

__all__ = ["Recorder"]

# Python functions that torch presents as one call although they hold sizes (embed_dim == heads * head_dim).
_EXPANDED: frozenset[Callable[..., Any]] = frozenset({F.multi_head_attention_forward})

# Calls that read indices from a tensor without an ATen call that would tell.
_READS_INDICES = frozenset({"tensor_split", "hsplit", "vsplit", "dsplit"})
# Methods by identity: ``Tensor.__pow__`` calls itself ``pow`` and lives in a private module of torch.
_METHODS = {id(found): name for name in dir(torch.Tensor) if callable(found := getattr(torch.Tensor, name))}
_DESCRIPTORS = (types.MethodDescriptorType, types.WrapperDescriptorType)
# Calls whose result is as many tensors as the size of a dim says.
_COUNTED = frozenset({"unbind", "split", "chunk", "unsafe_split", "unsafe_chunk"})
_MAGIC = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


class Recorder(Inside):
    """Writes one forward of ``root`` to ``graph`` and ``tape``."""

    def __init__(
        self,
        root: nn.Module,
        device: torch.device | None,
        leaves: Leaves,
        whole: tuple[Function, ...] = (),
        *,
        standins: StandIns | None,
    ) -> None:
        super().__init__(root, device, reachable_code(root), standins=standins)
        self.leaves = leaves
        self.whole = whole
        self.reads_training = False
        self.unroll = True
        self.unrolled = False
        self.loops = Loops(frozenset())
        self.results: tuple[torch.Tensor, ...] = ()
        self._mask_of: dict[Node, torch.Tensor] = {}
        self._leaf_reads_training = False
        self.given = Given(self.modules, self.code.functions)
        self.mode_readers: set[str] = set()
        self.modes: dict[str, bool] = {}

    # -- running ------------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record everything inside the block."""
        # torch loads its compiler with the first call that is recorded, and that takes the methods which nn.Module has
        # at that moment for those that it always has: the recorder's, with all that they hold.
        importlib.import_module("torch._dynamo")
        training, self.modes = {id(m): m.training for _, m in self.modules}, {n: m.training for n, m in self.modules}
        hidden = [m for m in dict.fromkeys(m for _, m in self.modules) if not is_leaf(m, self.leaves)]
        for _, module in self.modules:  # so that reading a mode comes through __getattr__ and is noticed
            module.__dict__.pop("training", None)
        draws = self.draw_patches()
        replaced = [
            (values, name, v)
            for m in hidden
            for values in attribute_homes(m)
            for name, v in values.items()
            if type(v) is float or id(v) in self.drawers
        ]
        for attributes, name, value in replaced:
            attributes[name] = Watchful(value) if type(value) is float else self.drawers[id(value)]
        patches = [*self._module_patches(training), *self.function_patches(), without_inference_mode()]
        patches += [setting(self._records, self.let_go), deep_copies(self._records)]
        patches += uncached(self.root) if self.may_hash else ()
        self.regions = Regions(self.arguments, self._records)
        patches += [*self._whole_patches(), *draws, *self.inside_patches(), *self.regions.patches()]
        if self.standins is not None:
            self.standins.start(self.tape.slots)
        try:
            with patched(patches), preserved_modes(always=True), live_calls(self.code), self.tape_mode, self:
                self._active = True
                yield
                self.regions.check_closed()
                self._check_state(hidden)
        finally:
            self._active = False
            for attributes, name, value in replaced:
                attributes[name] = plain(attributes.get(name, value)) if type(value) is float else value
            for _, module in self.modules:
                if not self.given.still(module) and (is_leaf(module, self.leaves) or may_be_leaf(module)):
                    self.given.restore(module)
                self.given.restore_hooks(module)
                module.__dict__.setdefault("training", training[id(module)])

    def _records(self) -> bool:
        return self._active and not transformed()

    def _module_patches(self, training: dict[int, bool]) -> list[Patch]:
        original_call, original_getattr = nn.Module.__call__, nn.Module.__getattr__
        original_setattr = nn.Module.__setattr__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not recorder._active or transformed():
                return original_call(module, *args, **kwargs)
            return recorder._call_module(module, original_call, args, kwargs)

        def getattribute(module: nn.Module, name: str) -> Any:
            if name == "training" and id(module) in training:
                if recorder._active:
                    recorder.reads_training = True
                    recorder.mode_readers.add(recorder._names[id(module)])
                else:
                    recorder._leaf_reads_training = True
                return training[id(module)]
            return original_getattr(module, name)

        def setattribute(module: nn.Module, name: str, value: Any) -> None:
            if recorder._active and isinstance(value, torch.Tensor) and name in module.__dict__.get("_buffers", ()):
                recorder._write_buffer(module, name, value)
            if recorder._active and name == "training":  # in another mode this may be a change
                recorder.reads_training = True
            original_setattr(module, name, value)

        new = {"__call__": call, "__getattr__": getattribute, "__setattr__": setattribute}
        return [(nn.Module, name, function) for name, function in new.items()]

    def _whole_patches(self) -> list[Patch]:
        recorder = self

        def called(function: Function) -> Function:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                return recorder._call_whole(function, args, kwargs)

            return call

        return [(m, name, called(f)) for f in self.whole for m, name in bindings(f, self.code.functions)]

    # -- modules ------------------------------------------------------------------------------------------------------

    def _call_module(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self._names.get(id(module))
        if not name:  # the root itself, or a module made during the forward
            check_backward_hooks(module, "")
            return original(module, *args, **kwargs)
        if is_leaf(module, self.leaves) and self.given.stays(module):
            if type(module) in self.leaves:  # nothing is known of what it does
                self._need_values(args, kwargs)
            own = self.draws_itself() if type(module) in self.leaves else nullcontext()
            with own:
                out, start = self._run_leaf(module, original, args, kwargs, self.given.mode(module))
            by_mode = type(module) in self.leaves or isinstance(module, (_DropoutNd, nn.RReLU))
            return self._record_leaf(name, module, (args, kwargs), out, start, by_mode=by_mode)
        given_tensor = len(args) >= 1 and isinstance(args[0], torch.Tensor)
        if given_tensor and may_be_leaf(module) and self.given.stays(module) and self.given.is_plain(module):
            self._leaf_reads_training = False
            rng = get_rng_state()
            mark = len(self.tape.ops)
            with self.draws_itself():
                out, start = self._run_leaf(module, original, args, kwargs)
            with torch._C.DisableTorchFunction():
                same_shape = isinstance(out, torch.Tensor) and out.shape == args[0].shape
            changed = not self.given.still(module)
            if self._leaf_reads_training and same_shape and not changed:
                return self._record_leaf(name, module, (args, kwargs), out, start, by_mode=True)
            if changed:
                self.given.restore(module)
            del self.tape.ops[mark:]
            set_rng_state(rng)
        if module.__dict__.get("training") is self.given.mode(module):
            module.__dict__.pop("training", None)  # a leaf that is taken apart: reading its mode has to be noticed
        check_backward_hooks(module, name)
        return original(module, *args, **kwargs)

    def _run_leaf(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any, mode: bool | None = None
    ) -> tuple[Any, int]:
        start = len(self.tape.ops)
        if mode is not None:  # which its own code may read
            module.__dict__["training"] = mode
        self._active = False
        try:
            with torch._C.DisableTorchFunction():
                out = original(module, *args, **kwargs)
            self.given.check_hooks(module)
        except CAUGHT as e:
            self._raised(e, args, kwargs)
            raise
        else:
            return out, start
        finally:
            self._active = True
            if mode is not None:
                module.__dict__.pop("training", None)

    def _record_leaf(
        self,
        name: str,
        module: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        out: Any,
        start: int,
        *,
        by_mode: bool,
    ) -> Any:
        args, kwargs = given
        node = self._node("call_module", graph_path(name), args, kwargs, start)
        node.meta["by_mode"] = by_mode  # in train mode it may draw
        if has_parameter(module):
            node.meta["grad"] = True
            node.meta["trained"] = self.arguments.gradients.trains(name) or None
        return self._finish(node, out, args, kwargs, start, in_place=False)

    # -- functions ----------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._active:
            return func(*args, **kwargs)
        if transformed():
            return self._call_inside(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "new" and (sizes := sizes_of_new(args, kwargs)) is not None:
            func, name, args = torch.Tensor.new_empty, "new_empty", (args[0], sizes or (0,))
        if name == "__get__":
            return self._read_property(func, args)
        if name in SIZE_CALLS:
            return self._read_size(name, func, args, kwargs)
        if name in ("__set__", "__delete__"):
            return self._write_property(func, args)
        if name == "_set_grad_enabled":
            if not self._inlined:
                by = sys._getframe(1).f_code.co_name
                self.arguments.gradients.enter_mode(enabled=bool(args[0]), by=by)
            return func(*args, **kwargs)
        if func in _EXPANDED:
            return self._expand(func, args, kwargs)
        if name == "unbind" and sys._getframe(1).f_code.co_name == "__iter__":
            return self._iterate(func, *args)
        return self._call_function(func, name, args, kwargs)

    def _call_function(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = len(self.tape.ops)
        out = self._run(func, args, kwargs)
        if not holds_tensor(out) and name != "__setitem__":
            return self._python_value(name, out, args, kwargs)
        if name in _READS_INDICES:
            self._need_values(args[1:], kwargs)
        target = _MAGIC.get(name, func)
        method = _METHODS.get(id(target))
        if method is not None or isinstance(target, _DESCRIPTORS):
            node = self._node("call_method", method or name, args, kwargs, start)
        else:
            node = self._node("call_function", target, args, kwargs, start)
        in_place = is_in_place(name) or "out" in kwargs
        if name == "nonzero" and self.unroll:
            self._mask_of[node] = args[0] if args else kwargs["input"]
        result = self._finish(node, out, args, kwargs, start, in_place=in_place)
        return self._counted(node, result) if name in _COUNTED else result

    def _iterate(self, func: Any, tensor: torch.Tensor, *dim: int) -> tuple[torch.Tensor, ...]:
        """What a Python loop over ``tensor`` is unrolled for.

        Where the tensor lists the places at which a mask is set (the experts that some token chose), the loop would
        serve the example's places alone. It is unrolled for every place instead; ``trace`` checks that this changes no
        result, as it does not where a place without hits adds nothing.
        """
        node = self.arguments.node_of(tensor)
        name = call_name(node)
        if node in self._mask_of:
            if self.standins is not None:  # whether it changes the result is to be seen
                self.standins.give_up()
            self.unrolled = True
            with self:  # the mode is off inside its own handler
                every = torch.ones_like(self._mask_of[node]).nonzero()
            return self.loops.over(
                tuple(self._call_function(func, "unbind", (every, *dim), {})), every, tensor, source_line()
            )
        if name in DATA_SIZED:
            self.specialised.append(f"loop over {name} at {source_line()}")
        found: tuple[torch.Tensor, ...] = self._call_function(func, "unbind", (tensor, *dim), {})
        return found

    def _call_whole(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of tensors that finds its way itself; one that gives numbers is recorded as any other."""
        if not self._active:
            return function(*args, **kwargs)
        start, rng = len(self.tape.ops), get_rng_state()
        given, named = map_tensors((args, kwargs), lambda t: t)  # lists of its own, which the function may use up
        with self.draws_itself(), self._paused(), torch._C.DisableTorchFunction():
            out = function(*args, **kwargs)
        if not only_tensors(out):
            del self.tape.ops[start:]
            set_rng_state(rng)
            return function(*args, **kwargs)
        node = self._node("call_function", function, given, named, start)
        node.meta["whole"] = True
        for op in self.tape.ops[start:]:
            op.whole = "inside a function that stays one call"
        return self._finish(node, out, given, named, start, in_place=False)

    def _expand(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the body of a Python function of torch under the recorder, instead of taking it as one call."""
        module: Any = sys.modules[func.__module__]
        original = module.has_torch_function
        module.has_torch_function = lambda _: False
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            module.has_torch_function = original
