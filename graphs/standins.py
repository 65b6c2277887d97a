"""A forward without its arithmetic: zeros stand in for the results of large contractions.

A capture needs the shapes of tensors and hardly ever their values, while nearly all of a forward's time goes into
convolutions and matrix products. So these are not computed: zeros stand in for their results, and everything computed
from them is marked, by the memory that it lies in. As soon as the forward could tell the difference (it reads marked
data into Python, asks for a shape that depends on them, runs code that is not torch's on them, writes them to a
parameter), the capture gives up, and is done again on real values. What does not depend on the inputs is always
computed: code may keep it beyond the forward, such as a table in a cache by size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from chase_fx.graphs.tape import Slot, TapedOp, slots_in

__all__ = ["StandIns", "ValuesNeeded"]

aten = torch.ops.aten
Result = torch.Tensor | tuple[torch.Tensor, ...] | None
Dependence = tuple[set[int], ...]

# Multiplications from which a contraction takes longer than zeros of its result's shape.
_LARGE = 1_000_000


class ValuesNeeded(BaseException):  # no error; no handler of the model's is to catch it
    """The forward depends on values that were not computed."""


class StandIns:
    """What is marked in one forward.

    Attributes:
        gave_up: whether values were needed; the forward may have caught the exception.
    """

    def __init__(self) -> None:
        self.gave_up = False
        self._parameters: set[int] = set()
        self._given: set[int] = set()  # what depends on the inputs
        self._marked: set[int] = set()

    def start(self, slots: Iterable[Slot]) -> None:
        """The tensors that there are before the forward."""
        for slot in slots:
            if slot.kind == "input":
                self._given.add(slot.storage)
            elif slot.kind == "parameter":
                self._parameters.add(slot.storage)

    def marks(self, slots: Iterable[Slot]) -> bool:
        """Whether one of the tensors depends on a stand-in."""
        return not self._marked.isdisjoint([slot.storage for slot in slots])

    def need(self, slots: Iterable[Slot]) -> None:
        """The data of these tensors matter: give up if one of them depends on a stand-in."""
        if self.marks(slots):
            self.give_up()

    def give_up(self) -> None:
        """Values are needed."""
        self.gave_up = True
        raise ValuesNeeded

    def run(self, op: TapedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Dependence]:
        """The result of one ATen call, or its stand-in; ``args`` and ``kwargs`` are the arguments themselves."""
        func = op.op
        inputs = [slot.storage for slot in op.inputs()]
        if self._given.isdisjoint(inputs):
            return func(*args, **kwargs), ()
        marked = not self._marked.isdisjoint(inputs)
        if marked:
            self._check(func, op.args, op.kwargs)
        contraction = _CONTRACTIONS.get(func)
        out = contraction(*args, **kwargs) if contraction is not None else None
        if out is not None:
            return out, (self._given, self._marked)
        return func(*args, **kwargs), (self._given, self._marked) if marked else (self._given,)

    def follow(self, outs: Sequence[Slot], dependence: Dependence) -> None:
        """What a call gave depends on what its arguments do."""
        for found in dependence:
            found.update([slot.storage for slot in outs])
        if len(dependence) > 1 and any(slot.stride is None for slot in outs):
            self.give_up()  # how much a sparse tensor stores depends on its data

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give up if the call does more than compute tensors of known shapes from marked ones."""
        if func is aten.index.Tensor:  # of a known shape unless a mask is what is marked
            self.need(slot for slot in slots_in(args[1]) if slot.dtype in (torch.bool, torch.uint8))
        elif func.namespace != "aten" or _depends_on_data(func):
            self.give_up()
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = list(slots_in(args[i] if i < len(args) else kwargs.get(argument.name)))
                    if any(slot.storage in self._parameters for slot in written):
                        self.give_up()
                    self.follow(written, (self._given, self._marked))


@functools.cache
def _depends_on_data(func: Any) -> bool:
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


# Each function takes an operator's arguments and gives the stand-in for its result. It gives None where the contraction
# is small, or its arguments are not of the common kind, wrong ones included: then it is computed, or raises as it does.


def _mm(a: torch.Tensor, b: torch.Tensor) -> Result:
    """(*B, M, K) x (*B, K, N) -> (*B, M, N)."""
    fits = a.dim() == b.dim() and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    if not fits or a.dtype is not b.dtype or a.numel() * b.shape[-1] < _LARGE or not _dense(a, b):
        return None
    return a.new_zeros((*a.shape[:-1], b.shape[-1]))


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **scales: Any) -> Result:
    """(N,) or (*B, M, N), plus (*B, M, K) x (*B, K, N)."""
    fits = bias.dim() > 0 and bias.shape[-1] == b.shape[-1] and (bias.dim() == 1 or bias.shape[:-1] == a.shape[:-1])
    return _mm(a, b) if fits and bias.dtype is a.dtype and not scales else None


def _convolution(  # noqa: PLR0917  (the operator's own)
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
    if x.dim() != d + 2 or any(len(sizes) != d for sizes in (stride, padding, dilation)) or not _dense(x, w):
        return None
    inner, outer = (w.shape[0], w.shape[1] * groups) if transposed else (w.shape[1] * groups, w.shape[0])
    fits = x.shape[1] == inner and w.shape[0] % groups == 0 and x.dtype is w.dtype
    if not fits or (bias is not None and (bias.shape != (outer,) or bias.dtype is not x.dtype)):
        return None
    space = list(zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))
    if transposed:
        sizes = [(n - 1) * s - 2 * p + r * (k - 1) + 1 for n, k, s, p, r in space]
        sizes = [n + extra for n, extra in zip(sizes, output_padding, strict=True)]
    else:
        sizes = [(n + 2 * p - r * (k - 1) - 1) // s + 1 for n, k, s, p, r in space]
    places = math.prod(x.shape[2:] if transposed else sizes)
    if min(sizes, default=1) < 1 or x.shape[0] * places * w.numel() < _LARGE:
        return None
    shape = (x.shape[0], outer, *sizes)
    if all(suggest_memory_format(t) is torch.contiguous_format for t in (x, w)):
        return x.new_zeros(shape) if x.is_contiguous() and w.is_contiguous() else None
    if d == 2 and not transposed and x.dtype is torch.float32 and x.is_contiguous(memory_format=torch.channels_last):
        return x.new_zeros((shape[0], *shape[2:], shape[1])).permute(0, 3, 1, 2)
    return None


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, attn_mask: torch.Tensor | None = None, **__: Any
) -> Result:
    """q: (N, H, L, E), k and v: (N, H, S, E) -> (N, H, L, E), laid out as q, and (N, H, L)."""
    n, h, length, e = q.shape
    s = k.shape[2]
    if k.shape != (n, h, s, e) or v.shape != k.shape or q.numel() * s < _LARGE:
        return None
    mask = () if attn_mask is None else attn_mask.shape
    fits = all(size in (1, full) for size, full in zip(reversed(mask), (s, length, h, n), strict=False))
    if not fits or any(t.dtype is not torch.float32 for t in (q, k, v)) or not _dense(q, k, v):
        return None
    return torch.zeros_like(q), q.new_zeros((n, length, h)).transpose(1, 2)


def _dense(*tensors: torch.Tensor) -> bool:
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in tensors)


_CONTRACTIONS: dict[Any, Callable[..., Result]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
