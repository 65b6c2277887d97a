"""Which graph of a module runs: where sizes decide what the model does, a module may need several.

A graph holds one way through the model's code, and its guards refuse inputs whose sizes lead another way. The module
then captures the model once more, on those inputs, and keeps the new graph beside its own. All of them run on the same
parameters, buffers and submodules.
"""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from chase_fx.errors import ChaseError, OtherSizeError
from chase_fx.graphs.autocast import outside_autocast, preserved_autocast
from chase_fx.graphs.draws import saved_generators
from chase_fx.graphs.duplicate import copied
from chase_fx.graphs.recording import Recording
from chase_fx.graphs.trees import tensors_in
from chase_fx.graphs.walk import buffers_in, modules_of

__all__ = ["Forward", "Recapture", "Variant", "Variants", "by_sizes"]

Forward = Callable[..., Any]
# Graphs of one module besides its own. A loop over a sequence makes one for each length.
_MOST = 64
_CAPTURING = threading.RLock()  # a capture patches what all threads share


@dataclass(frozen=True)
class Variant:
    """Another graph of a module.

    Attributes:
        forward: its code, to be called with the module.
        names: of the buffers and submodules that the module holds for it alone.
        calls: the submodules that it calls, by name.
    """

    forward: Forward
    names: tuple[str, ...]
    calls: frozenset[str]


Recapture = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Variant]


@dataclass
class Variants:
    """The graphs of one module.

    Attributes:
        recapture: makes another one for a module and its inputs; raises ChaseError where there is none.
        others: the graphs besides the module's own.
        serving: by the mode, the names and the shapes of the inputs, which one runs: 0 is the module's own.
    """

    recapture: Recapture | None = None
    others: list[Variant] = field(default_factory=list)
    serving: dict[Hashable, int] = field(default_factory=dict)

    def __copy__(self) -> Variants:
        return Variants(self.recapture, list(self.others), dict(self.serving))

    def __reduce__(self) -> Any:
        """The means to make graphs again, if the model's class and the user's rules can be pickled."""
        try:
            packed = pickle.dumps(self.recapture)
        except Exception:  # noqa: BLE001  (a class says in its own way that it can't)
            packed = pickle.dumps(None)
        return _unpacked, (packed,)

    def find(self, module: nn.Module, own: Forward, key: Hashable, args: Any, kwargs: Any) -> Any:
        """The result for inputs of shapes that were not seen yet."""
        saved = _Saved(module, (args, kwargs))
        refused: OtherSizeError | None = None
        for place, forward in enumerate((own, *(variant.forward for variant in self.others))):
            try:
                with preserved_autocast():  # a graph may be left inside a region of its own
                    out = forward(module, *args, **kwargs)
            except OtherSizeError as e:
                refused = refused or e.with_traceback(None)  # the frames hold every tensor of the forward
            else:
                self.serving[key] = place
                return out
            if not saved.restore():
                raise refused
        assert refused is not None
        with _CAPTURING:
            another = self._another(module, args, kwargs, refused)
            place = len(self.others)
        out = another.forward(module, *args, **kwargs)
        self.serving[key] = place
        return out

    def _another(self, module: nn.Module, args: Any, kwargs: Any, refused: OtherSizeError) -> Variant:
        if self.recapture is None:
            raise refused
        if len(self.others) == _MOST:
            self._forget(module)
        try:
            with outside_autocast():
                found = self.recapture(module, args, kwargs)
        except ChaseError as e:
            raise OtherSizeError(
                f"{refused}. It could not be captured again for these sizes: {e}", refused.where
            ) from e
        self.others.append(found)
        return found

    def _forget(self, module: nn.Module) -> None:
        for variant in self.others:
            for name in variant.names:
                delattr(module, name)
        self.others.clear()
        self.serving.clear()


def _unpacked(packed: bytes) -> Variants:
    return Variants(pickle.loads(packed))  # noqa: S301  (a part of what is unpickled anyway)


def by_sizes(own: Forward) -> Forward:
    """``own``, the code of a module's own graph; where its guards refuse sizes, the code of the graph for these."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        variants: Variants = self.variants
        if torch.compiler.is_compiling():  # known sizes only: a capture can't be compiled
            return _compiled(variants, own, self, args, kwargs)
        if any(isinstance(mode, Recording) for mode in torch.overrides._get_current_function_mode_stack()):
            return own(self, *args, **kwargs)  # in a capture of what this module is a part of
        tensors = list(tensors_in((args, kwargs)))
        key = self.training, tuple(kwargs), tuple([t.shape for t in tensors])
        place = variants.serving.get(key)
        if place == 0:
            return own(self, *args, **kwargs)
        if place is not None:
            return variants.others[place - 1].forward(self, *args, **kwargs)
        if torch._C._len_torch_dispatch_stack() or not all(map(_plain, tensors)) or _transformed():
            return own(self, *args, **kwargs)
        return variants.find(self, own, key, args, kwargs)

    return forward


def _compiled(variants: Variants, own: Forward, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if variants.others:
        key = module.training, tuple(kwargs), tuple([tuple(t.shape) for t in tensors_in((args, kwargs))])
        for known, place in variants.serving.items():
            if place and key == known:
                return variants.others[place - 1].forward(module, *args, **kwargs)
    return own(module, *args, **kwargs)


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)


def _transformed() -> bool:
    return torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


class _Saved:
    """What a forward that is broken off may have changed: generators, buffers and the inputs themselves."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        self._restore_generators = saved_generators()
        tensors = [*buffers_in(modules_of(module)).values(), *tensors_in(inputs)]
        self._tensors = [(t, copied(t, {})) for t in {id(t): t for t in tensors}.values() if not t.is_meta]

    def restore(self) -> bool:
        """Put everything back; whether that was possible."""
        self._restore_generators()
        with torch.no_grad():
            for tensor, value in self._tensors:
                if torch.equal(tensor, value):  # a write would bar gradients of earlier calls that need the tensor
                    continue
                if tensor.requires_grad:  # its history was changed too
                    return False
                tensor.copy_(value)
        return True
