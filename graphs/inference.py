"""Tensors that can learn, also where the caller is in ``torch.inference_mode``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["normal_tensors"]


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Leaves inference mode inside the block: tensors that are made there would be barred from autograd forever."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
