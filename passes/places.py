"""Calls that take channels by their places: slices, subscripts, splits, padding.

The graph holds where the kept channels are. So the numbers have to be what they were in the capture, and so has the
size of the dim, unless all that may have another size is left of the channels: there, places follow the batch.
"""

from __future__ import annotations

import sys
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from chase_fx.errors import RewriteError
from chase_fx.graphs.axes import Axis, Cat
from chase_fx.graphs.calls import call_name
from chase_fx.passes.factors import is_leading, sequence, size_of
from chase_fx.passes.numbers import demand_multiple, fixed_value, keep_size, value
from chase_fx.passes.quantities import Size
from chase_fx.passes.sites import CallSite

__all__ = ["getitem", "index", "index_select", "narrow", "pad", "roll", "select", "slice_", "split"]

# The dim of calls that name it, and what the others call the numbers by which they split.
_DIMS = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
_SECTIONS = (
    "split_size_or_sections",
    "split_size",
    "split_sizes",
    "chunks",
    "indices_or_sections",
    "indices",
    "sections",
)


def split(site: CallSite) -> None:
    """``split``, ``chunk``, ``tensor_split``, ``hsplit``...: slices end at explicit kept places."""
    name, x = call_name(site.node), site.arg(0, "tensor", site.node.kwargs.get("input"))
    rank = len(site.label(x))
    dim = min(_DIMS[name], rank - 1) if name in _DIMS else site.arg(2, "dim", 0) % rank
    axis = site.label(x)[dim]
    if not site.counts.live(axis):
        return
    keep_size(site, x, dim)
    ends = [slice(end).indices(axis.size)[1] for end in _ends(site, name, axis.size)]
    places = [0, *(site.counts.before(axis, end) for end in ends), site.counts.kept(axis)]
    ordered = places == sorted(places)
    target = "split" if ordered else "tensor_split"
    numbers = [b - a for a, b in pairwise(places)] if ordered else places[1:-1]
    site.node.target = target if site.node.op == "call_method" else getattr(torch, target)
    site.node.args, site.node.kwargs = (x, numbers, dim), {}


