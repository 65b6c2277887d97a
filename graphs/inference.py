"""Tensors that can learn, also where the caller, or a part of the forward, is in ``torch.inference_mode``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chase_fx.graphs.patches import Patch

__all__ = ["normal_tensors", "without_inference_mode"]


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Leaves inference mode inside the block: tensors that are made there would be barred from autograd forever."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def without_inference_mode() -> Patch:
    """In a capture, an ``inference_mode`` region of the forward is a ``no_grad`` region, which the graph can hold.

    Its tensors have no gradient either way. Inside the real one, torch calls the operators that are made of others as
    they are, which have no channel rules.
    """

    def enter(region: torch.inference_mode) -> None:
        plain: Any = torch.no_grad() if region.mode else torch.enable_grad()
        region._inference_mode_context = plain
        plain.__enter__()

    return torch.inference_mode, "__enter__", enter
