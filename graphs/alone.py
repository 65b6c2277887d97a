"""Copies of inputs that lie in memory as the inputs do, for a forward may decide by that."""

from __future__ import annotations

import torch

__all__ = ["alone"]


def alone(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of ``tensor`` without its history, in memory of its own with the same strides."""
    kind = tensor.dtype if dtype is None else dtype
    new = tensor.detach().to(kind, copy=True)
    if tensor.layout is not torch.strided or new.stride() == tensor.stride() or not tensor.numel():
        return new
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((extent,), (1,)).to(kind, copy=True)
    return flat.as_strided(tensor.shape, tensor.stride())
