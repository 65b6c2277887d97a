"""Operators of torchvision on regions of an image: boxes pick places, so places and boxes stay; channels pass.

Layouts: N batch, C channels, K boxes (batch index and corners), G groups, I O channels of a group, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence

from chase_fx.graphs.rules.base import LabelledOp, Labels
from chase_fx.graphs.rules.contraction import grouped_output

__all__ = ["deformable_convolution", "region_pool", "region_pool_by_place", "suppression"]


def suppression(op: LabelledOp) -> Sequence[Labels]:
    """``nms(boxes, scores, threshold)``: which boxes are left depends on all of them."""
    return op.all_fixed("boxes are compared with each other")


def region_pool(op: LabelledOp) -> Sequence[Labels]:
    """``roi_align``, ``roi_pool``: x (N, C, H, W), boxes (K, 5) -> (K, C, h, w)."""
    x, boxes = op.arg(0, "input"), op.arg(1, "rois")
    for axis in (op[x][0], *op[x][2:], *op[boxes]):
        op.freeze(axis, "boxes pick places")
    return [(op[boxes][0], op[x][1], *(op.fixed(n) for n in out.shape[2:])) for out in op.op.outs]


def region_pool_by_place(op: LabelledOp) -> Sequence[Labels]:
    """``ps_roi_align``, ``ps_roi_pool``: x (N, C*h*w, H, W), boxes (K, 5) -> (K, C, h, w), a channel for each place."""
    x, boxes = op.arg(0, "input"), op.arg(1, "rois")
    channels, places = op.split(op[x][1], op.out.shape[1], op[x][1].size // op.out.shape[1])
    for axis in (op[x][0], places, *op[x][2:], *op[boxes]):
        op.freeze(axis, "boxes pick places")
    return [(op[boxes][0], channels, *(op.fixed(n) for n in out.shape[2:])) for out in op.op.outs]


def deformable_convolution(op: LabelledOp) -> Labels:
    """``deform_conv2d(x, w, offset, mask, bias, ..., groups, offset_groups, use_mask)``: each window has its own shape.

    x: (N, G*I, H, W), w: (G*O, I, k, k), offset: (N, 2*offset_groups*k*k, *s), mask: (N, offset_groups*k*k, *s)
    -> (N, G*O, *s)
    """
    x, w, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(4, "bias")
    groups, offset_groups = int(op.arg(11, "groups")), int(op.arg(12, "offset_groups"))
    channels = op[x][1]
    out = grouped_output(op, channels, op[w], groups, transposed=False)
    shared, _ = op.split(channels, offset_groups, channels.size // offset_groups)
    op.freeze(shared, "its offsets are told by its place")
    if bias.shape:
        op.tie(out, op[bias][0])
    for slot in (op.arg(2, "offset"), op.arg(3, "mask")):
        for axis in op[slot]:
            op.freeze(axis, "offsets of a window")
    for axis in (op[x][0], *op[x][2:], *op[w][2:]):
        op.freeze(axis, "a convolution window runs over it")
    op.contract(x, 1)
    op.produce(out)
    return (op[x][0], out, *(op.fixed(n) for n in op.out.shape[2:]))
