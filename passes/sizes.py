"""Size arguments of torch functions: which argument of which call is the size of which dim.

One entry per function; a call that is not here has no size arguments, or its sizes lie on dims that never shrink.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from chase_fx.errors import RewriteError
from chase_fx.graphs.axes import Axis
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.rules.base import Labels
from chase_fx.graphs.tables import TABLE
from chase_fx.passes import places
from chase_fx.passes.factors import dim_size, is_certain, is_leading, lives, sequence, size_of, varies
from chase_fx.passes.numbers import demand_equal, demand_multiple, fixed_value, has_its_size, keep_size, value
from chase_fx.passes.quantities import Size, product
from chase_fx.passes.sites import CallSite, Handler
from chase_fx.passes.views import check_view

__all__ = ["CALLS"]


def _sizes(first: int, name: str = "size", *, view: bool = False) -> Handler:
    """Sizes of the output's dims, as one tuple or one by one, from argument ``first`` on."""

    def handler(site: CallSite) -> None:
        given = site.arg(first, name)
        if isinstance(given, torch.dtype):
            return
        together = isinstance(given, (tuple, list))
        sizes = given if together else site.node.args[first:]
        if not together and not sizes:
            return
        if view:
            check_view(site, site.arg(0, "input"), sizes)
        new = _shrink_all(site, sizes, site.out, followed=view)
        if together:
            site.set(first, name, new)
        else:
            site.node.args = (*site.node.args[:first], *new)

    return handler


def _shrink_all(site: CallSite, sizes: Sequence[Any], labels: Labels, *, followed: bool = False) -> tuple[Any, ...]:
    if len(sizes) != len(labels):
        raise RewriteError(f"{site.where()}: {len(sizes)} sizes for {len(labels)} dims")
    if not followed:
        for size, axis in zip(sizes, labels, strict=True):
            _follow(site, size, axis)
    return tuple(site.shrink(s, axis) for s, axis in zip(sizes, labels, strict=True))


def _follow(site: CallSite, number: Any, axis: Axis) -> None:
    """A computed size of a live dim is its size in the capture, or that of more rows of what is live in it."""
    factors = sequence(site.counts, axis)
    if not lives(factors) or not isinstance(number, Node) or not varies(site, number):
        return
    size, row = size_of(site, number), Size() * math.prod(factor.size for factor in lives(factors))
    if is_certain(factors) and not (size / row).whole:  # batch x channels may leave no trace of a batch of 1
        fixed_value(site, number)
    elif all(factor.certain for factor in lives(factors)):
        demand_multiple(site, size, row)


def _repeats(site: CallSite) -> None:
    """``repeat``, ``tile``: how often a dim is repeated is its size after over its size before."""
    inner, outer = site.label(site.node.args[0]), site.out
    given = site.arg(1, "repeats") if "repeats" in site.node.kwargs else site.arg(1, "dims")
    spread = not isinstance(given, (tuple, list))
    repeats = list(site.node.args[1:]) if spread else list(given)
    lead = len(outer) - len(inner)
    for i in range(len(repeats)):
        d = len(outer) - len(repeats) + i
        repeats[i] = _copies(site, repeats[i], inner[d - lead] if d >= lead else None, outer[d])
    if spread:
        site.node.args = (site.node.args[0], *repeats)
    else:
        site.set(1, "repeats" if "repeats" in site.node.kwargs else "dims", tuple(repeats))


def _copies(site: CallSite, number: Any, before: Axis | None, after: Axis) -> Any:
    """How many copies of ``before`` (none: of a single index) there are in ``after``; a computed number scales."""
    old, kept = (1, 1) if before is None else (before.size, site.counts.kept(before))
    dense, new = after.size // max(old, 1), site.counts.kept(after) // max(kept, 1)
    if new == dense or not isinstance(number, Node):
        return number if new == dense else new
    (size, left), (size_before, left_before) = site.counts.parts(after), site.counts.parts(before)
    row, new_row = size // size_before, left // left_before
    if row == dense:
        fixed_value(site, number)
        return new
    demand_multiple(site, size_of(site, number), Size() * row)
    with site.graph.inserting_before(site.node):
        share = site.graph.call_function(operator.floordiv, (number, row))
        return site.graph.call_function(operator.mul, (share, new_row))


def _repeat_interleave(site: CallSite) -> None:
    repeats, dim = site.arg(1, "repeats"), site.arg(2, "dim")
    if dim is not None and (isinstance(repeats, int) or (isinstance(repeats, Node) and "slot" not in repeats.meta)):
        inner, outer = site.label(site.arg(0, "input")), site.out
        d = dim % len(outer)
        site.set(1, "repeats", _copies(site, repeats, inner[d], outer[d]))
        total = site.arg(3, "output_size")
        if total is not None:
            site.set(3, "output_size", site.shrink(total, outer[d]))


