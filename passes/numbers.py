"""Numbers by which a call addresses or cuts channels: a slice, an index, the lengths of a split, a count of groups.

The slim graph holds what they mean for the kept channels. One that is computed from sizes of channels is the same in
every call; one that comes from the batch, from space or from data is not, and has to be what it was in the capture.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from chase_fx.errors import RewriteError
from chase_fx.graphs.guards import check, check_number
from chase_fx.graphs.provenance import from_data
from chase_fx.passes.factors import dim_size, varies
from chase_fx.passes.quantities import Size
from chase_fx.passes.sites import CallSite

__all__ = ["demand", "demand_equal", "demand_multiple", "fixed_value", "has_its_size", "keep_size", "value"]


def value(site: CallSite, number: Any) -> Any:
    """A number, or what a computed one was in the capture."""
    if not isinstance(number, Node):
        return number
    if "value" not in number.meta:
        raise RewriteError(f"{site.where()}: a live dim is addressed by '{number.name}', which is no size")
    return number.meta["value"]


def fixed_value(site: CallSite, number: Any) -> Any:
    """The same, for a number that is replaced: where another one may come, the graph refuses it."""
    found = value(site, number)
    if isinstance(number, Node) and varies(site, number):
        demand(site, number, found)
    return found


def demand(site: CallSite, left: Any, right: Any) -> None:
    """The graph refuses inputs for which two numbers differ."""
    guard = check_number if from_data(left) or from_data(right) else check
    with site.graph.inserting_before(site.node):
        made = site.graph.call_function(guard, (left, "==", right, True, site.node.meta.get("source", "")))
    made.meta["source"] = ""


def keep_size(site: CallSite, tensor: Node, dim: int) -> None:
    """A dim of a tensor has the size that it had in the capture."""
    has_its_size(site, dim_size(site, tensor, dim), tensor.meta["slot"].shape[dim])


def has_its_size(site: CallSite, size: Size, number: int) -> None:
    """A size is what it was in the capture."""
    if size.powers:
        _demand_quotient(site, size / number)


def demand_equal(site: CallSite, left: Size, right: Size) -> bool:
    """Two sizes are equal in every call that the graph serves; whether they are in the capture."""
    quotient = left / right
    example = quotient.example()
    if example is not None and example != 1:
        return False
    if quotient.powers:
        _demand_quotient(site, quotient)
    return True


def _demand_quotient(site: CallSite, quotient: Size) -> None:
    with site.graph.inserting_before(site.node):
        above, below = quotient.written(site.graph, site.counts.grow)
    demand(site, above, below)


def demand_multiple(site: CallSite, left: Size, right: Size) -> bool:
    """The first size is a multiple of the second in every call that the graph serves; whether it is in the capture."""
    quotient = left / right
    example = quotient.example()
    if example is not None and example.denominator != 1:
        return False
    if not quotient.whole:
        with site.graph.inserting_before(site.node):
            above, below = quotient.written(site.graph, site.counts.grow)
            some = below if isinstance(below, int) else site.graph.call_function(max, (below, 1))
            rest = site.graph.call_function(operator.mod, (above, some))
        demand(site, rest, 0)
    return True
