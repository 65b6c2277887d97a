"""Copies of tensors that a forward makes by ``copy.deepcopy``, which reads memory that no call tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chase_fx.graphs.patches import Patch

__all__ = ["deep_copies"]


def deep_copies(records: Callable[[], bool]) -> Patch:
    """While ``records()``, a deep copy is a clone that no gradient passes, as it is of a tensor that has none."""
    original: Any = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
        if not records():
            return original(tensor, memo)
        memo[id(tensor)] = found = tensor.detach().clone()
        return found

    return torch.Tensor, "__deepcopy__", copied