def _restride(site: CallSite) -> None:
    """``as_strided(x, size, stride)``: strides that are no live ones become multiples of those that x has now."""
    x: Any = site.arg(0, "input")
    _sizes(1)(site)
    given, dense = site.arg(2, "stride"), x.meta["slot"].stride
    new = []
    for stride in given:
        known = stride.meta.get("value") if isinstance(stride, Node) else stride
        if known is None or _reads_stride(stride):
            new.append(stride)
            continue
        dim = max((d for d, s in enumerate(dense) if s and known % s == 0), key=lambda d: dense[d])
        if isinstance(stride, int):  # it counts what is right of the dim, as that is in the example
            for right in range(dim + 1, len(dense)):
                keep_size(site, x, right)
        with site.graph.inserting_before(site.node):
            now = site.graph.call_method("stride", (x, dim))
            new.append(site.graph.call_function(operator.mul, (now, known // dense[dim])))
    site.set(2, "stride", tuple(new))


def _reads_stride(value: Any) -> bool:
    if not isinstance(value, Node):
        return False
    return value.target == "stride" or any("slot" not in n.meta and _reads_stride(n) for n in value.all_input_nodes)


def _squeeze(site: CallSite) -> None:
    """A dim of channels stays a dim, also where the plan leaves one of them."""
    labels = site.labels(site.arg(0, "input"))
    if labels is None:
        return
    given = site.arg(1, "dim")
    dims = range(len(labels)) if given is None else [given] if isinstance(given, int) else given
    kept = [d % len(labels) for d in dims if not site.counts.live(labels[d % len(labels)])]
    if len(kept) < len(dims):
        site.node.args, site.node.kwargs = (site.arg(0, "input"), tuple(kept)), {}


def _unflatten(site: CallSite) -> None:
    x, dim, sizes = site.arg(0, "input"), site.arg(1, "dim"), site.arg(2, "sizes")
    rank = len(site.label(x))
    first = dim % rank
    around = [dim_size(site, x, d) for d in range(rank) if d != first]
    check_view(site, x, (*around[:first], *sizes, *around[first:]))
    labels = site.out[first : first + len(sizes)]
    site.set(2, "sizes", _shrink_all(site, sizes, labels, followed=True))


def _flatten(site: CallSite) -> None:
    x = site.arg(0, "input")
    rank = len(site.label(x))
    if not rank or call_name(site.node) == "ravel":
        first, last = 0, rank - 1
    else:
        first, last = site.arg(1, "start_dim", 0) % rank, site.arg(2, "end_dim", -1) % rank
    sizes = [dim_size(site, x, d) for d in range(rank)]
    check_view(site, x, (*sizes[:first], product(sizes[first : last + 1]), *sizes[last + 1 :]))


def _view_as(site: CallSite) -> None:
    """The other tensor only tells sizes, and may be cut in another way."""
    x, other = site.arg(0, "input"), site.arg(1, "other")
    check_view(site, x, [dim_size(site, other, d) for d in range(len(site.label(other)))])
    with site.graph.inserting_before(site.node):
        reads = [site.graph.call_method("size", (other, d)) for d in range(len(site.label(other)))]
        sizes = [site.counts.grow(site.graph, r, (a,)) for r, a in zip(reads, site.label(other), strict=True)]
    new = _shrink_all(site, sizes, site.out, followed=True)
    site.node.target = call_name(site.node).removesuffix("_as")
    site.node.args, site.node.kwargs = (x, *new), {}


def _normalized_shape(site: CallSite) -> None:
    shape = site.arg(1, "normalized_shape")
    labels = site.label(site.arg(0, "input"))
    if isinstance(shape, (tuple, list)):
        site.set(1, "normalized_shape", _shrink_all(site, shape, labels[len(labels) - len(shape) :]))


def _groups(index: int, name: str, dim: int) -> Handler:
    def handler(site: CallSite) -> None:
        old = site.arg(index, name)
        group, x = site.note("groups"), site.arg(0, "input")
        if isinstance(old, Node) and varies(site, old):
            _follow_groups(site, old, group, x, len(site.label(x)) + dim if dim < 0 else dim)
        if group is not None and site.counts.live(group):  # a computed count (batch x channels) scales
            site.set(index, name, site.shrink(old, group) if isinstance(old, Node) else site.counts.kept(group))

    return handler


def _follow_groups(site: CallSite, number: Node, group: Axis | None, x: Node, dim: int) -> None:
    """As many channels are in a group as in the capture: where batch x channels are grouped, the groups follow it."""
    axis = site.label(x)[dim]
    factors = sequence(site.counts, axis)
    if not lives(factors) and (group is None or not site.counts.live(group)):
        return
    width = axis.size // value(site, number)
    if not is_leading(factors) or not demand_equal(site, size_of(site, number) * width, dim_size(site, x, dim)):
        fixed_value(site, number)
        keep_size(site, x, dim)


def _attention(site: CallSite) -> None:
    """The default scale is the dense ``head_dim ** -0.5``; a slimmer head would change it."""
    head_dim = site.label(site.arg(0, "query"))[-1]
    if site.counts.live(head_dim) and site.arg(6, "scale") is None:
        site.set(6, "scale", head_dim.size**-0.5)


def _attention_kernel(site: CallSite) -> None:
    """The same for the kernels that torch calls inside ``torch.vmap``; all of them take the scale by name."""
    head_dim = site.label(site.arg(0, "query"))[-1]
    if site.counts.live(head_dim) and site.node.kwargs.get("scale") is None:
        site.node.update_kwarg("scale", head_dim.size**-0.5)


def _native_group_norm(site: CallSite) -> None:
    """``(x, w, b, N, C, HxW, group, eps)`` as torch calls it inside ``torch.vmap``: N, C and HxW are sizes of ``x``."""
    samples, channels, *space = site.label(site.arg(0, "input"))
    for index, name, axes in ((3, "N", [samples]), (4, "C", [channels]), (5, "HxW", space)):
        if any(map(site.counts.live, axes)):
            site.set(index, name, math.prod(map(site.counts.kept, axes)))
    _groups(6, "group", 1)(site)


def _sequence(site: CallSite) -> None:
    """``arange``, ``linspace``, ``eye``, a table: made in full, then the kept places are taken."""
    node = site.node
    live = [(d, axis) for d, axis in enumerate(site.out) if site.counts.live(axis)]
    if not live:
        return
    with site.graph.inserting_before(node):
        made = site.graph.create_node("call_function", node.target, node.args, node.kwargs)
        if any(varies(site, part) for part in node.all_input_nodes):
            for d, axis in live:
                read = site.graph.call_method("size", (made, d))
                has_its_size(site, Size.of(read, read), axis.size)
        taken = [(d, site.graph.create_node("get_attr", site.buffer(axis))) for d, axis in live]
        for d, index in taken[:-1]:
            made = site.graph.call_function(torch.index_select, (made, d, index))
    # The node itself is the last one that takes: its name and its users stay.
    d, index = taken[-1]
    node.target, node.args, node.kwargs = torch.index_select, (made, d, index), {}


def _window(index: int, name: str, dim: int) -> Handler:
    """Calls that take the channels of ``dim`` together with places of a window: it has its size."""

    def handler(site: CallSite) -> None:
        given = site.arg(index, name)
        if site.counts.live(site.label(site.arg(0, "input"))[dim]):
            for number in given if isinstance(given, (tuple, list)) else [given]:
                fixed_value(site, number)

    return handler


# function or method name -> what to do about its size arguments
CALLS: dict[str, Handler] = {
    **dict.fromkeys(("view", "view_copy", "_unsafe_view"), _sizes(1, view=True)),
    "reshape": _sizes(1, "shape", view=True),
    **dict.fromkeys(("view_as", "reshape_as"), _view_as),
    **dict.fromkeys(("flatten", "ravel"), _flatten),
    "unflatten": _unflatten,
    **dict.fromkeys(("expand", "broadcast_to", "expand_copy"), _sizes(1)),
    "as_strided": _restride,
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), _sizes(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "full"), _sizes(0)),
    **dict.fromkeys(("repeat", "tile"), _repeats),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(
        ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk"), places.split
    ),
    **dict.fromkeys(("tensor_split", "hsplit", "vsplit", "dsplit"), places.split),
    **dict.fromkeys(("getitem", "setitem"), places.getitem),
    **dict.fromkeys(("index", "index_put", "index_put_"), places.index),
    **dict.fromkeys(("index_select", "index_add", "index_add_", "index_copy", "index_copy_"), places.index_select),
    **dict.fromkeys(("index_fill", "index_fill_", "index_reduce", "index_reduce_"), places.index_select),
    "roll": places.roll,
    **dict.fromkeys(("narrow", "narrow_copy"), places.narrow),
    "select": places.select,
    "slice": places.slice_,
    **dict.fromkeys(("pad", "_pad", "constant_pad_nd"), places.pad),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _normalized_shape),
    "group_norm": _groups(1, "num_groups", 1),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _groups(1, "groups", 1)),
    **{f"{kind}{n}d": _groups(6, "groups", -1 - n) for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "deform_conv2d": _groups(11, "groups", 1),
    "convolution": _groups(8, "groups", 1),
    "pixel_shuffle": _window(1, "upscale_factor", -3),
    **dict.fromkeys(("fold", "col2im"), _window(2, "kernel_size", -2)),
    **dict.fromkeys(("arange", "linspace", "logspace", "eye", TABLE), _sequence),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention_kernel,
    ),
    "native_group_norm": _native_group_norm,
}
