"""Weights that are computed from parameters: what they are when a row of these is empty.

``weight_norm`` divides a row by its norm: without any weight that is 0 / 0, and every number of the network is NaN from
then on. Masks and removed channels empty rows, so such parameters are refused before the first mask is drawn.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chase_fx.errors import ArgumentError

__all__ = ["require_empty_rows"]

Compute = Callable[[Mapping[str, Tensor]], Tensor]


def require_empty_rows(module: nn.Module, masked: Collection[str], emptied: Collection[str]) -> None:
    """Raise where a row of one of these parameters can't be empty.

    Args:
        module: whose parametrizations are tried out, on copies.
        masked: names of parameters that get masks.
        emptied: names of parameters that lose whole slices, and keep them as zeros.

    Raises:
        ArgumentError: naming the first such parameter.
    """
    for name, owner, attribute in _brittle(module, {*masked, *emptied}):
        way = (
            "leave it dense with parameters="
            if name in masked
            else "cut its channels off at once with live_shrink=True"
        )
        msg = (
            f"{owner or type(module).__name__}.{attribute} is computed from {name!r}, and is not finite where a row of "
            f"that is zero (weight_norm divides by the norm of the row). Remove the parametrization before training "
            f"sparsely (torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm), or {way}"
        )
        raise ArgumentError(msg)


@torch.no_grad()
def _brittle(module: nn.Module, names: Collection[str]) -> Iterator[tuple[str, str, str]]:
    for prefix, owner in module.named_modules():
        for attribute, sources, compute in _computed(owner):
            for source, parameter in sources.items():
                name = f"{prefix}.{source}".lstrip(".")
                if name in names and any(_breaks(compute, sources, source, d) for d in range(parameter.dim())):
                    yield name, prefix, attribute


def _breaks(compute: Compute, sources: Mapping[str, nn.Parameter], name: str, dim: int) -> bool:
    """Whether the result is no longer finite when the first slice of one parameter along ``dim`` is zero."""
    values = {source: parameter.detach().clone() for source, parameter in sources.items()}
    if values[name].shape[dim] == 1 or not bool(compute(values).isfinite().all()):
        return False
    values[name].select(dim, 0).zero_()
    return not bool(compute(values).isfinite().all())


def _computed(owner: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter], Compute]]:
    """Per computed weight of ``owner`` its name, the parameters that it is computed from, and how."""
    if parametrize.is_parametrized(owner):
        for attribute, chain in cast("nn.ModuleDict", owner.parametrizations).items():
            prefix = f"parametrizations.{attribute}."
            # A copy in eval mode: spectral_norm writes to its buffers in train mode.
            still = copy.deepcopy(chain).eval()
            sources = {prefix + name: parameter for name, parameter in chain.named_parameters()}
            yield attribute, sources, partial(_call_with, still, len(prefix))
    for hook in vars(owner)["_forward_pre_hooks"].values():  # torch.nn.utils.weight_norm, the older one
        name, compute = getattr(hook, "name", None), getattr(hook, "compute_weight", None)
        if isinstance(name, str) and callable(compute) and len(inspect.signature(compute).parameters) == 1:
            own = {key: p for key, p in owner.named_parameters(recurse=False) if key.startswith(f"{name}_")}
            yield name, own, partial(_compute_on, compute)


def _call_with(chain: nn.Module, skip: int, values: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = torch.func.functional_call(chain, {name[skip:]: value for name, value in values.items()}, ())
    return result


def _compute_on(compute: Callable[[Any], Tensor], values: Mapping[str, Tensor]) -> Tensor:
    return compute(SimpleNamespace(**values))
