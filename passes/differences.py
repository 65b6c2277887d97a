"""How far two tensors are apart."""

from __future__ import annotations

import math

import torch

__all__ = ["largest", "relative_difference"]


def largest(tensor: torch.Tensor) -> float:
    """The largest finite absolute value; 0 where there is none."""
    finite = tensor[tensor.isfinite()] if tensor.is_floating_point() else tensor.new_empty(0)
    return float(finite.abs().max().item()) if finite.numel() else 0.0


def relative_difference(want: torch.Tensor, have: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value of ``want``, or to ``floor`` if that is larger."""
    if want.shape != have.shape or want.layout != have.layout:
        return float("inf")
    want, have = want.to_dense(), have.to_dense()
    if want.numel() == 0:
        return 0.0
    if not want.is_floating_point() and not want.is_complex():
        return 0.0 if torch.equal(want, have) else float("inf")
    same = (want == have) | (want.isnan() & have.isnan())
    difference = torch.where(same, torch.zeros_like(want), want - have).abs().max().item()
    if math.isnan(difference):  # NaN in one of the two only
        return float("inf")
    finite = want[want.isfinite()]
    scale = max(floor, finite.abs().max().item() if finite.numel() else 1.0)
    return float(difference / scale if scale else difference)
