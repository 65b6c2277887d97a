"""Views: the same elements in row-major order under other sizes.

Dims are matched in blocks by the common refinement of the cumulative sizes. A block of several input dims is a product;
a block with several output dims is factored. What is a product twice is refined to the common factors (see ``axes``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chase_fx.graphs.axes import Axis, Prod
from chase_fx.graphs.rules.base import LabelledOp, Labels

__all__ = ["as_complex", "as_real", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "reshape", "reshape_labels"]


def reshape(op: LabelledOp) -> Labels:
    """``view``, ``reshape``, ``flatten``, ``unflatten``, ``_unsafe_view``."""
    x = next(op.op.inputs())
    return reshape_labels(op, op[x], op.out.shape)


def reshape_labels(op: LabelledOp, labels: Labels, shape: Sequence[int]) -> Labels:
    """The labels of ``shape`` when its elements are those of ``labels`` in row-major order."""
    if 0 in shape:
        return _reshape_empty(op, labels, shape)
    out: list[Axis] = []
    sizes = [axis.size for axis in labels]
    i = j = 0
    while i < len(sizes) or j < len(shape):
        if i < len(sizes) and sizes[i] == 1:
            i += 1
            continue
        if j < len(shape) and shape[j] == 1:
            out.append(op.fixed(1, "size 1"))
            j += 1
            continue
        first, left, right = i, sizes[i], shape[j]
        ends = [j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= sizes[i]
                i += 1
            else:
                right *= shape[j]
                ends.append(j)
                j += 1
        block: Axis = labels[first] if i - first == 1 else Prod(labels[first:i])
        for d in ends[:-1]:
            head, block = op.split(block, shape[d], block.size // shape[d])
            out.append(head)
        out.append(block)
    return tuple(out)


def _reshape_empty(op: LabelledOp, labels: Labels, shape: Sequence[int]) -> Labels:
    """A view of no elements (tokens of an expert that nobody chose): the other dims are matched as if it had one."""
    full = tuple(op.fixed(1, "empty") if axis.size == 0 else axis for axis in labels)
    wanted = [n or 1 for n in shape]
    if math.prod(axis.size for axis in full) != math.prod(wanted):
        return tuple(op.fixed(n, "empty") for n in shape)
    found = reshape_labels(op, full, wanted)
    return tuple(op.fixed(0, "empty") if n == 0 else axis for n, axis in zip(shape, found, strict=True))


def channel_shuffle(op: LabelledOp) -> Labels:
    """x: (N, G*C, *s) -> (N, C*G, *s)."""
    x, groups = op.arg(0, "self"), int(op.arg(1, "groups"))
    labels = op[x]
    group, inner = op.split(labels[1], groups, labels[1].size // groups)
    op.facts.notes["groups"] = group
    return (labels[0], Prod((inner, group)), *labels[2:])


def pixel_shuffle(op: LabelledOp) -> Labels:
    """x: (..., C*r*r, H, W) -> (..., C, H*r, W*r): the r*r copies become pixels, so they stay."""
    x, r = op.arg(0, "self"), int(op.arg(1, "upscale_factor"))
    labels = op[x]
    channels, copies = op.split(labels[-3], labels[-3].size // (r * r), r * r)
    op.freeze(copies, "they become pixels")
    for axis in labels[-2:]:
        op.freeze(axis, "not a channel dim")
    return (*labels[:-3], channels, *(op.fixed(n) for n in op.out.shape[-2:]))


def pixel_unshuffle(op: LabelledOp) -> Labels:
    """x: (..., C, H*r, W*r) -> (..., C*r*r, H, W)."""
    x, r = op.arg(0, "self"), int(op.arg(1, "downscale_factor"))
    labels = op[x]
    for axis in labels[-2:]:
        op.freeze(axis, "not a channel dim")
    return (*labels[:-3], Prod((labels[-3], op.fixed(r * r, "pixels"))), *(op.fixed(n) for n in op.out.shape[-2:]))


def as_real(op: LabelledOp) -> Labels:
    """``view_as_real``: a complex number becomes two indices of a new last dim."""
    return (*op[op.arg(0, "self")], op.fixed(2, "real and imaginary"))


def as_complex(op: LabelledOp) -> Labels:
    """``view_as_complex``: the last dim, of size 2, becomes a complex number."""
    labels = op[op.arg(0, "self")]
    op.freeze(labels[-1], "real and imaginary")
    return labels[:-1]
