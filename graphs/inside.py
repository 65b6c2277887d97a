"""What a forward does inside ``torch.vmap`` and ``torch.func``, on tensors that stand for other ones.

Nothing is written to the graph there; what comes out is written by its ATen calls (see :mod:`.hidden`), and the numbers
in them are plain. So the calls are noted that the forward made, to tell its own numbers from those that torch made of
sizes, and what it makes of sizes itself holds for the example's sizes alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import eager_transforms, vmap

from chase_fx.graphs.applied import Applied
from chase_fx.graphs.hidden import NEW, VMAP_END, transformed
from chase_fx.graphs.live import fix, is_live, plain
from chase_fx.graphs.own_sizes import mark_gradients
from chase_fx.graphs.patches import Patch
from chase_fx.graphs.reads import SIZE_CALLS

__all__ = ["Inside"]

_SIZES = (SIZE_CALLS - {"dim", "ndimension"}) | {"shape"}
_FUNCTORCH = "torch._functorch."


class Inside(Applied):
    """A recording of calls inside transforms."""

    def inside_patches(self) -> list[Patch]:
        """What tells which calls torch makes where a vmap ends."""
        original = getattr(vmap, VMAP_END)

        def end(*args: Any) -> Any:
            start = len(self.tape.ops)
            out = original(*args)
            for op in self.tape.ops[start:]:
                op.call = VMAP_END
            return out

        gradient = eager_transforms._autograd_grad

        def pulled_back(*args: Any, **kwargs: Any) -> Any:
            """Autograd looks at tensors as they are, also in a pullback that is called when its transform has ended."""
            if not self._active:
                return gradient(*args, **kwargs)
            start = len(self.tape.ops)
            if transformed():
                out = gradient(*args, **kwargs)
            else:
                with self._paused(), torch._C.DisableTorchFunction():
                    out = gradient(*args, **kwargs)
            mark_gradients(self.tape.ops, start)
            return out

        return [(vmap, VMAP_END, end), (eager_transforms, "_autograd_grad", pulled_back)]

    def _call_inside(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        start = len(self.tape.ops)
        out = func(*_fixed(args), **_fixed(kwargs))
        for op in self.tape.ops[start:]:
            op.call = op.call or name  # maybe a call inside of this one
            if op.op in NEW and isinstance(out, torch.Tensor):
                op.mapped = len(op.outs[0].shape) - out.dim()
        if name in _SIZES:
            if not _asked_by_torch():
                self.arguments.keep_sizes()
            elif out == 1:  # a nested vmap asks how many there are
                self._mapped_once(args[0])
        return out

    def _read_size(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super()._read_size(name, func, args, kwargs)
        if is_live(out) and plain(out) == 1 and _asked_by_torch():  # the outermost vmap
            self.arguments.mapped_once.append(out)
        return out

    def _mapped_once(self, tensor: torch.Tensor) -> None:
        """Note that a vmap runs over a dim of size 1, which leaves no trace in the sizes of what comes out."""
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if self.arguments.knows(tensor):
            ones = [self._live_dim(tensor, d, n) for d, n in enumerate(tensor.shape) if n == 1]
            self.arguments.mapped_once += filter(is_live, ones)
        else:
            self.arguments.keep_sizes()


def _asked_by_torch() -> bool:
    """Whether the transform itself made the call that is recorded, maybe under other modes than the recorder."""
    frame = sys._getframe(3)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith(_FUNCTORCH)


def _fixed(value: Any) -> Any:
    """``value`` with the plain numbers that a transform makes of live ones."""
    if is_live(value):
        return fix(value)
    if type(value) in (tuple, list, torch.Size):
        return type(value)(map(_fixed, value))
    if type(value) is dict:
        return {k: _fixed(v) for k, v in value.items()}
    if type(value) is slice:
        return slice(_fixed(value.start), _fixed(value.stop), _fixed(value.step))
    return value
