"""Modules run for what they give, and left as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from chase_fx.graphs.recapture import written
from chase_fx.graphs.traced import TracedModule

__all__ = ["evaluated", "in_double"]


def in_double(module: TracedModule) -> TracedModule:
    """A copy with the same graph in double precision, whatever its model does there: the graph is what is judged."""
    new = copy.deepcopy(module)
    nn.Module._apply(new, lambda t: t.double() if t.is_floating_point() else t)
    return new


@contextmanager
def evaluated(*roots: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; modes and what forwards write to buffers and parameters are put back at its end."""
    modes = [{m: m.training for m in root.modules()} for root in roots]
    state = {b: b.clone() for root in roots for b in root.buffers()}
    state |= {p: p.detach().clone() for root in roots for p in _written(root)}
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for mode in modes:
            for module, training in mode.items():
                module.training = training
        with torch.no_grad():
            for tensor, value in state.items():
                tensor.copy_(value)


def _written(root: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a forward of ``root`` writes to."""
    if isinstance(root, TracedModule) and root.info is not None:
        names = written(root.info, "parameter")
        yield from (p for name, p in root.named_parameters(remove_duplicate=False) if name in names)
