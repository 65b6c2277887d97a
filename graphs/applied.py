"""Custom autograd functions that a forward applies: each stays one call, for its backward is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._functorch import autograd_function
from torch.utils._pytree import tree_leaves

from chase_fx.errors import CaptureError
from chase_fx.graphs.drawing import Drawing
from chase_fx.graphs.functions import Level, caller_of, forward_patches, holds_code
from chase_fx.graphs.hidden import transformed
from chase_fx.graphs.own_sizes import mark_own_sizes
from chase_fx.graphs.patches import Patch
from chase_fx.graphs.reach import Code
from chase_fx.graphs.standins import StandIns

__all__ = ["Applied"]


class Applied(Drawing):
    """A recording of autograd functions."""

    def __init__(self, root: nn.Module, device: torch.device | None, code: Code, *, standins: StandIns | None) -> None:
        super().__init__(root, device, code, standins=standins)
        self._inlined = False  # inside one whose forward is recorded
        # What vmap made of autograd functions: of which one, over which dims and with which randomness.
        self._mapped: dict[Any, tuple[Any, tuple[Any, ...], str]] = {}

    def function_patches(self) -> list[Patch]:
        """Besides ``Function.apply`` the forward of each function: a bound ``apply`` can't be replaced."""
        original = torch.autograd.Function.__dict__["apply"]
        recorder = self

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            run = original.__get__(None, cls)
            if not recorder._active or transformed():
                return run(*args, **kwargs)
            if cls in recorder._mapped:
                return recorder._call_mapped(cls, run, args)
            return recorder._call_autograd_function(cls, run, args, kwargs)

        applies = (torch.autograd.Function, "apply", classmethod(apply))
        return [applies, *forward_patches(self._run_forward), self._note_vmaps(), self._own_rules()]

    def _run_forward(self, cls: Any, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The forward of an autograd function, called by torch: ``args`` are those of ``apply``."""
        return self._call_autograd_function(cls, run, args, {}) if self._active else run(*args)

    def _call_autograd_function(
        self, cls: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A custom autograd function stays whole, for its backward is its own; its ATen calls are on the tape."""
        if any(map(holds_code, (*args, *kwargs.values()))):
            # A checkpoint or a reversible block: its backward computes the gradient of what the forward runs without
            # one, so the forward is recorded with it.
            inlined, self._inlined = self._inlined, True
            start = len(self.tape.ops)
            try:
                with self.arguments.gradients.inside_function() as result_of:
                    out = result_of(run(*args, **kwargs))
            finally:
                self._inlined = inlined
            if not cls.__module__.startswith("torch."):  # a checkpoint of torch's puts the generators back
                self.redraws(f"the autograd function {cls.__name__}", start)
            return out
        self._need_values(args, kwargs)
        start = len(self.tape.ops)
        with self.draws_itself(), self._paused(), torch._C.DisableTorchFunction():
            out = run(*args, **kwargs)
        mark_own_sizes(cls, args, self.tape.ops[start:])
        node = self._node("call_function", caller_of(cls), args, kwargs, start)
        return self._finish(node, out, args, kwargs, start, in_place=False)

    def _note_vmaps(self) -> Patch:
        """What tells which function, under which vmap, torch made an autograd function of."""
        original = autograd_function.vmapify_autograd_function

        def made(function: Any, in_dims: Any, size: int, randomness: str) -> Any:
            out = original(function, in_dims, size, randomness)
            self._mapped[out] = function, in_dims, randomness
            return out

        return autograd_function, original.__name__, made

    def _own_rules(self) -> Patch:
        """What a function says itself that vmap makes of it is code of the forward, which torch runs unseen."""
        original = autograd_function.custom_function_call_vmap_helper

        def helper(interpreter: Any, rule: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
            def seen(info: Any, in_dims: Any, *given: Any, **named: Any) -> Any:
                if not self._active:
                    return rule(info, in_dims, *given, **named)
                mapped = zip(tree_leaves(given), tree_leaves(in_dims), strict=True)
                tensor, dim = next((t, d) for t, d in mapped if d is not None)
                with self:
                    return rule(info._replace(batch_size=tensor.shape[dim]), in_dims, *given, **named)

            return original(interpreter, seen, function, *args, **kwargs)

        return autograd_function, original.__name__, helper

    def _call_mapped(self, cls: Any, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """An autograd function that vmap made of one of the forward, with the numbers of the dims that it mapped.

        It stays whole as any other (see :meth:`_call_autograd_function`), under the same vmaps.
        """
        function, given = cls, list[tuple[tuple[Any, ...], str]]()
        while function in self._mapped:
            function, in_dims, randomness = self._mapped[function]
            given.insert(0, (in_dims, randomness))
        self._need_values(args, {})
        start = len(self.tape.ops)
        with self.draws_itself(), self._paused(), torch._C.DisableTorchFunction():
            out = run(*args)
        mark_own_sizes(function, args, self.tape.ops[start:])
        results, dims = out[: -len(given)], out[-len(given) :]
        levels = []
        for (in_dims, randomness), out_dims in zip(given, dims, strict=True):
            # With the dims of the numbers that the vmaps inside of this one gave.
            found = out_dims[: len(results)] if isinstance(out_dims, tuple) else (out_dims,)
            leaves = tuple(tree_leaves(in_dims))
            if any(d is not None for d in leaves):
                levels.append(Level(leaves, found if isinstance(dims[0], tuple) else found[0], randomness))
            elif any(d is not None for d in found):
                raise CaptureError(
                    f"under torch.vmap the autograd function {function.__name__} draws other numbers for each example, "
                    "but it is given nothing that differs between them; draw them outside of it"
                )
        if not all(isinstance(t, torch.Tensor) for t in results):
            raise CaptureError(
                f"under torch.vmap the autograd function {function.__name__} gives something that is no tensor"
            )
        node = self._node("call_function", caller_of(function, tuple(levels)), args, {}, start)
        single = not isinstance(dims[0], tuple)
        found = self._finish(node, results[0] if single else results, args, {}, start, in_place=False)
        return *((found,) if single else found), *dims
