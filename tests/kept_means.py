"""An oracle without labels that also judges norms written out by hand, such as ``x * x.pow(2).mean(-1).rsqrt()``.

In a copy of the model whose removed slices are zero a removed channel is zero, or what the model makes of zeros: the
same at every removed index. So whenever a sum, a mean, a variance, a norm or a matrix product runs over a dim that is
smaller in the slim module, the indices that look so do not exist. (The slim module's shape only says how many there
are: a pixel can be zero by chance.) Where nothing tells which ones do not exist, it says so: :class:`UndecidedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import chase_fx
from tests.oracle import masked_copy, tensors

__all__ = ["UndecidedError", "expected_output", "masked_run", "seed"]

_REDUCTIONS = frozenset(
    {
        getattr(home, name)
        for home in (torch, Tensor)
        for name in ("sum", "mean", "var", "std", "var_mean", "std_mean")
        if hasattr(home, name)
    }
)
_LENGTHS = frozenset({torch.norm, Tensor.norm, torch.linalg.vector_norm})
_PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})
# A layer whose weights are computed is such a product too: removed weights that are standardised are no longer zero.
_LAYERS = {F.linear: 0, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_NORMS = frozenset(
    {F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, F.local_response_norm, F.normalize}
)
_LOSSES = frozenset({F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss})  # means of two tensors of one shape
_WATCHED = _LOSSES | _REDUCTIONS | _LENGTHS | _PRODUCTS | _NORMS | frozenset(_LAYERS)

# The same function, but one that shows what it calls: its own guard would hand itself to the mode again.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


class _Calls(TorchFunctionMode):
    """Notes what every reduced tensor looks like, in order of the calls; drops what the slim module does not have."""

    def __init__(self, dense: _Calls | None = None, slim: _Calls | None = None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.dense, self.slim = dense, slim

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:  # a slice that does not exist has no direction
            return func(*args, **kwargs).nan_to_num(0.0)
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        if func is torch.einsum and isinstance(args[0], str) and len(args) == 3:
            return self._reduced(_Einsum(args[0], args[2]), (args[1],), kwargs)
        return self._reduced(func, args, kwargs)

    def _reduced(  # noqa: PLR0911
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x = args[0] if args else kwargs.get("input")
        watched = (func in _WATCHED and kwargs.get("reduction") != "none") or isinstance(func, _Einsum)
        if not watched or not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        if func in _LAYERS and isinstance(kwargs.get("weight", args[1] if len(args) > 1 else None), nn.Parameter):
            return func(*args, **kwargs)
        args = (x, *args[1:])
        kwargs = {k: v for k, v in kwargs.items() if k != "input"}
        self.seen.append(x.detach())
        if self.dense is None or self.slim is None:
            return func(*args, **kwargs)
        call = len(self.seen) - 1
        if call >= len(self.dense.seen):
            raise OtherCallsError("the model makes other calls once its units are masked")
        before, after = self.dense.seen[call], self.slim.seen[call]
        if before.shape != x.shape or after.dim() != x.dim():
            return func(*args, **kwargs)
        gamma = kwargs.get("weight", args[2] if len(args) > 2 else None) if func in _NORMS else None
        kept = {}
        for d in _runs_over(func, args, kwargs):
            if after.shape[d] < x.shape[d]:
                own = gamma if d == (x.dim() - 1 if func in (F.layer_norm, F.rms_norm) else 1) else None
                kept[d] = _kept(before, x, d, after.shape[d], own, alike=func not in _NORMS)
        if not kept:
            return func(*args, **kwargs)
        if func in _REDUCTIONS | _LENGTHS:
            return func(_select(x, kept), *args[1:], **kwargs)
        if func in _LOSSES:
            more = {k: _select(v, kept) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            return func(*(_select(a, kept) if isinstance(a, Tensor) else a for a in args), **more)
        if func in _PRODUCTS or func in _LAYERS or isinstance(func, _Einsum):
            return func(_zeroed(x, kept), *args[1:], **kwargs)
        return _norm(func, kept, args, kwargs)


@dataclass(frozen=True)
class _Einsum:
    """An einsum of two operands as a function of the first."""

    equation: str
    other: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.other)

    def summed(self, rank: int) -> list[int]:
        """The dims of the first operand that are not in the result."""
        inputs, _, out = self.equation.replace(" ", "").partition("->")
        first, _, second = inputs.partition(",")
        out = out or "".join(c for c in sorted(set(first + second)) if (first + second).count(c) == 1)
        before, dots, after = first.partition("...")
        places = [*enumerate(before), *((rank - len(after) + i, c) for i, c in enumerate(after) if dots)]
        return [d for d, c in places if c not in out]


class UndecidedError(Exception):
    """Nothing tells which indices do not exist."""


class OtherCallsError(UndecidedError):
    """Calls of the model can't be told apart from those that only one of the two modules makes."""


