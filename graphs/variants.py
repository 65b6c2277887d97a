"""Which graph of a module runs: where sizes decide what the model does, a module may need several.

A graph holds one way through the model's code, and its guards refuse inputs whose sizes lead another way. The module
then captures the model once more, on those inputs, and keeps the new graph beside its own. All of them run on the same
parameters, buffers and submodules. The same goes for a precision that the module is moved to, where the model decides
by it.
"""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from chase_fx.errors import ChaseError, OtherPathError, OtherSizeError
from chase_fx.graphs.autocast import outside_autocast, preserved_modes
from chase_fx.graphs.draws import saved_generators
from chase_fx.graphs.duplicate import copied
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.precision import Change
from chase_fx.graphs.recording import Recording
from chase_fx.graphs.trees import tensors_in
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in

__all__ = ["Forward", "Recapture", "Variant", "Variants", "by_sizes"]

Forward = Callable[..., Any]
# Graphs of one module besides its own, for a loop over a sequence makes one for each length; shapes that it remembers.
_MOST = 64
_SHAPES = 4096
_FOREIGN = "in the precision that the module was moved to, the model may do something else than in that of its capture"
_CAPTURING = threading.RLock()  # a capture patches what all threads share


@dataclass(frozen=True)
class Variant:
    """Another graph of a module.

    Attributes:
        forward: its code, to be called with the module.
        names: of the buffers and submodules that the module holds for it alone.
        calls: the submodules that it calls, by name.
        writes: the parameters that it writes to.
        dtypes: of the inputs that it was captured with, for a model may decide by them.
    """

    forward: Forward
    names: tuple[str, ...]
    calls: frozenset[str]
    writes: frozenset[str]
    dtypes: tuple[torch.dtype, ...]


class Key(NamedTuple):
    """What is remembered of a call."""

    training: bool
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


