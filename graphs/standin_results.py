"""Zeros in place of the results of ATen operators: what the stand-ins of a capture are.

Each function takes what makes zeros and an operator's arguments, and gives the stand-in for its result, of the shape,
strides and dtype that torch gives. It gives None where computing is as fast, or the arguments are not of the common
kind, wrong ones included: then the operator runs, or raises as it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch._prims_common import compute_elementwise_output_strides, suggest_memory_format

__all__ = ["CONTRACTIONS", "ELEMENTWISE", "Zeros"]

aten = torch.ops.aten
Result = torch.Tensor | tuple[torch.Tensor, ...] | None

# Multiplications from which a matrix product, or a convolution, takes longer than zeros of its result's shape.
_LARGE = 1_000_000
_LARGE_CONVOLUTION = 100_000
# The same in elements of an elementwise result.
_MANY = 32_768


class Zeros:
    """Makes contiguous zeros that take neither memory nor time of their own: one buffer is behind all of them.

    To PyTorch each has a storage of its own. So a write to one shows in the others, which is why nothing may depend on
    what they hold.
    """

    def __init__(self) -> None:
        self._buffer = np.zeros(0, np.uint8)

    def __call__(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Of the dtype and device of ``like``."""
        count = math.prod(shape)
        if count < _MANY or like.device.type != "cpu":
            return like.new_zeros(shape)
        return self._flat(like.dtype, count).view(shape)

    def strided(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """On the CPU, with these strides."""
        if math.prod(shape) < _MANY:
            return torch.empty_strided(shape, strides, dtype=dtype).zero_()
        count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        return self._flat(dtype, count).as_strided(shape, strides)

    def laid_out_as(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the CPU, of the dtype, shape and strides of ``tensor``."""
        return self.strided(tensor.dtype, tensor.shape, tensor.stride())

    def _flat(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        size = count * dtype.itemsize
        if self._buffer.nbytes < size:  # tensors keep the buffer that they were made of
            self._buffer = np.zeros(size, np.uint8)  # which the system provides where it is touched
        return torch.frombuffer(self._buffer, dtype=dtype, count=count)


def _dense(*tensors: torch.Tensor) -> bool:
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in tensors)


def _contiguous(x: torch.Tensor) -> bool:
    """Whether the strides are those of a new tensor; ``is_contiguous`` takes any for a dim of size 1."""
    if not x.is_contiguous():
        return False
    step = 1
    for n, stride in zip(x.shape[::-1], x.stride()[::-1], strict=True):
        if stride != step:
            return False
        step *= n or 1
    return True


def _is_default(x: torch.Tensor) -> bool:
    """Whether torch lays a result out in the default way where it follows ``x``."""
    if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):  # which ends most searches
        return True
    return suggest_memory_format(x) is torch.contiguous_format


# -- contractions ------------------------------------------------------------------------------------------------------


def _mm(zeros: Zeros, a: torch.Tensor, b: torch.Tensor) -> Result:
    """(*B, M, K) x (*B, K, N) -> (*B, M, N)."""
    fits = a.dim() == b.dim() and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    if not fits or a.dtype is not b.dtype or a.numel() * b.shape[-1] < _LARGE or not _dense(a, b):
        return None
    return zeros(a, (*a.shape[:-1], b.shape[-1]))


def _addmm(zeros: Zeros, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **scales: Any) -> Result:
    """(N,) or (*B, M, N), plus (*B, M, K) x (*B, K, N)."""
    fits = bias.dim() > 0 and bias.shape[-1] == b.shape[-1] and (bias.dim() == 1 or bias.shape[:-1] == a.shape[:-1])
    return _mm(zeros, a, b) if fits and bias.dtype is a.dtype and not scales else None


def _convolution(  # noqa: PLR0917  (the operator's own)
    zeros: Zeros,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Result:
    """x: (N, G*I, *s), w: (G*O, I, *k) -> (N, G*O, *s'); transposed w: (G*I, O, *k)."""
    d = w.dim() - 2
    if x.dim() != d + 2 or not len(stride) == len(padding) == len(dilation) == d or not _dense(x, w):
        return None
    (n, channels, *space), (first, second, *kernel) = x.shape, w.shape
    inner, outer = (first, second * groups) if transposed else (second * groups, first)
    fits = channels == inner and first % groups == 0 and x.dtype is w.dtype
    if not fits or (bias is not None and (bias.shape != (outer,) or bias.dtype is not x.dtype)):
        return None
    sides = zip(space, kernel, stride, padding, dilation, strict=True)
    if transposed:
        sizes = [(m - 1) * s - 2 * p + r * (k - 1) + 1 for m, k, s, p, r in sides]
        sizes = [m + extra for m, extra in zip(sizes, output_padding, strict=True)]
    else:
        sizes = [(m + 2 * p - r * (k - 1) - 1) // s + 1 for m, k, s, p, r in sides]
    places = math.prod(space if transposed else sizes)
    if min(sizes, default=1) < 1 or n * places * w.numel() < _LARGE_CONVOLUTION:
        return None
    if _is_default(x) and _is_default(w):
        return zeros(x, (n, outer, *sizes)) if x.is_contiguous() and w.is_contiguous() else None
    if d == 2 and not transposed and x.dtype is torch.float32 and x.is_contiguous(memory_format=torch.channels_last):
        return zeros(x, (n, *sizes, outer)).permute(0, 3, 1, 2)
    return None


def _attention(
    zeros: Zeros,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    attn_mask: torch.Tensor | None = None,
    **__: Any,
) -> Result:
    """q: (N, G*H, L, E), k and v: (N, G, S, E) -> (N, G*H, L, E), laid out as q, and (N, G*H, L)."""
    n, h, length, e = q.shape
    groups, s = k.shape[1:3]
    if h % max(groups, 1) or k.shape != (n, groups, s, e) or v.shape != k.shape or q.numel() * s < _LARGE:
        return None
    mask = () if attn_mask is None else attn_mask.shape
    fits = all(size in (1, full) for size, full in zip(reversed(mask), (s, length, h, n), strict=False))
    if not fits or any(t.dtype is not torch.float32 for t in (q, k, v)) or not _dense(q, k, v):
        return None
    return zeros.laid_out_as(torch.empty_like(q)), q.new_zeros((n, length, h)).transpose(1, 2)


CONTRACTIONS: dict[Any, Callable[..., Result]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}


# -- elementwise operators, of stand-ins -------------------------------------------------------------------------------


def _many(x: Any) -> bool:
    """Whether ``x`` is a tensor of floating-point numbers that is worth it."""
    return isinstance(x, torch.Tensor) and x.numel() >= _MANY and x.is_floating_point() and _dense(x)


def _result(zeros: Zeros, x: torch.Tensor, *others: torch.Tensor) -> Result:
    """Of the dtype and shape of ``x``, laid out as what torch computes element by element from all these.

    Operators differ in the stride of a dim of size 1, unless it is the outermost one in memory.
    """
    if all(map(_contiguous, (x, *others))):
        return zeros(x, x.shape)
    strides = compute_elementwise_output_strides(x, *(t.expand(x.shape) for t in others))
    if 1 in x.shape:
        order = sorted(range(x.dim()), key=lambda d: (-strides[d], x.shape[d]))
        if strides != x.stride() or x.is_contiguous() or not _contiguous(x.permute(order)):
            return None
    return zeros.strided(x.dtype, x.shape, strides)


def _unary(zeros: Zeros, x: torch.Tensor, *_: Any, **__: Any) -> Result:
    """A function of every element, ``x``: any shape."""
    return _result(zeros, x) if _many(x) else None


def _power(zeros: Zeros, x: torch.Tensor, exponent: Any) -> Result:
    """x: any shape, to a number."""
    return _result(zeros, x) if _many(x) and type(exponent) in (int, float) else None


def _to_copy(zeros: Zeros, x: torch.Tensor, *, dtype: torch.dtype | None = None, **others: Any) -> Result:
    """x: any shape, in another precision."""
    if dtype is None or not dtype.is_floating_point or any(others.values()) or not _many(x) or not _contiguous(x):
        return None
    return zeros.strided(dtype, x.shape, x.stride())


def _fits(a: Any, b: Any) -> bool:
    """Whether the result for ``a`` and ``b`` has the shape and dtype of ``a``."""
    if isinstance(b, torch.Tensor):
        sizes = zip(reversed(b.shape), reversed(a.shape), strict=False)
        small = b.dim() <= a.dim() and all(n in (1, full) for n, full in sizes)
        return small and b.dtype is a.dtype and b.device == a.device and _dense(b)
    return type(b) in (int, float)


def _binary(zeros: Zeros, a: Any, b: Any, **_: Any) -> Result:
    """A function of pairs of elements; either may be a number, or a tensor that is broadcast to the other's shape."""
    if _many(a) and _fits(a, b):
        return _result(zeros, a, *([b] if isinstance(b, torch.Tensor) else []))
    if _many(b) and _fits(b, a):
        return _result(zeros, b, *([a] if isinstance(a, torch.Tensor) else []))
    return None


def _unary_(_zeros: Zeros, x: torch.Tensor, *_: Any, **__: Any) -> Result:
    """In place."""
    return x if _many(x) else None


def _binary_(_zeros: Zeros, x: torch.Tensor, y: Any, **_: Any) -> Result:
    """In place."""
    return x if _many(x) and _fits(x, y) else None


def _softmax(zeros: Zeros, x: torch.Tensor, dim: int, half_to_float: bool) -> Result:
    """x: any shape."""
    return _unary(zeros, x) if _contiguous(x) and -x.dim() <= dim < x.dim() and not half_to_float else None


def _layer_norm(
    zeros: Zeros,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *_: float,
) -> Result:
    """x: (*B, *shape) -> as x, and mean and inverse deviation: (*B, 1, ...)."""
    given = [t for t in (weight, bias) if t is not None]
    kept = x.dim() - len(shape)
    fits = kept >= 0 and x.shape[kept:] == tuple(shape) and all(t.shape == tuple(shape) for t in given)
    if not fits or not _many(x) or not _contiguous(x) or any(t.dtype is not x.dtype for t in given):
        return None
    sizes = (*x.shape[:kept], *[1] * len(shape))
    return zeros(x, x.shape), zeros(x, sizes), zeros(x, sizes)


def _mean(zeros: Zeros, x: torch.Tensor, dims: Sequence[int] | None, keepdim: bool = False, **others: Any) -> Result:
    """x: any shape, over ``dims``."""
    if not dims or others or not _many(x) or not _contiguous(x) or not all(-x.dim() <= d < x.dim() for d in dims):
        return None
    gone = {d % x.dim() for d in dims}
    if len(gone) < len(dims):
        return None
    return zeros(x, [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone])


def _batch_norm(  # noqa: PLR0917  (the operator's own)
    zeros: Zeros,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    training: bool,
    *_: float,
) -> Result:
    """x: (N, C, *s) -> as x, by statistics that there are; two empty tensors take the place of those of the batch."""
    given = [t for t in (weight, bias, mean, var) if t is not None]
    if training or mean is None or var is None or not _many(x) or not _contiguous(x):
        return None
    if any(t.shape != x.shape[1:2] or t.dtype is not x.dtype for t in given):
        return None
    return zeros(x, x.shape), x.new_empty(0), x.new_empty(0)


def _cat(zeros: Zeros, tensors: Sequence[torch.Tensor], dim: int = 0) -> Result:
    """Tensors of one shape but for ``dim``."""
    first = tensors[0]
    if not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    if not all(_dense(t) and _is_default(t) and t.dtype is first.dtype and t.dim() == first.dim() for t in tensors):
        return None
    shape = list(first.shape)
    if any(n != m for t in tensors for d, (n, m) in enumerate(zip(t.shape, shape, strict=True)) if d != dim):
        return None
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return zeros(first, shape) if first.is_floating_point() and math.prod(shape) >= _MANY else None


def _embedding(zeros: Zeros, weight: torch.Tensor, indices: torch.Tensor, *_: Any) -> Result:
    """weight: (K, D), indices: any shape -> (*shape, D)."""
    if weight.dim() != 2 or not _dense(weight, indices) or indices.dtype not in (torch.int32, torch.int64):
        return None
    return zeros(weight, (*indices.shape, weight.shape[1]))


def _clone(zeros: Zeros, x: torch.Tensor, *, memory_format: torch.memory_format | None = None) -> Result:
    """x: any shape; asked for in the default layout, or in the default layout already."""
    plain = memory_format is torch.contiguous_format or (
        memory_format in (None, torch.preserve_format) and _contiguous(x)
    )
    return zeros(x, x.shape) if plain and _many(x) else None


ELEMENTWISE: dict[Any, Callable[..., Result]] = {
    **{
        getattr(aten, name).default: _unary
        for name in (
            "gelu",
            "relu",
            "silu",
            "sigmoid",
            "tanh",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "mish",
            "elu",
            "neg",
            "rsqrt",
            "sqrt",
            "exp",
        )
    },
    **{
        getattr(aten, name).default: _unary_
        for name in ("relu_", "silu_", "sigmoid_", "tanh_", "hardswish_", "hardsigmoid_", "hardtanh_", "mish_", "elu_")
    },
    **{getattr(aten, name).Tensor: _binary for name in ("add", "sub", "mul", "div")},
    **{getattr(aten, name).Tensor: _binary_ for name in ("add_", "sub_", "mul_", "div_")},
    aten.pow.Tensor_Scalar: _power,
    aten._to_copy.default: _to_copy,
    aten._softmax.default: _softmax,
    aten.native_layer_norm.default: _layer_norm,
    aten.mean.dim: _mean,
    aten.native_batch_norm.default: _batch_norm,
    aten.cat.default: _cat,
    aten.clone.default: _clone,
    aten.embedding.default: _embedding,
}
