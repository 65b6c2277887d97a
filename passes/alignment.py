"""Guards of views in which numbers stand for space next to channels that the plan removes."""

from __future__ import annotations

import operator
from typing import Any

from chase_fx.graphs.guards import check
from chase_fx.passes.sites import CallSite

__all__ = ["guard_alignments"]


def guard_alignments(site: CallSite) -> None:
    """Refuse sizes for which a view would take the kept channels apart in another way than all of them."""
    for alignment in (found for fact in site.facts for found in fact.alignments):
        slots = ((n, n.meta.get("slot")) for n in site.node.all_input_nodes)
        x = next((n for n, slot in slots if slot is not None and slot.index == alignment.slot.index), None)
        if x is None or not any(map(site.counts.live, alignment.channels)):
            continue
        with site.graph.inserting_before(site.node):
            size: Any = 1
            for k, d in enumerate(alignment.dims):
                read = site.graph.call_method("size", (x, d))
                size = site.graph.call_function(operator.mul, (size, read)) if k else read
            where = site.node.meta.get("source", "")
            guard = site.graph.call_function(check, (size, "==", alignment.product, True, where))
        guard.meta["source"] = ""