class Recapture(Protocol):
    """Captures the model of a module again."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variant:
        """The graph for these inputs; raises ChaseError where there is none."""

    def follows(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: torch.dtype, other: torch.dtype
    ) -> tuple[tuple[Change, ...], ...] | None:
        """What follows the precision in each graph of the dense model between two; None if the graphs differ."""


@dataclass
class Variants:
    """The graphs of one module.

    Attributes:
        recapture: makes another one for a module and its inputs.
        writes: the parameters that the module's own graph writes to.
        foreign: whether the module is in a precision that its own graph does not hold for.
        others: the graphs besides the module's own.
        serving: by the mode, and the names, shapes, strides and types of the inputs, which one runs: 0 is the own one.
    """

    recapture: Recapture | None = None
    writes: frozenset[str] = frozenset()
    foreign: bool = False
    others: list[Variant] = field(default_factory=list)
    serving: dict[Hashable, int] = field(default_factory=dict)

    def __copy__(self) -> Variants:
        return Variants(self.recapture, self.writes, self.foreign, list(self.others), dict(self.serving))

    def __reduce__(self) -> Any:
        """The means to make graphs again, if the model's class and the user's rules can be pickled."""
        try:
            packed = pickle.dumps(self.recapture)
        except Exception:  # noqa: BLE001  (a class says in its own way that it can't)
            packed = pickle.dumps(None)
        return _unpacked, (packed, self.writes, self.foreign)

    def trusted(self, own: Forward) -> Forward:
        """The module's own graph, where no other one can be captured: in a capture, a compilation, a transform.

        Raises:
            OtherPathError: it does not hold in the module's precision.
        """
        if self.foreign:
            raise OtherPathError(
                f"{_FOREIGN}; call it once on inputs of these sizes before it is compiled or transformed"
            )
        return own

    def names(self) -> set[str]:
        """The buffers and submodules of the module that only the other graphs need."""
        return {name for variant in self.others for name in variant.names}

    def forget(self, module: nn.Module) -> None:
        """Drop the other graphs, and what ``module`` holds for them."""
        for name in self.names():
            delattr(module, name)
        self.others.clear()
        self.serving.clear()

    def find(self, module: nn.Module, own: Forward, key: Key, args: Any, kwargs: Any) -> Any:
        """The result for inputs of shapes that were not seen yet."""
        saved = _Saved(module, self.writes.union(*(variant.writes for variant in self.others)), (args, kwargs))
        # A checkpoint counts what is saved for the backward pass, also by a graph that is broken off.
        counted = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        refused: OtherPathError | None = OtherPathError(_FOREIGN) if self.foreign else None
        for place, forward in enumerate((own, *(variant.forward for variant in self.others))):
            if self.others[place - 1].dtypes != key.dtypes if place else self.foreign:
                continue
            try:
                # a graph may be left inside a region of its own
                with preserved_modes(), torch.no_grad() if counted else nullcontext():
                    out = forward(module, *args, **kwargs)
            except OtherSizeError as e:
                refused = refused or e.with_traceback(None)  # the frames hold every tensor of the forward
            else:
                self._remember(key, place)
                if not counted:
                    return out
            if not saved.restore():
                raise refused or OtherSizeError("the inputs were written to inside of a checkpoint")
            if key in self.serving:
                return forward(module, *args, **kwargs)
        assert refused is not None
        with _CAPTURING:
            another = self._another(module, key, args, kwargs, refused)
            place = len(self.others)
        out = another.forward(module, *args, **kwargs)
        self._remember(key, place)
        return out

    def _remember(self, key: Key, place: int) -> None:
        if len(self.serving) == _SHAPES:
            self.serving.clear()
        self.serving[key] = place

    def _another(self, module: nn.Module, key: Key, args: Any, kwargs: Any, refused: OtherPathError) -> Variant:
        if self.recapture is None:
            raise refused
        if len(self.others) == _MOST:
            self.forget(module)
        try:
            with outside_autocast(), normal_tensors():
                found = self.recapture(module, args, kwargs)
        except ChaseError as e:
            raise type(refused)(f"{refused}. It could not be captured again: {e}", refused.where) from e
        found = replace(found, dtypes=key.dtypes)
        self.others.append(found)
        return found


def _unpacked(packed: bytes, writes: frozenset[str], foreign: bool) -> Variants:
    try:
        return Variants(pickle.loads(packed), writes, foreign)  # noqa: S301  (a part of what is unpickled anyway)
    except Exception:  # noqa: BLE001  (whatever is not there: the model's class, a device)
        return Variants(None, writes, foreign)


def by_sizes(own: Forward) -> Forward:
    """``own``, the code of a module's own graph; where its guards refuse sizes, the code of the graph for these."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        variants: Variants = self.variants
        if torch.compiler.is_compiling():  # known sizes only: a capture can't be compiled
            return _compiled(variants, own, self, args, kwargs)
        if any(isinstance(mode, Recording) for mode in torch.overrides._get_current_function_mode_stack()):
            return variants.trusted(own)(self, *args, **kwargs)  # in a capture of what this module is a part of
        if torch._C._len_torch_dispatch_stack():  # its tensors may have no sizes to remember
            return variants.trusted(own)(self, *args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        key = _key(self, tensors, kwargs)
        place = variants.serving.get(key)
        if place == 0:
            return own(self, *args, **kwargs)
        if place is not None:
            return variants.others[place - 1].forward(self, *args, **kwargs)
        if not all(map(_plain, tensors)) or _transformed():
            return variants.trusted(own)(self, *args, **kwargs)
        return variants.find(self, own, key, args, kwargs)

    return forward


def _key(module: nn.Module, tensors: list[torch.Tensor], kwargs: Mapping[str, Any]) -> Key:
    strides = tuple([t.stride() if t.layout is torch.strided else () for t in tensors])
    shapes, dtypes = tuple([t.shape for t in tensors]), tuple([t.dtype for t in tensors])
    return Key(module.training, tuple(kwargs), shapes, strides, dtypes)


def _compiled(variants: Variants, own: Forward, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if variants.others:
        key = _key(module, list(tensors_in((args, kwargs))), kwargs)
        for known, place in variants.serving.items():
            if place and key == known:
                return variants.others[place - 1].forward(module, *args, **kwargs)
    return variants.trusted(own)(module, *args, **kwargs)


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)


def _transformed() -> bool:
    return torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


class _Saved:
    """What a forward that is broken off may have changed: generators, buffers, some parameters, its inputs."""

    def __init__(self, module: nn.Module, writes: frozenset[str], inputs: Any) -> None:
        self._restore_generators = saved_generators()
        modules = modules_of(module)
        own = [*buffers_in(modules).values(), *(p for n, p in parameters_in(modules).items() if n in writes)]
        self._own = [(t, copied(t, {})) for t in {id(t): t for t in own}.values() if not t.is_meta]
        given = {id(t): t for t in tensors_in(inputs) if not t.is_meta}
        self._given = [(t, None if t.is_inference() else t._version, copied(t, {})) for t in given.values()]

    def restore(self) -> bool:
        """Put everything back; whether that was possible."""
        self._restore_generators()
        with torch.no_grad():
            for tensor, value in self._own:  # kernels of norms write without counting it
                if not _same(tensor, value):  # a write would bar gradients of earlier calls that need the tensor
                    tensor.copy_(value)
            for tensor, version, value in self._given:
                if _same(tensor, value) if version is None else tensor._version == version:
                    continue
                if tensor.requires_grad:  # its history was changed too
                    return False
                tensor.copy_(value)
        return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
