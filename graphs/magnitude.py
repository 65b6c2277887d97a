"""The default score of a unit: how large its weights are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
Indices = npt.NDArray[np.int64]

_BLOCK = 1 << 16  # elements that stay in a core's cache while they are squared and added


class Magnitude:
    """Root mean square over every weight of a unit, each member in units of its own mean, so that none dominates."""

    def __init__(self, channels: ChannelGraph) -> None:
        self._channels = channels
        modules = modules_of(channels.module)
        self._tensors: dict[str, torch.Tensor] = {**parameters_in(modules), **buffers_in(modules)}
        self._totals: dict[Atom, Energies] = {}

    def __call__(self, group: Group) -> torch.Tensor:
        """(size,) scores of one group."""
        if not self._totals:
            self._add_up()
        return torch.from_numpy(np.sqrt(self._totals[group.atom]))

    def _add_up(self) -> None:
        """Every member of every group at once: one array over all units, one pass for each axis of each tensor."""
        sizes = [group.size for group in self._channels.groups]
        starts = np.cumsum([0, *sizes])
        first = {group.atom: int(start) for group, start in zip(self._channels.groups, starts, strict=False)}
        total = np.zeros(starts[-1])
        layouts: dict[int, tuple[_Layout, list[Energies]]] = {}  # tensors of one layer share their axes
        axes = list(self._channels.units())
        vectors = _squares([(name, self._tensors[name]) for name, _, _ in axes])
        for name, dim, units in axes:
            energy = vectors[name] if name in vectors else self._energy(name, dim)
            if energy is None:
                continue
            if id(units) not in layouts:
                layouts[id(units)] = _Layout.of(units, first), []
            layouts[id(units)][1].append(energy)
        for layout, energies in layouts.values():
            layout.add(np.stack(energies), total)
        for group, start in zip(self._channels.groups, starts, strict=False):
            self._totals[group.atom] = total[start : start + group.size]

    def _energy(self, name: str, dim: int) -> Energies | None:
        """Sum of squares per index along ``dim``."""
        tensor = self._tensors[name].detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        usable = tensor.is_floating_point() and not tensor.is_meta
        return _sum_of_squares(tensor, dim).to("cpu", torch.float64).numpy() if usable else None


@dataclass(frozen=True)
class _Layout:
    """Where units lie along an axis.

    Attributes:
        positions: indices along the axis, atom by atom.
        first: where in ``positions`` each atom begins.
        units: the unit, among all units, that each of them belongs to.
        atoms: the number of its atom.
        shared: for each atom, how many indices a unit has.
    """

    positions: Indices
    first: Indices
    units: Indices
    atoms: Indices
    shared: Indices

    @staticmethod
    def of(units: Mapping[Atom, Indices], first: Mapping[Atom, int]) -> _Layout:
        """``units`` has (unit, position) pairs for each atom; ``first`` the number of its first unit."""
        pairs = np.concatenate(list(units.values()))
        counts = [len(found) for found in units.values()]
        starts = np.repeat([first[atom] for atom in units], counts)
        shared = np.array([count // atom.size for atom, count in zip(units, counts, strict=True)])
        begins = np.cumsum([0, *counts[:-1]])
        return _Layout(pairs[:, 1], begins, pairs[:, 0] + starts, np.repeat(np.arange(len(counts)), counts), shared)

    def add(self, energies: Energies, total: Energies) -> None:
        """Add the mean over each unit's indices, in units of the mean over all indices of its atom.

        energies: one row for each tensor.
        """
        values = energies[:, self.positions]
        mean = np.add.reduceat(values, self.first, axis=1) / np.bincount(self.atoms)
        weight = np.divide(1.0, mean * self.shared, out=np.zeros_like(mean), where=mean > 0)
        np.add.at(total, self.units, (values * weight[:, self.atoms]).sum(0))


def _squares(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Energies]:
    """Of every vector on the CPU, by name: more than half of a network's tensors, too short to be worth a call each."""
    found = {name: t for name, t in tensors if t.dim() == 1 and t.dtype is torch.float32 and t.device.type == "cpu"}
    if not found:
        return {}
    with torch.no_grad():
        squares: Energies = torch.cat([*found.values()]).double().square().numpy()
    ends = itertools.accumulate(map(len, found.values()))
    return {name: squares[end - len(t) : end] for (name, t), end in zip(found.items(), ends, strict=True)}


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
