"""An oracle without labels that also judges norms written out by hand, such as ``x * x.pow(2).mean(-1).rsqrt()``.

In a copy of the model whose removed slices are zero a removed channel is zero everywhere. So whenever a mean, a variance
or a norm runs over a dim, the indices that are zero there now, and were not in the dense model, do not exist. (A pixel can be zero by chance as well. So only dims count
that are smaller in the slim module too.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.oracle import masked_copy

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


class _Calls(TorchFunctionMode):
    """Notes which indices are zero in every reduced tensor, in order of the calls."""

    def __init__(self, dense: _Calls | None = None, slim: _Calls | None = None) -> None:
        super().__init__()
        self.zeros: list[list[Tensor]] = []
        self.dense = dense
        self.slim = slim if dense is not None and slim is not None and len(slim.zeros) == len(dense.zeros) else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _REDUCTIONS and func not in _NORMS:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.pop("input")
        args = (x, *args[1:])
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        zeros = [(x.detach() == 0).movedim(d, 0).reshape(x.shape[d], -1).all(1) for d in range(x.dim())]
        self.zeros.append(zeros)
        if self.dense is None:
            return func(*args, **kwargs)
        call = len(self.zeros) - 1
        before = self.dense.zeros[call]
        gone = [now & ~then for now, then in zip(zeros, before, strict=True)]
        kept = {d: (~g).nonzero().flatten() for d, g in enumerate(gone) if g.any()}
        if self.slim is not None and len(self.slim.zeros[call]) == x.dim():
            kept = {d: i for d, i in kept.items() if len(self.slim.zeros[call][d]) == len(i)}
        if not kept:
            return func(*args, **kwargs)
        if func in _REDUCTIONS:
            return _reduce(func, kept, args, kwargs)
        return _norm(func, kept, args, kwargs)


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
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    width = x.shape[1] // num_groups
    alive = kept.get(1, torch.arange(x.shape[1]))
    others = {d: i for d, i in kept.items() if d != 1}
    out = torch.zeros_like(x)
    for group in range(num_groups):
        own = alive[alive // width == group]
        if len(own):
            few = F.group_norm(
                _select(x[:, own], others), 1, None if weight is None else weight[own], None if bias is None else bias[own], eps
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
        with _Calls(dense, thin):
            return masked_copy(model, slim.plan.kept_indices())(*args, **kwargs)
