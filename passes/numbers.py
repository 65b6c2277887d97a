"""Numbers by which a call addresses channels: a slice, an index, the lengths of a split.

The slim graph holds what they mean for the kept channels. One that is computed from sizes of channels is the same in
every call; one that comes from the batch, from space or from data is not, and has to be what it was in the capture.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from chase_fx.errors import RewriteError
from chase_fx.graphs.axes import fixed_of
from chase_fx.graphs.guards import check, check_number
from chase_fx.graphs.provenance import from_data
from chase_fx.passes.sites import CallSite

__all__ = ["fixed_value", "value"]


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
    if isinstance(number, Node) and _varies(site, number):
        guard = check_number if from_data(number) else check
        with site.graph.inserting_before(site.node):
            made = site.graph.call_function(guard, (number, "==", found, True, site.node.meta.get("source", "")))
        made.meta["source"] = ""
    return found


def _varies(site: CallSite, number: Node) -> bool:
    """Whether a number may be another one in another call."""
    if number.op == "call_method" and number.target == "size" and len(number.args) == 2:
        labels = site.labels(number.args[0])  # type: ignore[arg-type]  # a tensor has a size
        dim = number.args[1]
        return labels is None or not isinstance(dim, int) or any(True for _ in fixed_of(labels[dim]))
    return "slot" in number.meta or any(_varies(site, part) for part in number.all_input_nodes)