def _runs_over(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The dims of the first argument that a call reduces or sums over."""
    x = args[0]
    n = x.dim()
    if isinstance(func, _Einsum):
        return func.summed(n)
    if func in _PRODUCTS or func in _LAYERS:
        return [n - 1 - _LAYERS.get(func, 0)]
    if func in (F.layer_norm, F.rms_norm):
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return list(range(n - len(shape), n))
    if func in (F.batch_norm, F.instance_norm, *_LOSSES):
        return [d for d in range(n) if d != 1 or func in _LOSSES]
    if func in (F.group_norm, F.local_response_norm):
        return [1]
    place = 2 if func in _LENGTHS or func is F.normalize else 1
    given = args[place] if len(args) > place and not isinstance(args[place], bool) else None
    dim = kwargs.get("dim", kwargs.get("axis", 1 if func is F.normalize and given is None else given))
    return list(range(n)) if dim is None else [d % n for d in ([dim] if isinstance(dim, int) else dim)]


def _kept(  # noqa: PLR0917
    before: Tensor, now: Tensor, dim: int, size: int, gamma: Tensor | None, alike: bool
) -> Tensor:
    """The ``size`` indices that exist: those with a gamma, or all but those that are zero now, or all alike.

    With ``alike`` it does not matter which ones of equal indices are taken.
    """
    if isinstance(gamma, Tensor) and gamma.shape == (now.shape[dim],) and int((gamma != 0).sum()) == size:
        return gamma.nonzero().flatten()
    was, rows = (t.movedim(dim, 0).flatten(1) if t.dim() > 1 else t[:, None] for t in (before, now))
    zero = (rows == 0).all(1)
    number = len(rows) - size
    for gone in (zero & ~(was == 0).all(1), zero):
        if int(gone.sum()) == number or (alike and int(gone.sum()) > number):
            out = gone.nonzero().flatten()[:number]
            return (~torch.zeros(len(rows), dtype=torch.bool).index_fill(0, out, True)).nonzero().flatten()
    if number > 1:
        classes = [(rows - row).abs().amax(1) <= 1e-12 * rows.abs().max() for row in rows]
        found = {tuple(gone.tolist()) for gone in classes if int(gone.sum()) == number}
        if len(found) == 1:
            return (~torch.tensor(found.pop())).nonzero().flatten()
    raise UndecidedError(f"{number} of {len(rows)} indices do not exist, and nothing tells which")


def _select(x: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for d, indices in kept.items():
        x = x.index_select(d, indices)
    return x


def _zeroed(x: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Zeros where the dims of ``x`` have nothing that exists."""
    for dim, indices in kept.items():
        exists = torch.zeros(x.shape[dim], dtype=x.dtype, device=x.device).index_fill(0, indices, 1)
        x = x * exists.view(-1, *(1 for _ in range(x.dim() - dim - 1)))
    return x


def _norm(func: Any, kept: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, args = args[0], args[1:]
    if func is F.group_norm:
        return _group_norm(x, kept, *args, **kwargs)
    target = kwargs.pop("out", None)  # spectral norm writes the vectors of its power method in place
    small = _select(x, kept)
    if func in (F.layer_norm, F.rms_norm):
        shape = args[0] if args else kwargs.pop("normalized_shape")
        first = x.dim() - len(shape)
        own = {d - first: i for d, i in kept.items() if d >= first}
        rest = [_select(a, own) if isinstance(a, Tensor) else a for a in args[1:]]
        more = {k: _select(v, own) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        out = func(small, tuple(small.shape[first:]), *rest, **more)
    else:  # batch and instance norm: everything else has one value per channel
        own = {0: kept[1]} if 1 in kept else {}
        rest = [_select(a, own) if isinstance(a, Tensor) else a for a in args]
        more = {k: _select(v, own) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        out = func(small, *rest, **more)
    whole = _scatter(x, out, kept)
    return whole if target is None else target.copy_(whole)


def _scatter(like: Tensor, value: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    out = torch.zeros_like(like)
    index = [kept.get(d, torch.arange(n)) for d, n in enumerate(like.shape)]
    return out.index_put(tuple(torch.meshgrid(*index, indexing="ij")), value)


def _group_norm(
    x: Tensor,
    kept: Mapping[int, Tensor],
    num_groups: int,
    *rest: Any,
    **kwargs: Any,
) -> Tensor:
    def affine(weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Any:
        return weight, bias, eps

    weight, bias, eps = affine(*rest, **kwargs)
    width = x.shape[1] // num_groups
    alive = kept.get(1, torch.arange(x.shape[1]))
    others = {d: i for d, i in kept.items() if d != 1}
    out = torch.zeros_like(x)
    for group in range(num_groups):
        own = alive[alive // width == group]
        if len(own):
            few = F.group_norm(
                _select(x[:, own], others),
                1,
                None if weight is None else weight[own],
                None if bias is None else bias[own],
                eps,
            )
            out = out + _scatter(x, few, {**others, 1: own})
    return out


def expected_output(model: nn.Module, slim: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the slim module has to return."""
    with torch.no_grad():
        return masked_run(model, slim, args, kwargs)[0]


def masked_run(
    model: nn.Module, slim: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, nn.Module]:
    """What the slim module has to return, and the masked copy of ``model`` that it was computed with.

    Both modules run in the mode that they are in; gradients reach the copy's parameters.
    """
    try:
        return _masked_run(model, slim, args, kwargs)
    except OtherCallsError:  # the graph of the model makes those of every expert, and none that nobody reads
        return _masked_run(chase_fx.trace(model, args, dict(kwargs)), slim, args, kwargs)


def _masked_run(
    model: nn.Module, slim: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, nn.Module]:
    dense, thin = _Calls(), _Calls()
    states = [state for root in (model, slim) for state in _buffers(root)]
    with torch.no_grad():
        with dense:
            _drawn(model, args, kwargs)
        with thin:
            _drawn(slim, args, kwargs)
        for module, name, buffer, value in states:
            module._buffers[name] = buffer.copy_(value)
    if len(dense.seen) != len(thin.seen):
        raise OtherCallsError("the slim module makes other calls than the model")
    kept = slim.plan.kept_indices()
    masked = masked_copy(model, kept)
    whole = _buffers(masked)
    _zero_buffers(masked, kept)
    out = _masked_result(masked, dense, thin, args, kwargs)
    if all(bool(t.isfinite().all()) for t in tensors(out)):
        return out, masked
    with torch.no_grad():  # something divides by a buffer, such as the periods of a rotation
        for module, name, buffer, value in whole:
            module._buffers[name] = buffer.copy_(value)
    return _masked_result(masked, dense, thin, args, kwargs), masked


def _buffers(root: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Each buffer, and a copy of its values: a forward may write to it, and may put another one in its place."""
    found = [(m, name, b) for m in root.modules() for name, b in m._buffers.items() if b is not None]
    return [(m, name, b, b.clone()) for m, name, b in found]


def _masked_result(
    masked: nn.Module, dense: _Calls, slim: _Calls, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    calls = _Calls(dense, slim)
    with calls:
        out = _drawn(masked, args, kwargs)
    if len(calls.seen) != len(dense.seen):  # such as those of experts that only one of the two chooses
        raise OtherCallsError("the model makes other calls once its units are masked")
    return out


def _drawn(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What ``root`` gives on copies of the inputs; a forward that draws numbers draws the same ones every time."""
    seed()
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))  # a forward may write to its inputs
    return root(*args, **kwargs)


def seed() -> None:
    """The state that every forward of a judgement draws from. (``torch.manual_seed`` looks for accelerators.)"""
    torch.default_generator.manual_seed(0)


def _zero_buffers(masked: nn.Module, kept: Mapping[str, tuple[Tensor | None, ...]]) -> None:
    """The removed slices of buffers such as position tables become zeros too."""
    for name, buffer in masked.named_buffers():
        for dim, indices in enumerate(kept.get(name, ())):
            if indices is not None and buffer.is_floating_point():
                gone = torch.ones(buffer.shape[dim], dtype=torch.bool)
                gone[indices] = False
                buffer.index_fill_(dim, gone.nonzero().flatten(), 0)
