"""The sparse weights of a module: which parameters are masked, their masks, and what keeps them at zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from chase_fx.errors import ArgumentError, NothingToPruneError
from chase_fx.sparse.alive import Alive
from chase_fx.sparse.optim import dense, slots

__all__ = ["Choice", "SparseWeights", "maskable"]

Choice = Iterable[str] | Callable[[str, nn.Parameter], bool] | None
"""Which parameters to mask: names, a predicate, or ``None`` for the default."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONTRACTIONS = (_ConvNd, nn.Linear, nn.Bilinear)


def maskable(module: nn.Module, choice: Choice = None, *, embeddings: bool = True) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that are trained sparsely, by name.

    By default every trainable floating-point parameter with at least two dimensions, first convolution and classifier
    included. Never the parameters of norms, nor vectors in disguise such as a layer scale of shape (C, 1, 1);
    ``embeddings=False`` leaves out ``nn.Embedding`` tables.

    Raises:
        ArgumentError: a name that is no parameter, or a parameter with fewer than two dimensions.
        NothingToPruneError: no parameter is left.

    >>> list(maskable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))))
    ['0.weight', '3.weight']
    """
    everything = dict(module.named_parameters())
    if choice is None:
        chosen = [name for name, parameter in everything.items() if _by_default(module, name, parameter, embeddings)]
    elif callable(choice):
        chosen = [name for name, parameter in everything.items() if choice(name, parameter)]
    else:
        wanted = set(choice)
        if unknown := sorted(wanted - everything.keys()):
            owner = type(module).__name__
            msg = f"parameters={unknown[:3]} are no parameters of {owner}; see dict(module.named_parameters())"
            raise ArgumentError(msg)
        chosen = [name for name in everything if name in wanted]
    for name in chosen:
        if everything[name].dim() < 2:
            msg = (
                f"parameters= selects {name!r} of shape {tuple(everything[name].shape)}; only weights with at least "
                f"two dimensions can be sparse (biases and norms stay dense)"
            )
            raise ArgumentError(msg)
    if not chosen:
        msg = (
            f"{type(module).__name__} has no weights to train sparsely: expected at least one trainable parameter with "
            f"two or more dimensions, found {len(everything)} parameters in all; select some with parameters="
        )
        raise NothingToPruneError(msg)
    return {name: everything[name] for name in chosen}


def _by_default(module: nn.Module, name: str, parameter: nn.Parameter, embeddings: bool) -> bool:
    if parameter.dim() < 2 or not parameter.requires_grad or not parameter.is_floating_point() or not parameter.numel():
        return False
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _CONTRACTIONS) and name.rpartition(".")[2] == "weight":
        return True
    is_vector = max(parameter.shape) == parameter.numel()
    is_table = isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
    return not (isinstance(owner, _NORMS) or is_vector or (is_table and not embeddings))


class SparseWeights:
    """Parameters with their masks, in the module's order.

    Attributes:
        names, parameters: the masked weights.
        masks: BoolTensor of each weight's shape, on its device; True is active.
        alive: what channel removal has left of each parameter; masks never reach beyond it.
        explored: where weights were ever active, as far as they are not cut off; ``None`` unless tracked.
        explored_gone: how many of those were cut off.
        size: number of masked weights of the whole module as it was at the start (N).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.parameters]
        self.alive = Alive()
        self.optimizer = optimizer
        self.explored: list[Tensor] | None = None
        self.explored_gone = 0
        self.size = sum(weight.numel() for weight in self.parameters)
        self._dense: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the weights as they are now."""
        return [weight.shape for weight in self.parameters]

    @property
    def nnz(self) -> int:
        """Active weights, counted."""
        return sum(self.counts())

    def counts(self) -> list[int]:
        """Active weights per layer."""
        return [int(mask.count_nonzero()) for mask in self.masks]

    def capacities(self) -> list[int]:
        """Places per layer that channel removal has left."""
        return [self.alive.count(name, weight.shape) for name, weight in zip(self.names, self.parameters, strict=True)]

    def capacity(self) -> int:
        """Places that channel removal has left, active or not."""
        return sum(self.capacities())

    def inactive(self) -> list[Tensor]:
        """Where weights can grow: alive and not active."""
        return [
            ~mask & self.alive.mask(name, mask.shape, mask.device) if name in self.alive else ~mask
            for name, mask in zip(self.names, self.masks, strict=True)
        ]

    def remove(self, name: str, parameter: nn.Parameter, dim: int, indices: Tensor) -> None:
        """Remove slices of any parameter; call :meth:`settle` after the last one."""
        self.alive.remove(name, parameter.shape, dim, indices)
        if name not in self.names:
            self._dense.setdefault(name, (parameter, torch.ones(0, dtype=torch.bool)))

    def settle(self) -> None:
        """Make masks follow the slices removed."""
        for name, mask in zip(self.names, self.masks, strict=True):
            if name in self.alive:
                mask.logical_and_(self.alive.mask(name, mask.shape, mask.device))
        for name, (parameter, _) in list(self._dense.items()):
            keep = self.alive.mask(name, parameter.shape, parameter.device).contiguous()
            self._dense[name] = (parameter, keep)

    def forget_removed(self) -> None:
        """Start again with everything alive, after the parameters themselves were cut."""
        self.alive.forget()
        self._dense.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero weights and optimizer slots outside the masks, and whatever belongs to removed channels.

        This runs after every step and is all that a masked step costs. Filling is twice as fast as multiplying by a
        bool mask (which is cast first), and clears infinities as well; the inverse mask lives for a moment only.
        """
        for parameter, mask in self._pairs():
            outside = ~mask
            parameter.masked_fill_(outside, 0)
            for _, slot in slots(self.optimizer, parameter):
                slot.masked_fill_(outside if slot.device == outside.device else outside.to(slot.device), 0)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for i, parameter in enumerate(self.parameters):
            if self.masks[i].device != parameter.device:  # the module was moved since the last step
                self.masks[i] = self.masks[i].to(parameter.device)
            yield parameter, self.masks[i]
        for name, (parameter, keep) in self._dense.items():
            if keep.device != parameter.device:
                keep = keep.to(parameter.device)  # noqa: PLW2901 - the moved mask replaces the old one
                self._dense[name] = (parameter, keep)
            yield parameter, keep

    def gradients(self) -> list[Tensor]:
        """The dense gradients; zeros for a weight that the last backward pass did not reach.

        Raises:
            ArgumentError: no weight has a gradient at all.
        """
        if all(weight.grad is None for weight in self.parameters):
            msg = (
                "no weight has a gradient in trainer.step(): expected the dense gradients of the last backward pass, "
                "found p.grad None for all. Call loss.backward(), optimizer.step(), trainer.step() and only then "
                "optimizer.zero_grad()"
            )
            raise ArgumentError(msg)
        return [torch.zeros_like(weight) if weight.grad is None else dense(weight.grad) for weight in self.parameters]

    @property
    def has_gradients(self) -> bool:
        """Whether every weight has a gradient."""
        return all(weight.grad is not None for weight in self.parameters)

    def note_coverage(self) -> None:
        """Add the active weights to those ever active, where that is tracked."""
        for seen, mask in zip(self.explored or (), self.masks, strict=False):
            seen.logical_or_(mask.to(seen.device))

    def pick(self, values: Sequence[Tensor], where: Sequence[Tensor]) -> list[Tensor]:
        """values[i][where[i]]: per tensor a 1-D tensor in row-major order."""
        return [value.detach()[mask] for value, mask in zip(values, where, strict=True)]
