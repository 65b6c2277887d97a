"""Which modules stay whole as ``call_module`` nodes, and which are inlined.

A leaf is a ``torch.nn`` module whose size attributes we know how to change (:data:`SIZE_ATTRIBUTES`), a batch norm (it
updates its own statistics), or a module without parameters. A subclass that overrides ``forward`` is inlined: its
arithmetic is on the tape then, and nothing has to be known about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from chase_fx.errors import ArgumentError

__all__ = ["SIZE_ATTRIBUTES", "Leaves", "declared", "has_parameter", "is_leaf", "may_be_leaf"]

# module class -> ((attribute, tensor, dim), ...); keys are Any since a mapping of a subclass would not fit otherwise
Leaves = Mapping[Any, tuple[tuple[str, str, int], ...]]


def _first(dim: int, *names: str) -> tuple[tuple[str, str, int], ...]:
    return tuple((name, "weight", dim) for name in names)


# module class -> ((attribute, tensor, dim), ...): attribute = tensor.shape[dim] after pruning. Attributes that are no
# plain size of a tensor (groups, normalized_shape, transposed convs) are set by the rewrite.
SIZE_ATTRIBUTES: dict[type[nn.Module], tuple[tuple[str, str, int], ...]] = {
    nn.Linear: (("out_features", "weight", 0), ("in_features", "weight", 1)),
    nn.Embedding: (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1)),
    nn.EmbeddingBag: (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1)),
    nn.Bilinear: (("out_features", "weight", 0), ("in1_features", "weight", 1), ("in2_features", "weight", 2)),
    nn.PReLU: _first(0, "num_parameters"),
    _BatchNorm: (("num_features", "running_mean", 0), ("num_features", "weight", 0)),
    _InstanceNorm: (("num_features", "running_mean", 0), ("num_features", "weight", 0)),
    nn.GroupNorm: _first(0, "num_channels"),
    nn.LayerNorm: (),
    nn.RMSNorm: (),
    _ConvNd: (),
}

_FORWARDS: frozenset[Callable[..., object]] = frozenset(
    cls.forward
    for cls in (
        nn.Linear,
        nn.Embedding,
        nn.EmbeddingBag,
        nn.Bilinear,
        nn.PReLU,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
    )
)
# Parameter-free modules of torch.nn that hold sizes of channels themselves.
_INLINED = (nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold, nn.Unfold, nn.Flatten)


def declared(leaves: Any, model: nn.Module) -> dict[Any, tuple[tuple[str, str, int], ...]]:
    """The leaf classes that a caller declares. Raises :class:`ArgumentError` for what ``model`` doesn't have."""
    if leaves is not None and not isinstance(leaves, Mapping):
        raise ArgumentError(f"leaves must map classes of modules to size attributes, found {type(leaves).__name__}")
    found = {}
    for cls, sizes in (leaves or {}).items():
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            raise ArgumentError(f"leaves must map classes of modules to size attributes, found the key {cls!r}")
        try:
            found[cls] = tuple((str(attribute), str(name), int(dim)) for attribute, name, dim in sizes)
        except (TypeError, ValueError) as e:
            raise ArgumentError(
                f"the sizes of {cls.__name__} in leaves must be (attribute, tensor, dim) triples, found {sizes!r}"
            ) from e
        for module in model.modules():
            if isinstance(module, cls):
                _check_sizes(module, found[cls])
    return found


def _check_sizes(module: nn.Module, sizes: tuple[tuple[str, str, int], ...]) -> None:
    tensors = {**module._parameters, **module._buffers}
    for attribute, name, dim in sizes:
        tensor = tensors.get(name)
        if not hasattr(module, attribute) or name not in tensors or (tensor is not None and dim >= tensor.dim()):
            raise ArgumentError(
                f"leaves say that {type(module).__name__}.{attribute} is the size of dim {dim} of '{name}'; its "
                f"tensors are { {n: None if t is None else tuple(t.shape) for n, t in tensors.items()} }"
                + ("" if hasattr(module, attribute) else f", and it has no attribute {attribute!r}")
            )


def has_parameter(module: nn.Module) -> bool:
    """Whether there is any parameter in ``module``."""
    own = any(p is not None for p in module._parameters.values())
    return own or (bool(module._modules) and next(module.parameters(), None) is not None)


def is_leaf(module: nn.Module, named: Leaves = MappingProxyType({})) -> bool:
    """Whether ``module`` becomes one ``call_module`` node; classes in ``named`` do, whatever they are."""
    if type(module) in named:
        return True
    if not _has_plain_weight(module):
        return False
    if isinstance(module, _BatchNorm):
        return True
    cls = type(module)
    if cls.forward in _FORWARDS and not module._forward_pre_hooks:
        conv = getattr(cls, "_conv_forward", None)
        if conv is not None and not any(conv is base._conv_forward for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return False
        check = getattr(cls, "_output_padding", None)
        return check is None or check is _ConvTransposeNd._output_padding
    return (
        cls.__module__.startswith("torch.nn.modules.")
        and not module._parameters
        and not module._buffers
        and not module._modules
        and not isinstance(module, _INLINED)
        and not module._forward_pre_hooks
    )


def _has_plain_weight(module: nn.Module) -> bool:
    # A parametrised weight is a property of the class, no entry of _parameters: such a module is inlined.
    if "parametrizations" in module._modules:
        return False
    weight = module.__dict__.get("weight")  # old-style weight_norm sets a plain tensor
    return weight is None or isinstance(weight, nn.Parameter)


def may_be_leaf(module: nn.Module) -> bool:
    """Whether ``module`` could be one that only acts differently in training (drop-path, stochastic depth).

    Such a module is run as a leaf first; it stays one if it read ``self.training`` and kept the shape.
    """
    return not (module._parameters or module._buffers or module._modules or module._forward_pre_hooks)