def _ends(site: CallSite, name: str, size: int) -> list[int]:
    """Where all slices but the last end, which may be beyond the size, or counted from its end."""
    given: Any = site.node.args[1] if len(site.node.args) > 1 else None
    for key in _SECTIONS:
        given = site.node.kwargs.get(key, given)
    at_places = name in ("tensor_split", *_DIMS)
    if isinstance(given, (list, tuple)):
        numbers = [fixed_value(site, number) for number in given]
        return numbers if at_places else list(accumulate(numbers))[:-1]
    number = int(fixed_value(site, given))
    if at_places:
        return list(accumulate(size // number + (i < size % number) for i in range(number)))[:-1]
    step = -(-size // number) if "chunk" in name else number
    return list(range(step, size, step))


def getitem(site: CallSite) -> None:
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
        out.append(_place(site, item, x, d) if _consumes(item) else item)
        d += _consumes(item)
    site.node.update_arg(1, out[0] if single else tuple(out))


def _consumes(item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Node):
        slot = item.meta.get("slot")
        return len(slot.shape) if slot is not None and slot.dtype is torch.bool else 1
    return 1


def _place(site: CallSite, item: Any, x: Node, dim: int) -> Any:
    axis = site.label(x)[dim]
    if isinstance(item, list) or (isinstance(item, Node) and "slot" in item.meta):
        return _picked(site, item, x, dim)
    if not site.counts.live(axis):
        return item
    if isinstance(item, (int, Node)):
        return _index(site, item, x, dim)
    if isinstance(item, slice):
        return _slice(site, item, x, dim)
    raise RewriteError(f"{site.where()}: index {item!r} on a live dim")


def _picked(site: CallSite, item: Any, x: Node, dim: int) -> Any:
    """A constant index of channels: its entries for the channels that stay, as their places among those of ``x``.

    It is made in every call, so that another index in the same buffer is followed, or out of range.
    """
    axis, picked = site.label(x)[dim], site.note("picked")
    if picked is None or not site.counts.live(axis):
        return item
    keep_size(site, x, dim)
    if isinstance(item, list):
        return _shorter(site, item, axis, picked)
    _fix_sizes(site, item)
    with site.graph.inserting_before(site.node):
        mask = item.meta["slot"].dtype is torch.bool
        index = site.graph.call_method("flatten", (site.graph.call_method("nonzero", (item,)),)) if mask else item
        where = site.graph.create_node("get_attr", site.buffer.places(axis))
        index = site.graph.call_method("to", (index, where))  # long integers there
        if site.counts.live(picked):
            kept = site.graph.create_node("get_attr", site.buffer(picked))
            index = site.graph.call_function(torch.index_select, (index, 0, kept))
        return site.graph.call_function(torch.take, (where, index))


def _shorter(site: CallSite, item: list[Any], axis: Axis, picked: Axis) -> list[int]:
    given = np.asarray(item)
    dense = np.flatnonzero(given) if given.dtype.kind == "b" else given % axis.size
    if site.counts.live(picked):
        dense = dense[site.buffer.mask(picked)]
    places: list[int] = (np.cumsum(site.buffer.mask(axis)) - 1)[dense].tolist()
    return places


def _fix_sizes(site: CallSite, node: Node) -> None:
    """The sizes that an index is computed from are those of the capture."""
    for part in node.all_input_nodes:
        if "slot" in part.meta:
            _fix_sizes(site, part)
        elif "value" in part.meta:
            fixed_value(site, part)


def index_select(site: CallSite) -> None:
    """``index_select(x, dim, index)``, ``index_add(x, dim, index, source)`` and its like."""
    x, dim = site.arg(0, "input"), site.arg(1, "dim") % max(len(site.label(site.arg(0, "input"))), 1)
    if site.note("picked") is not None:
        site.set(2, "index", _picked(site, site.arg(2, "index"), x, dim))


def index(site: CallSite) -> None:
    """``aten.index(x, indices)``, ``index_put(x, indices, values)``."""
    x, given = site.arg(0, "self"), list(site.arg(1, "indices"))
    found = [d for d, item in enumerate(given) if item is not None]
    if len(found) == 1:
        given[found[0]] = _picked(site, given[found[0]], x, found[0])
        site.set(1, "indices", type(site.arg(1, "indices"))(given))


def roll(site: CallSite) -> None:
    """``roll(x, shifts, dims)``: as many indices as stay of those that go to the front."""
    x, shifts, dims = site.arg(0, "input"), site.arg(1, "shifts"), site.arg(2, "dims", ())
    single = not isinstance(dims, (tuple, list))
    new = [shifts] if not isinstance(shifts, (tuple, list)) else list(shifts)
    for k, d in enumerate([dims] if single else dims):
        axis = site.label(x)[d]
        if site.counts.live(axis):
            keep_size(site, x, d % len(site.label(x)))
            cut = axis.size - fixed_value(site, new[k]) % axis.size
            new[k] = site.counts.between(axis, cut, axis.size)
    site.set(1, "shifts", new[0] if single and not isinstance(shifts, (tuple, list)) else tuple(new))


def _index(site: CallSite, number: Any, x: Node, dim: int) -> int:
    """Where one index of a live dim is found."""
    axis, place = site.label(x)[dim], fixed_value(site, number)
    if place < 0 or not is_leading(sequence(site.counts, axis)):
        keep_size(site, x, dim)
    return site.counts.before(axis, place % axis.size)


def _slice(site: CallSite, item: slice, x: Node, dim: int) -> slice:
    axis, step = site.label(x)[dim], fixed_value(site, item.step)
    given = slice(item.start, None if item.stop == sys.maxsize else item.stop, step)
    bounds = slice(value(site, given.start), value(site, given.stop), step)
    ends = [n for n in (bounds.start, bounds.stop) if n not in (None, 0)]
    if any(not 0 <= n <= axis.size for n in ends) or (ends and not is_leading(sequence(site.counts, axis))):
        keep_size(site, x, dim)
    if step not in (None, 1):  # rows of ``step`` stay whole, so the same place is taken of each
        if bounds.stop is not None or not is_leading(sequence(site.counts, axis)):
            keep_size(site, x, dim)
        fixed_value(site, given.stop)
        return slice(fixed_value(site, given.start), None, step)
    start, stop, _ = bounds.indices(axis.size)
    new_start = None if bounds.start is None else _bound(site, given.start, start, axis)
    new_stop = None if bounds.stop is None else _bound(site, given.stop, max(start, stop), axis)
    return slice(new_start, new_stop, step)


def _bound(site: CallSite, given: Any, place: int, axis: Axis) -> Any:
    """Where dense index ``place`` is found; a computed bound between rows of batch x channels stays computed."""
    if isinstance(given, Node) and site.counts.scales(axis, place) and value(site, given) == place:
        demand_multiple(site, size_of(site, given), Size() * site.counts.row(axis))
        return site.shrink(given, axis)
    fixed_value(site, given)
    return site.counts.before(axis, place)


def narrow(site: CallSite) -> None:
    """``narrow(x, dim, start, length)``."""
    x, dim = site.arg(0, "input"), site.arg(1, "dim") % len(site.label(site.arg(0, "input")))
    axis = site.label(x)[dim]
    if site.counts.live(axis):
        start, length = fixed_value(site, site.arg(2, "start")), fixed_value(site, site.arg(3, "length"))
        new_start = _index(site, start, x, dim)
        site.set(2, "start", new_start)
        site.set(3, "length", site.counts.before(axis, start % axis.size + length) - new_start)


def slice_(site: CallSite) -> None:
    """``aten.slice(x, dim, start, end, step)``."""
    x, dim = site.arg(0, "input"), site.arg(1, "dim", 0) % len(site.label(site.arg(0, "input")))
    if site.counts.live(site.label(x)[dim]):
        found = _slice(site, slice(site.arg(2, "start"), site.arg(3, "end"), site.arg(4, "step")), x, dim)
        site.node.args, site.node.kwargs = (x, dim, found.start, found.stop, found.step or 1), {}


def select(site: CallSite) -> None:
    """``select(x, dim, index)``."""
    x, dim = site.arg(0, "input"), site.arg(1, "dim") % len(site.label(site.arg(0, "input")))
    if site.counts.live(site.label(x)[dim]):
        site.set(2, "index", _index(site, site.arg(2, "index"), x, dim))


def pad(site: CallSite) -> None:
    """``pad(x, amounts)``: padding on both ends of a live dim."""
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
            if isinstance(axis, Cat):
                site.counts.told.update(axis.parts[: before > 0] + axis.parts[len(axis.parts) - (after > 0) :])
    site.set(1, "pad", tuple(new))
