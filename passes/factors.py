"""Dims as sequences of what shrinks, whose size is the same in every call, and of what may have another size.

Only factors that the plan cuts are known to have the same size in each call: the graph holds their kept places, so
wherever one comes from a number that may change, this number is guarded. All others (batch, space, copies, channels
that stay whole) are taken for what may change.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from chase_fx.graphs.axes import Axis, Cat, Picked, atoms_of, is_reordered, resolve
from chase_fx.passes.counts import Counts, factors_of
from chase_fx.passes.quantities import Read, Size, product

if TYPE_CHECKING:
    from chase_fx.passes.sites import CallSite

__all__ = ["Live", "dim_size", "is_certain", "is_leading", "lives", "sequence", "size_of", "varies"]


@dataclass(frozen=True)
class Live:
    """A factor that the plan cuts.

    Attributes:
        size: its dense size.
        key: equal for equal factors.
        certain: whether no part of it may have another size in another call.
    """

    size: int
    key: Hashable
    certain: bool


def sequence(counts: Counts, axis: Axis) -> list[Live | None]:
    """The factors of an axis, left to right; None is a stretch of what may have another size."""
    found: list[Live | None] = []
    for piece in factors_of(axis):
        if counts.live(piece):
            found.append(Live(piece.size, (piece.size, _key(piece)), _certain(counts, piece)))
        elif not found or found[-1] is not None:
            found.append(None)
    return found


def _key(axis: Axis) -> Hashable:
    """Equal for axes with the same atoms in the same order."""
    axis = resolve(axis)
    if isinstance(axis, Picked):
        return _key(axis.base), axis.index.tobytes()
    if isinstance(axis, Cat) and is_reordered(axis):
        return tuple(map(_key, axis.parts))
    return tuple(id(atom) for atom in atoms_of(axis))


def lives(factors: list[Live | None]) -> list[Live]:
    """Those that the plan cuts."""
    return [factor for factor in factors if factor is not None]


def is_certain(factors: list[Live | None]) -> bool:
    """Whether a dim has the same size in every call."""
    return all(factor is not None and factor.certain for factor in factors)


def is_leading(factors: list[Live | None]) -> bool:
    """Whether what may have another size comes first, so that it does not move the first places of what follows."""
    return is_certain(factors[1:] if factors and factors[0] is None else factors)


def _certain(counts: Counts, axis: Axis) -> bool:
    """Whether the plan cuts all parts of an axis, as it is written: a part of size 0 may be larger in another call."""
    if isinstance(axis, Cat):
        return all(part in counts.told or _certain(counts, part) for part in axis.parts)
    return all(
        piece.size > 0 and counts.live(piece) and (piece is axis or _certain(counts, piece))
        for piece in factors_of(axis)
    )


def dim_size(site: CallSite, tensor: Node, dim: int) -> Size:
    """The dense size of a dim of a tensor."""
    return _size(site, tensor, dim, None)


def size_of(site: CallSite, number: Any) -> Size:
    """A number in the graph, as far as it is a product."""
    if not isinstance(number, Node):
        return Size() * int(number)
    if not varies(site, number) and isinstance(number.meta.get("value"), int):
        return Size() * int(number.meta["value"])
    read: Any = number.meta.get("grown", number)
    if read.op == "call_method" and read.target == "size" and len(read.args) == 2:
        return _size(site, read.args[0], read.args[1], number)
    if number.target is operator.mul and all(isinstance(part, (int, Node)) for part in number.args):
        return product(size_of(site, part) for part in number.args)
    return Size.of(number, number)


def varies(site: CallSite, number: Node) -> bool:
    """Whether a number may be another one in another call."""
    if number.op == "call_method" and number.target == "size" and len(number.args) == 2:
        tensor, dim = number.args
        labels = site.labels(tensor) if isinstance(tensor, Node) else None
        return labels is None or not isinstance(dim, int) or not is_certain(sequence(site.counts, labels[dim]))
    return "slot" in number.meta or any(varies(site, part) for part in number.all_input_nodes)


def _size(site: CallSite, tensor: Node, dim: int, source: Node | None) -> Size:
    labels = site.label(tensor)
    dim %= len(labels)
    axis = labels[dim]
    if axis.size > 0 and is_certain(sequence(site.counts, axis)):
        return Size() * axis.size
    return Size.of((tensor.meta["slot"].index, dim), source or Read(tensor, dim, axis))
