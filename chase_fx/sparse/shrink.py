"""Live shrink: cut removed channels off the module while it trains, so that the steps that follow are cheaper.

What is cut: parameters (the objects stay the same, so optimizer, clipping and schedulers keep holding them), gradients,
masks, copies that follow the module such as an exponential average, and every optimizer slot. Buffers, size attributes
and size arguments of the graph are up to the ``shrink`` callable, which knows graphs; this module does not.

The entries cut off are zero, get zero gradients and stay zero, so the trajectory is the one of masking alone: the sums
just have fewer zero terms. The candidates of drop and grow keep their order, so that ties and random draws fall alike
as well. Two kinds of steps see the difference: norms over channels, which then count kept ones only, as in the slim
module, and optimizers that average over a weight's rows and columns or scale by its shape (Adafactor, Muon).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from chase_fx.errors import RewriteError
from chase_fx.sparse.alive import Alive
from chase_fx.sparse.channels import ChannelState
from chase_fx.sparse.masks import SparseWeights
from chase_fx.sparse.optim import dense, sliceable
from chase_fx.sparse.structure import Shrinker

__all__ = ["CutGroup", "CutMember", "cut_parameter", "shrink_in_place"]


@dataclass(frozen=True)
class CutMember:
    """A member renumbered to the indices that are left."""

    tensor: str
    dim: int
    positions: Tensor
    producer: bool


@dataclass(frozen=True)
class CutGroup:
    """A group of the units that are left, numbered from 0 again."""

    name: str
    size: int
    members: Sequence[CutMember]
    least: int
    multiple: int


@torch.no_grad()
def shrink_in_place(
    module: nn.Module,
    weights: SparseWeights,
    channels: ChannelState,
    shrink: Shrinker,
    followers: Iterable[nn.Module] = (),
) -> None:
    """Cut off what ``channels`` has removed since the last cut."""
    alive = weights.alive
    groups = [_cut_group(channels, index, alive) for index in range(len(channels.units))]
    followers = list(followers)
    indices = {name: _indices(alive, name, parameter) for name, parameter in module.named_parameters() if name in alive}
    for name, keep in indices.items():
        cut_parameter(module.get_parameter(name), keep, weights.optimizer)
        for follower in followers:
            cut_parameter(follower.get_parameter(name), keep, None)
    for i, name in enumerate(weights.names):
        if name in indices:
            weights.masks[i] = _cut(weights.masks[i], indices[name])
            if weights.explored is not None:
                before = int(weights.explored[i].count_nonzero())
                weights.explored[i] = _cut(weights.explored[i], indices[name])
                weights.explored_gone += before - int(weights.explored[i].count_nonzero())
    weights.forget_removed()
    channels.rebase(groups, module)
    for target in (module, *followers):
        shrink(target, channels.kept)
    _forget_compiled()


def _forget_compiled() -> None:
    """Drop what ``torch.compile`` made for the old sizes, wherever the module was compiled into.

    Each cut is a recompilation, and a function of the caller's own around the module has a limit of eight of them: then
    it runs uncompiled, or fails with ``fullgraph=True``.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def cut_parameter(parameter: nn.Parameter, keep: Sequence[Tensor | None], optimizer: Optimizer | None) -> None:
    """Keep the indices ``keep[dim]`` (LongTensor; ``None``: all) of a parameter, its gradient and its optimizer slots.

    >>> weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    >>> cut_parameter(weight, [None, torch.tensor([0, 2])], None)
    >>> weight.tolist()
    [[0.0, 2.0], [3.0, 5.0]]
    """
    state = (optimizer.state.get(parameter) if optimizer is not None else None) or {}
    shape = parameter.shape
    for key, slot in state.items():
        # Dims that a factored slot has shrunk to 1 need no cut.
        if isinstance(slot, Tensor) and slot.dim() == len(shape) > 0 and sliceable(slot, shape):
            state[key] = _cut(slot, [k if n == m else None for k, n, m in zip(keep, slot.shape, shape, strict=True)])
    gradient = None if parameter.grad is None else _cut(dense(parameter.grad), keep)
    parameter.grad = None
    data = _cut(parameter.data, keep)
    # A graph that is still alive (the caller's `loss`) keeps the parameter's gradient accumulator with the old shape,
    # and the next forward would pick it up again. Autograd lets go of it where the dtype changes, so change it on the
    # way.
    parameter.data = torch.empty(
        0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32, device=data.device
    )
    parameter.data = data
    parameter.grad = gradient


def _cut(tensor: Tensor, keep: Sequence[Tensor | None]) -> Tensor:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    strided = channels_last and not tensor.is_contiguous()
    for dim, indices in enumerate(keep):
        if indices is not None:
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last if strided else torch.contiguous_format)


def _indices(alive: Alive, name: str, parameter: nn.Parameter) -> list[Tensor | None]:
    axes = [alive.axis(name, parameter.shape, dim) for dim in range(parameter.dim())]
    return [None if bool(axis.all()) else axis.nonzero().squeeze(1) for axis in axes]


def _cut_group(channels: ChannelState, index: int, alive: Alive) -> CutGroup:
    units = channels.units[index]
    name = units.group.name
    left = channels.kept[name][channels.ids[name]].nonzero().squeeze(1)
    members = []
    for part in units.slices:
        axis = alive.axis(part.name, part.parameter.shape, part.dim)
        positions = part.positions[left]
        here = axis[positions]
        widths = here.sum(1)
        if len(left) and bool((widths != widths[0]).any()):
            msg = (
                f"units of group {name!r} have lost unequal numbers of indices along dim {part.dim} of {part.name!r}; "
                f"the axis is no product of its groups; train with live_shrink=False"
            )
            raise RewriteError(msg)
        renumbered = (axis.cumsum(0) - 1)[positions[here]].view(len(left), -1)
        members.append(CutMember(part.name, part.dim, renumbered, part.producer))
    return CutGroup(name, len(left), tuple(members), units.group.least, units.group.multiple)
