"""The slim module tree: tensors sliced to their kept indices, and the size attributes of modules set to match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chase_fx.graphs.duplicate import duplicate
from chase_fx.graphs.leaves import SIZE_ATTRIBUTES, Leaves
from chase_fx.graphs.walk import buffers_in, modules_of, parameters_in

__all__ = ["resize", "slice_tensor", "slim_tree"]

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}  # rows of a recurrent weight per hidden unit
Kept = tuple[torch.Tensor | None, ...]


def slice_tensor(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The kept indices of every dim, of which at least one must be given; a copy that shares no memory."""
    out = tensor.detach()
    for dim, indices in enumerate(kept):
        if indices is not None:
            out = out.index_select(dim, indices.to(out.device))
    return out


def slim_tree(module: nn.Module, pruned: Mapping[str, Kept]) -> dict[str, Any]:
    """A deep copy of the module's state in which the tensors named in ``pruned`` are sliced.

    The slices go into deepcopy's memo, so ties between modules survive and the dense tensors are never copied.
    """
    memo: dict[int, Any] = {}
    modules = modules_of(module)
    for name, tensor in (*parameters_in(modules).items(), *buffers_in(modules).items()):
        if name not in pruned or id(tensor) in memo:  # it has an earlier name
            continue
        sliced = slice_tensor(tensor, pruned[name])
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(sliced, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = sliced.requires_grad_(tensor.requires_grad)
    names = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")
    return {name: duplicate(module.__dict__[name], memo) for name in names}


def resize(module: nn.Module, leaves: Leaves) -> None:
    """Set the size attributes of one module from its tensors; ``leaves`` adds those of the user's classes."""
    if not module._parameters and not module._buffers:
        return
    for cls, attributes in (*SIZE_ATTRIBUTES.items(), *leaves.items()):
        if isinstance(module, cls):
            for attribute, name, dim in attributes:
                tensor: torch.Tensor | None = module._parameters.get(name)
                tensor = module._buffers.get(name) if tensor is None else tensor
                if tensor is not None and getattr(module, attribute, tensor.shape[dim]) != tensor.shape[dim]:
                    setattr(module, attribute, tensor.shape[dim])
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[0] // _GATES[module.mode]
        if module.proj_size:
            module.proj_size = module.get_parameter("weight_hr_l0").shape[0]
    weight = module._parameters.get("weight")
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    if isinstance(module, _ConvNd) and weight is not None:
        first, second = weight.shape[0], weight.shape[1]
        if isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
