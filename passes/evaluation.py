"""Modules run for what they give, and left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluated"]


@contextmanager
def evaluated(*roots: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; modes and the values of buffers are put back at its end."""
    modes = [{m: m.training for m in root.modules()} for root in roots]
    buffers = {b: b.clone() for root in roots for b in root.buffers()}
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for mode in modes:
            for module, training in mode.items():
                module.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
