"""An oracle without labels that also judges norms written out by hand, such as ``x * x.pow(2).mean(-1).rsqrt()``.

In a copy of the model whose removed slices are zero a removed channel is zero, or what the model makes of zeros: the
same at every removed index. So whenever a mean, a variance or a norm runs over a dim that is smaller in the slim
module, the indices that look so do not exist. (The slim module's shape only says how many there are: a pixel can be
zero by chance.)

It can't judge a product of two activations that are both something else than zero at removed channels, such as the
``elu(q) + 1`` and ``elu(k) + 1`` of linear attention: there the removed channels do take part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.oracle import masked_copy, tensors

__all__ = ["expected_output"]

_REDUCTIONS = frozenset(
    {
        getattr(home, name)
        for home in (torch, Tensor)
        for name in ("mean", "var", "std", "var_mean", "std_mean")
        if hasattr(home, name)
    }
)
_NORMS = frozenset({F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, F.local_response_norm})

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
        if dense is not None and slim is not None:
            assert len(dense.seen) == len(slim.seen), "the slim module makes other calls than the model"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:  # a slice that does not exist has no direction
            return func(*args, **kwargs).nan_to_num(0.0)
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        return self._reduced(func, args, kwargs)

    def _reduced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("input")
        if (func not in _REDUCTIONS and func not in _NORMS) or not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        args = (x, *args[1:])
        kwargs = {k: v for k, v in kwargs.items() if k != "input"}
        self.seen.append(x.detach())
        if self.dense is None or self.slim is None:
            return func(*args, **kwargs)
        call = len(self.seen) - 1
        before, after = self.dense.seen[call], self.slim.seen[call]
        kept = {}
        if before.shape == x.shape and after.dim() == x.dim():
            gamma = kwargs.get("weight", args[2] if len(args) > 2 else None) if func in _NORMS else None
            channels = x.dim() - 1 if func in (F.layer_norm, F.rms_norm) else 1
            found = {
                d: _kept(before, x, d, n, gamma if d == channels else None)
                for d, n in enumerate(after.shape)
                if n < x.shape[d]
            }
            kept = {d: indices for d, indices in found.items() if indices is not None}
        if not kept:
            return func(*args, **kwargs)
        if func in _REDUCTIONS:
            return _reduce(func, kept, args, kwargs)
        return _norm(func, kept, args, kwargs)


def _kept(before: Tensor, now: Tensor, dim: int, size: int, gamma: Tensor | None) -> Tensor | None:
    """The ``size`` indices that exist: those with a gamma, or all but those that are zero now, or all alike."""
    if isinstance(gamma, Tensor) and gamma.shape == (now.shape[dim],) and int((gamma != 0).sum()) == size:
        return gamma.nonzero().flatten()
    was, rows = (t.movedim(dim, 0).flatten(1) if t.dim() > 1 else t[:, None] for t in (before, now))
    gone = (rows == 0).all(1) & ~(was == 0).all(1)
    if int((~gone).sum()) == size:
        return (~gone).nonzero().flatten()
    number = len(rows) - size
    if number > 1:
        for row in rows:
            gone = (rows - row).abs().amax(1) <= 1e-12 * rows.abs().max()
            if int(gone.sum()) == number:
                return (~gone).nonzero().flatten()
    return None


def _select(x: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for d, indices in kept.items():
        x = x.index_select(d, indices)
    return x


def _reduce(func: Any, kept: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 and not isinstance(args[1], bool) else None))
    dims = range(x.dim()) if dim is None else [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    return func(_select(x, {d: i for d, i in kept.items() if d in dims}), *args[1:], **kwargs)


def _norm(func: Any, kept: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, args = args[0], args[1:]
    if func is F.group_norm:
        return _group_norm(x, kept, *args, **kwargs)
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
    return _scatter(x, out, kept)


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
    dense, thin = _Calls(), _Calls()
    with torch.no_grad():
        with dense:
            model(*args, **kwargs)
        with thin:
            slim(*args, **kwargs)
        kept = slim.plan.kept_indices()
        masked = masked_copy(model, kept)
        whole = {name: buffer.clone() for name, buffer in masked.named_buffers()}
        _zero_buffers(masked, kept)
        with _Calls(dense, thin):
            out = masked(*args, **kwargs)
        if all(bool(t.isfinite().all()) for t in tensors(out)):
            return out
        for name, buffer in masked.named_buffers():  # something divides by a buffer, such as the periods of a rotation
            buffer.copy_(whole[name])
        with _Calls(dense, thin):
            return masked(*args, **kwargs)


def _zero_buffers(masked: nn.Module, kept: Mapping[str, tuple[Tensor | None, ...]]) -> None:
    """The removed slices of buffers such as position tables become zeros too."""
    for name, buffer in masked.named_buffers():
        for dim, indices in enumerate(kept.get(name, ())):
            if indices is not None and buffer.is_floating_point():
                gone = torch.ones(buffer.shape[dim], dtype=torch.bool)
                gone[indices] = False
                buffer.index_fill_(dim, gone.nonzero().flatten(), 0)
