"""Which indices of each parameter's axes still exist, once channels have been removed.

A removed unit takes whole slices, so what is left of a parameter is an outer product of one boolean vector per
dimension. Keeping the vectors instead of a full-size mask costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Alive"]


class Alive:
    """Parameter name -> per dimension the indices left (``None``: all).

    >>> import torch
    >>> alive = Alive()
    >>> alive.remove("w", (2, 3), 1, torch.tensor([0]))
    >>> alive.mask("w", (2, 3)).tolist()
    [[False, True, True], [False, True, True]]
    >>> alive.count("w", (2, 3))
    4
    """

    def __init__(self) -> None:
        self._axes: dict[str, list[Tensor | None]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._axes

    def remove(self, name: str, shape: Sequence[int], dim: int, indices: Tensor) -> None:
        """Remove ``indices`` (LongTensor, any shape) along ``dim`` of the parameter ``name`` of ``shape``."""
        axes = self._axes.setdefault(name, [None] * len(shape))
        axis = axes[dim]
        if axis is None:
            axis = axes[dim] = torch.ones(shape[dim], dtype=torch.bool)
        axis[indices.reshape(-1).cpu()] = False

    def forget(self) -> None:
        """Start again with everything alive, after the parameters themselves were cut."""
        self._axes.clear()

    def axis(self, name: str, shape: Sequence[int], dim: int) -> Tensor:
        """BoolTensor (shape[dim],) on the CPU."""
        axis = self._axes.get(name, [None] * len(shape))[dim]
        return torch.ones(shape[dim], dtype=torch.bool) if axis is None else axis

    def counts(self, name: str, shape: Sequence[int]) -> list[int]:
        """Indices left per dimension."""
        return [int(self.axis(name, shape, dim).count_nonzero()) for dim in range(len(shape))]

    def count(self, name: str, shape: Sequence[int]) -> int:
        """Entries left."""
        product = 1
        for count in self.counts(name, shape):
            product *= count
        return product

    def mask(self, name: str, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """The outer product: a BoolTensor that broadcasts to ``shape`` (expanded, not copied)."""
        mask = torch.ones((), dtype=torch.bool, device=device)
        for dim, axis in enumerate(self._axes.get(name, ())):
            if axis is not None:
                view = [1] * len(shape)
                view[dim] = -1
                mask = mask & axis.to(mask.device).view(view)
        return mask.expand(tuple(shape))
