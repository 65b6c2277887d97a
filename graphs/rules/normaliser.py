"""Reductions that are no plain sum: they see kept units only, or their dim is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chase_fx.graphs.rules.base import LabelledOp, Labels, Refusal
from chase_fx.graphs.rules.dims import reduced_dims, reduced_labels
from chase_fx.graphs.rules.pointwise import broadcast
from chase_fx.graphs.tape import Slot

__all__ = [
    "DECISIVE",
    "average",
    "batch_norm",
    "decisive",
    "extreme",
    "group_norm",
    "label_loss",
    "layer_norm",
    "loss",
    "ordered",
    "rms_norm",
    "softmax",
]

aten = torch.ops.aten

_UNREDUCED = 0  # torch's number for reduction="none"


def batch_norm(op: LabelledOp) -> Sequence[Labels]:
    """x: (N, C, *s) with C statistics, weights and biases -> the same; statistics per channel.

    With batch statistics every other dim is reduced (weight standardisation calls it on a weight).
    """
    x = op.arg(0, "input")
    if op.named("training", False):
        for d in range(len(x.shape)):
            if d != 1:
                op.reduce(x, d)
                op.at_least_two(op[x][d])
    channels = op[x][1]
    for slot in op.op.inputs():
        if slot is not x and slot.shape == (x.shape[1],):
            op.tie(channels, op[slot][0])
    outs: list[Labels] = [op[x]]
    outs.extend(
        (channels,) if out.shape == (x.shape[1],) else tuple(op.fixed(n) for n in out.shape) for out in op.op.outs[1:]
    )
    return outs


def layer_norm(op: LabelledOp) -> Sequence[Labels]:
    """``native_layer_norm(x, normalized_shape, w, b, eps)``: mean and variance over the last dims."""
    x = op.arg(0, "input")
    return _over_last_dims(op, op.arg(1, "normalized_shape"), (op.arg(2, "weight"), op.arg(3, "bias")), op[x])


def rms_norm(op: LabelledOp) -> Sequence[Labels]:
    """``_fused_rms_norm(x, normalized_shape, w, eps)``: mean of squares over the last dims."""
    x = op.arg(0, "input")
    return _over_last_dims(op, op.arg(1, "normalized_shape"), (op.arg(2, "weight"),), op[x])


def _over_last_dims(
    op: LabelledOp, shape: Sequence[int], weights: Sequence[Slot | None], labels: Labels
) -> Sequence[Labels]:
    x = op.arg(0, "input")
    n = len(shape)
    for w in weights:
        if w is not None:
            for a, b in zip(labels[-n:], op[w], strict=True):
                op.tie(a, b)
            for d in range(n):
                op.reduce(w, d)
    for d in range(len(labels) - n, len(labels)):
        op.reduce(x, d)
    outs = [labels]
    for out in op.op.outs[1:]:
        kept = list(labels[: len(labels) - n]) + [op.fixed(1, "size 1")] * n
        outs.append(tuple(kept[: len(out.shape)]) if out.shape else ())
    return outs


def group_norm(op: LabelledOp) -> Sequence[Labels]:
    """``native_group_norm(x, w, b, N, C, HxW, group, eps)``: statistics over the channels of each group.

    x: (N, G*I, *s): whole groups go, or the same channels of every group. Where ``s`` is a single position torch takes
    no sample of one channel in a group, so two stay there.
    """
    x, w, b = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    groups = int(op.arg(6, "group"))
    channels = op[x][1]
    group, within = op.split(channels, groups, channels.size // groups)
    if math.prod(x.shape[2:]) == 1:
        op.at_least_two(within)
    op.facts.notes["groups"] = group
    for slot in (w, b):
        if slot is not None:
            op.tie(channels, op[slot][0])
            op.reduce(slot, 0)
    op.reduce(x, 1)
    statistics = (op[x][0], group)
    return [op[x], *(statistics[: len(out.shape)] for out in op.op.outs[1:])]


def average(op: LabelledOp) -> Sequence[Labels]:
    """``mean``, ``var``, ``std`` over dims: units that don't exist are not counted."""
    x = op.arg(0, "self")
    if "correction" in op.op.op._overloadname or "dim" in op.op.op._overloadname:
        dims = reduced_dims(x, op.arg(1, "dim"))
    else:
        dims = list(range(len(x.shape)))
    for d in dims:
        op.reduce(x, d)
        if op.name != "aten::mean":
            op.at_least_two(op[x][d])
    labels = reduced_labels(op, x, dims)
    return [labels for _ in op.op.outs]


