"""Size arguments of torch functions: which argument of which call is the size of which dim.

One entry per function; a call that is not here has no size arguments, or its sizes lie on dims that never shrink.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from chase_fx.errors import RewriteError
from chase_fx.graphs.axes import Axis
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.rules.base import Labels
from chase_fx.graphs.tables import TABLE
from chase_fx.passes.numbers import fixed_value, value
from chase_fx.passes.sites import CallSite

__all__ = ["CALLS"]


Handler = Callable[[CallSite], None]


def _sizes(first: int, name: str = "size") -> Handler:
    """Sizes of the output's dims, as one tuple or one by one, from argument ``first`` on."""

    def handler(site: CallSite) -> None:
        given = site.arg(first, name)
        if isinstance(given, torch.dtype):
            return
        labels = site.out
        if isinstance(given, (tuple, list)):
            site.set(first, name, _shrink_all(site, given, labels))
        elif len(site.node.args) > first:
            sizes = _shrink_all(site, site.node.args[first:], labels)
            site.node.args = (*site.node.args[:first], *sizes)

    return handler


def _shrink_all(site: CallSite, sizes: Sequence[Any], labels: Labels) -> tuple[Any, ...]:
    if len(sizes) != len(labels):
        raise RewriteError(f"{site.where()}: {len(sizes)} sizes for {len(labels)} dims")
    return tuple(site.shrink(s, axis) for s, axis in zip(sizes, labels, strict=True))


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
    with site.graph.inserting_before(site.node):
        share = site.graph.call_function(operator.floordiv, (number, dense))
        return site.graph.call_function(operator.mul, (share, new))


def _repeat_interleave(site: CallSite) -> None:
    repeats, dim = site.arg(1, "repeats"), site.arg(2, "dim")
    if dim is not None and (isinstance(repeats, int) or (isinstance(repeats, Node) and "slot" not in repeats.meta)):
        inner, outer = site.label(site.arg(0, "input")), site.out
        d = dim % len(outer)
        site.set(1, "repeats", _copies(site, repeats, inner[d], outer[d]))
        total = site.arg(3, "output_size")
        if total is not None:
            site.set(3, "output_size", site.shrink(total, outer[d]))


def _split(site: CallSite) -> None:
    """``split``, ``chunk``, ``tensor_split``: consecutive slices become explicit kept sizes."""
    x = site.arg(0, "tensor", site.node.kwargs.get("input"))
    dim = site.arg(2, "dim", 0) % len(site.label(x))
    axis = site.label(x)[dim]
    if not site.counts.live(axis):
        return
    bounds = _bounds(site, axis.size)
    sizes = [site.counts.between(axis, a, b) for a, b in pairwise(bounds)]
    site.node.target = "split" if site.node.op == "call_method" else torch.split
    site.node.args, site.node.kwargs = (x, sizes, dim), {}


