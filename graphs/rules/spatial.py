"""Operators on space: pooling, interpolation, border padding. Leading dims pass, the last ``k`` are frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chase_fx.graphs.axes import Prod
from chase_fx.graphs.rules.base import LabelledOp, Labels

__all__ = ["affine_grid", "col2im", "grid_sample", "im2col", "over_last", "pooling", "transform", "unpool"]


def over_last(k: int) -> Callable[[LabelledOp], Sequence[Labels]]:
    """A rule for an operator that mixes the last ``k`` dims: (..., C, *s) -> (..., C, *s')."""

    def rule(op: LabelledOp) -> Sequence[Labels]:
        x = next(op.op.inputs())
        labels = op[x]
        for axis in labels[len(labels) - k :]:
            op.freeze(axis, "neighbours along it are mixed")
        lead = labels[: len(labels) - k]
        return [(*lead, *(op.fixed(n) for n in out.shape[len(lead) :])) for out in op.op.outs]

    return rule


def pooling(k: int) -> Callable[[LabelledOp], Sequence[Labels]]:
    """A rule for windows over the last ``k`` dims: one along which a window holds a single index passes.

    x: (..., C, *s) -> (..., C, *s')
    """

    def rule(op: LabelledOp) -> Sequence[Labels]:
        x = op.arg(0, "self")
        kernel = list(op.named("kernel_size"))
        sizes = [kernel, list(op.named("stride") or kernel), op.named("padding", 0)]
        labels = list(op[x])
        for i in range(k):
            window, step, border = (v if isinstance(v, int) else v[i % len(v)] for v in sizes)
            d = len(labels) - k + i
            if (window, step, border) != (1, 1, 0):
                op.freeze(labels[d], "windows run over it")
                labels[d] = op.fixed(op.out.shape[d])
        lead = labels[: len(labels) - k]
        places = [(*lead, *(op.fixed(n, "places of maxima") for n in out.shape[-k:])) for out in op.op.outs[1:]]
        return [tuple(labels), *places]

    return rule


def unpool(op: LabelledOp) -> Labels:
    """``max_unpool2d(x, indices)``: both (N, C, *s) -> (N, C, *s'), each channel by its own places."""
    x, indices = op.arg(0, "self"), op.arg(1, "indices")
    lead = len(x.shape) - (3 if "3d" in op.name else 2)
    for a, b in zip(op[x][:lead], op[indices][:lead], strict=True):
        op.tie(a, b)
    for axis in (*op[x][lead:], *op[indices][lead:]):
        op.freeze(axis, "not a channel dim")
    return (*op[x][:lead], *(op.fixed(n) for n in op.out.shape[lead:]))


def grid_sample(op: LabelledOp) -> Labels:
    """x: (N, C, *s), grid: (N, *s', k) -> (N, C, *s')."""
    x, grid = op.arg(0, "input"), op.arg(1, "grid")
    op.tie(op[x][0], op[grid][0])
    for axis in (*op[x][2:], *op[grid][1:]):
        op.freeze(axis, "not a channel dim")
    return (op[x][0], op[x][1], *(op.fixed(n) for n in op.out.shape[2:]))


def affine_grid(op: LabelledOp) -> Labels:
    """``affine_grid_generator(theta, size)``: theta: (N, 2, 3) -> (N, H, W, 2)."""
    theta = op.arg(0, "theta")
    for axis in op[theta][1:]:
        op.freeze(axis, "a matrix is taken as a whole")
    return (op[theta][0], *(op.fixed(n) for n in op.out.shape[1:]))


def im2col(op: LabelledOp) -> Labels:
    """x: (N, C, H, W) -> (N, C*k*k, L)."""
    x = op.arg(0, "self")
    labels = op[x]
    for axis in labels[-2:]:
        op.freeze(axis, "not a channel dim")
    window = op.out.shape[-2] // labels[-3].size
    return (*labels[:-3], Prod((labels[-3], op.fixed(window, "a window"))), op.fixed(op.out.shape[-1]))


def col2im(op: LabelledOp) -> Labels:
    """x: (..., C*k*k, L) -> (..., C, H, W): windows become pixels again, so their k*k places stay."""
    x = op.arg(0, "self")
    labels = op[x]
    window = 1
    for k in op.arg(2, "kernel_size"):
        window *= int(k)
    channels, places = op.split(labels[-2], labels[-2].size // window, window)
    op.freeze(places, "they become pixels")
    op.freeze(labels[-1], "not a channel dim")
    return (*labels[:-2], channels, *(op.fixed(n) for n in op.out.shape[-2:]))


def transform(op: LabelledOp) -> Labels:
    """``_fft_r2c``, ``_fft_c2c``, ``_fft_c2r``: the transformed dims are frozen, the others pass."""
    x = op.arg(0, "self")
    dims = {int(d) % len(x.shape) for d in op.arg(1, "dim")}
    labels = []
    for d, axis in enumerate(op[x]):
        if d in dims:
            op.freeze(axis, "a Fourier transform runs over it")
            labels.append(op.fixed(op.out.shape[d], "frequencies"))
        else:
            labels.append(axis)
    return tuple(labels)