def softmax(op: LabelledOp) -> Sequence[Labels]:
    """Softmax and log-softmax over ``dim`` are frozen there: every index has a share."""
    x = op.arg(0, "self")
    labels = op[x]
    if labels:
        op.freeze(labels[int(op.arg(1, "dim")) % len(labels)], "softmax runs over it")
    return [labels for _ in op.op.outs]


def extreme(op: LabelledOp) -> Sequence[Labels] | Refusal:
    """``max``, ``min``, ``argmax``, ``logsumexp``, ``prod``, ``any``... over dims: frozen there."""
    x = op.arg(0, "self")
    if any(slot is not x for slot in op.op.inputs()):
        return Refusal("a reduction with a second operand")
    has_dim = len(op.op.args) > 1 or "dim" in op.op.kwargs
    dims = reduced_dims(x, op.arg(1, "dim")) if has_dim else list(range(len(x.shape)))
    for d in dims:
        op.freeze(op[x][d], "a maximum or a product runs over it")
    labels = reduced_labels(op, x, dims)
    return [labels for _ in op.op.outs]


# Reductions whose value lies in the same range however many units there are, unlike an index or a product.
DECISIVE = frozenset(
    {
        aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims,
        aten.max.default, aten.min.default, aten.amax.default, aten.amin.default,
    }
)  # fmt: skip


def decisive(op: LabelledOp) -> Labels:
    """Reductions from which nothing but a decision is made: the units that exist decide, so none has to stay."""
    x = op.arg(0, "self")
    has_dim = len(op.op.args) > 1 or "dim" in op.op.kwargs
    dims = reduced_dims(x, op.arg(1, "dim")) if has_dim else list(range(len(x.shape)))
    for d in dims:
        op.reduce(x, d)
    return reduced_labels(op, x, dims)


def ordered(op: LabelledOp) -> Sequence[Labels]:
    """``sort``, ``topk``: the dim that is ordered is frozen, the others pass."""
    x = op.arg(0, "self")
    name = op.name.rpartition("::")[2]
    dim = op.arg(2, "dim", -1) if name in ("topk", "kthvalue") else op.arg(1, "dim", -1)
    dim = int(dim) % max(len(x.shape), 1) if not isinstance(dim, bool) else len(x.shape) - 1
    op.freeze(op[x][dim], "its order decides")
    return [
        tuple(op.fixed(out.shape[d], "ordered") if d == dim else axis for d, axis in enumerate(op[x]))
        if len(out.shape) == len(x.shape)
        else tuple(axis for d, axis in enumerate(op[x]) if d != dim)
        for out in op.op.outs
    ]


def loss(op: LabelledOp) -> Sequence[Labels]:
    """``mse_loss`` and its like: element by element, then averaged or summed over the units that exist.

    x, target, weights: (*s) -> () or, with reduction="none", (*s)
    """
    if op.named("reduction", 1) == _UNREDUCED:
        return broadcast(op)
    slots = list(op.op.inputs())
    for slot in slots[1:]:
        for back in range(1, min(len(slot.shape), len(slots[0].shape)) + 1):
            if slot.shape[-back] == slots[0].shape[-back]:
                op.tie(op[slots[0]][-back], op[slot][-back])
    for slot in slots:
        for d in range(len(slot.shape)):
            op.reduce(slot, d)
    return [()]


def label_loss(op: LabelledOp) -> Sequence[Labels]:
    """``nll_loss``, ``ctc_loss``: a label picks a class, so all classes stay."""
    return op.all_fixed("a label picks among its indices")
