"""The default score of a unit: how large its weights are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in

if TYPE_CHECKING:
    from chase_fx.graphs.axes import Atom
    from chase_fx.graphs.channels import ChannelGraph, Group

__all__ = ["Magnitude"]

Energies = npt.NDArray[np.float64]

_BLOCK = 1 << 16  # elements that stay in a core's cache while they are squared and added


class Magnitude:
    """Root mean square over every weight of a unit, each member in units of its own mean, so that none dominates."""

    def __init__(self, channels: ChannelGraph) -> None:
        self._channels = channels
        modules = modules_of(channels.module)
        self._tensors: dict[str, torch.Tensor] = {**parameters_in(modules), **buffers_in(modules)}
        self._known: dict[tuple[str, int], dict[Atom, npt.NDArray[np.int64]]] = {}
        self._energies: dict[tuple[str, int], Energies | None] = {}

    def __call__(self, group: Group) -> torch.Tensor:
        """(size,) scores of one group."""
        total = np.zeros(group.size)
        for name, dim, positions in self._channels.positions_of(group.atom, self._known):
            energy = self._energy(name, dim)
            if energy is None:
                continue
            per_unit = energy[positions[:, 0]] if positions.shape[1] == 1 else energy[positions].mean(1)
            mean = per_unit.sum() / group.size
            if mean > 0:
                total += per_unit / mean
        return torch.from_numpy(np.sqrt(total))

    def _energy(self, name: str, dim: int) -> Energies | None:
        """Sum of squares per index along ``dim``; computed once, for several groups may share the axis."""
        key = (name, dim)
        if key not in self._energies:
            tensor = self._tensors[name].detach()
            usable = tensor.is_floating_point() and not tensor.is_meta
            self._energies[key] = _sum_of_squares(tensor, dim).to("cpu", torch.float64).numpy() if usable else None
        return self._energies[key]


def _sum_of_squares(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Over every dim but ``dim``, in one pass and without a copy of the tensor."""
    others = [d for d in range(tensor.dim()) if d != dim]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if not others:
        return tensor.double().square()
    if dim == 0:
        norm: torch.Tensor = torch.linalg.vector_norm(tensor, dim=others, dtype=wide)
        return norm.double().square()
    # torch reduces a leading dim one column at a time, so blocks of rows are added onto each other first.
    blocks = tensor.split(max(1, _BLOCK * len(tensor) // max(1, tensor.numel())))
    total: torch.Tensor = blocks[0].to(wide).square()
    for block in blocks[1:]:
        part = block.to(wide)
        total[: len(part)].addcmul_(part, part)
    return total.sum(others)