def _bounds(site: CallSite, size: int) -> list[int]:
    name = call_name(site.node)
    sections: Any = site.node.kwargs.get("chunks", site.node.kwargs.get("split_size_or_sections"))
    sections = site.node.kwargs.get("split_size", sections)
    sections = site.node.kwargs.get("indices_or_sections", sections)
    if len(site.node.args) > 1:
        sections = site.node.args[1]
    if isinstance(sections, (list, tuple)):
        sections = [fixed_value(site, s) for s in sections]
        return [0, *sections, size] if name == "tensor_split" else [sum(sections[:i]) for i in range(len(sections) + 1)]
    count = int(fixed_value(site, sections))
    if name == "tensor_split":
        q, r = divmod(size, count)
        lengths = [q + (i < r) for i in range(count)]
        return [sum(lengths[:i]) for i in range(count + 1)]
    step = -(-size // count) if "chunk" in name else count
    return [*range(0, size, step), size]


def _getitem(site: CallSite) -> None:
    """``x[...]`` and ``x[...] = y`` with constant places on live dims."""
    x: Any = site.node.args[0]
    index: Any = site.node.args[1]
    if not isinstance(x, Node) or site.labels(x) is None:
        return
    labels = site.label(x)
    single = not isinstance(index, tuple)
    items = [index] if single else list(index)
    taken = sum(_consumes(i) for i in items)
    d, out = 0, list[Any]()
    for item in items:
        if item is Ellipsis:
            out.append(item)
            d += len(labels) - taken
            continue
        out.append(_place(site, item, labels[d]) if _consumes(item) else item)
        d += _consumes(item)
    site.node.update_arg(1, out[0] if single else tuple(out))


def _consumes(item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Node):
        slot = item.meta.get("slot")
        return len(slot.shape) if slot is not None and slot.dtype is torch.bool else 1
    return 1


def _place(site: CallSite, item: Any, axis: Axis) -> Any:
    if not site.counts.live(axis) or isinstance(item, list) or (isinstance(item, Node) and "slot" in item.meta):
        return item
    if isinstance(item, (int, Node)):
        return site.counts.before(axis, fixed_value(site, item) % axis.size)
    if isinstance(item, slice):
        return _slice(site, item, axis)
    raise RewriteError(f"{site.where()}: index {item!r} on a live dim")


def _slice(site: CallSite, item: slice, axis: Axis) -> slice:
    if item.step not in (None, 1):
        return slice(item.start, None, item.step)  # rows of ``step`` stay whole, so the same place is taken of each
    bounds = slice(value(site, item.start), value(site, item.stop), item.step)
    start, stop, _ = bounds.indices(axis.size)
    new_start = None if bounds.start is None else _bound(site, item.start, start, axis)
    new_stop = None if bounds.stop is None else _bound(site, item.stop, max(start, stop), axis)
    return slice(new_start, new_stop, item.step)


def _bound(site: CallSite, given: Any, place: int, axis: Axis) -> Any:
    """Where dense index ``place`` is found; a computed bound between rows of batch x channels stays computed."""
    if isinstance(given, Node) and site.counts.scales(axis, place) and value(site, given) == place:
        return site.shrink(given, axis)
    fixed_value(site, given)
    return site.counts.before(axis, place)


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
        with site.graph.inserting_before(site.node):
            now = site.graph.call_method("stride", (x, dim))
            new.append(site.graph.call_function(operator.mul, (now, known // dense[dim])))
    site.set(2, "stride", tuple(new))


def _reads_stride(value: Any) -> bool:
    if not isinstance(value, Node):
        return False
    return value.target == "stride" or any("slot" not in n.meta and _reads_stride(n) for n in value.all_input_nodes)


def _narrow(site: CallSite) -> None:
    x, dim, start, length = site.arg(0, "input"), site.arg(1, "dim"), site.arg(2, "start"), site.arg(3, "length")
    labels = site.label(x)
    axis = labels[dim % len(labels)]
    if site.counts.live(axis):
        start, length = fixed_value(site, start) % axis.size, fixed_value(site, length)
        site.set(2, "start", site.counts.before(axis, start))
        site.set(3, "length", site.counts.between(axis, start, start + length))


def _cut(site: CallSite) -> None:
    """``aten.slice(x, dim, start, end, step)``."""
    x, dim = site.arg(0, "input"), site.arg(1, "dim", 0)
    labels = site.label(x)
    axis = labels[dim % len(labels)]
    if site.counts.live(axis):
        found = _slice(site, slice(site.arg(2, "start"), site.arg(3, "end"), site.arg(4, "step")), axis)
        site.node.args, site.node.kwargs = (x, dim, found.start, found.stop, found.step or 1), {}


def _select(site: CallSite) -> None:
    x, dim, index = site.arg(0, "input"), site.arg(1, "dim"), site.arg(2, "index")
    labels = site.label(x)
    axis = labels[dim % len(labels)]
    if site.counts.live(axis):
        site.set(2, "index", site.counts.before(axis, fixed_value(site, index) % axis.size))


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
    first = dim % len(site.label(x))
    labels = site.out[first : first + len(sizes)]
    site.set(2, "sizes", _shrink_all(site, sizes, labels))


def _pad(site: CallSite) -> None:
    amounts, outer = site.arg(1, "pad"), site.out
    if site.arg(2, "mode", "constant") != "constant" or not isinstance(amounts, (tuple, list)):
        return
    new = list(amounts)
    for k in range(len(amounts) // 2):
        axis = outer[len(outer) - 1 - k]
        if site.counts.live(axis):
            before, after = (fixed_value(site, n) for n in amounts[2 * k : 2 * k + 2])
            new[2 * k] = site.counts.between(axis, 0, before)
            new[2 * k + 1] = site.counts.between(axis, axis.size - after, axis.size)
    site.set(1, "pad", tuple(new))


def _normalized_shape(site: CallSite) -> None:
    shape = site.arg(1, "normalized_shape")
    labels = site.label(site.arg(0, "input"))
    if isinstance(shape, (tuple, list)):
        site.set(1, "normalized_shape", _shrink_all(site, shape, labels[len(labels) - len(shape) :]))


def _groups(index: int, name: str) -> Handler:
    def handler(site: CallSite) -> None:
        group = site.note("groups")
        if group is None or not site.counts.live(group):
            return
        old = site.arg(index, name)  # a computed count (batch x channels) scales, a number is replaced
        site.set(index, name, site.shrink(old, group) if isinstance(old, Node) else site.counts.kept(group))

    return handler


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
    _groups(6, "group")(site)


def _sequence(site: CallSite) -> None:
    """``arange``, ``linspace``, ``eye``, a table: made in full, then the kept places are taken."""
    node = site.node
    live = [(d, axis) for d, axis in enumerate(site.out) if site.counts.live(axis)]
    if not live:
        return
    with site.graph.inserting_before(node):
        value = site.graph.create_node("call_function", node.target, node.args, node.kwargs)
        taken = [(d, site.graph.create_node("get_attr", site.places(axis))) for d, axis in live]
        for d, index in taken[:-1]:
            value = site.graph.call_function(torch.index_select, (value, d, index))
    # The node itself is the last one that takes: its name and its users stay.
    d, index = taken[-1]
    node.target, node.args, node.kwargs = torch.index_select, (value, d, index), {}


# function or method name -> what to do about its size arguments
CALLS: dict[str, Handler] = {
    **dict.fromkeys(
        ("view", "reshape", "expand", "broadcast_to", "view_copy", "expand_copy", "_unsafe_view"), _sizes(1)
    ),
    "reshape": _sizes(1, "shape"),
    "as_strided": _restride,
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), _sizes(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "full"), _sizes(0)),
    **dict.fromkeys(("repeat", "tile"), _repeats),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"), _split),
    **dict.fromkeys(("getitem", "setitem"), _getitem),
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    "slice": _cut,
    "unflatten": _unflatten,
    **dict.fromkeys(("pad", "_pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _normalized_shape),
    "group_norm": _groups(1, "num_groups"),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _groups(1, "groups")),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups(6, "groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups(6, "groups")),
    "deform_conv2d": _groups(11, "groups"),
    "convolution": _groups(8, "groups"),
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
