"""Masks that a caller made: the units of each group that stay, checked against what the groups need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from chase_fx.errors import ArgumentError
from chase_fx.graphs.axes import Atom

if TYPE_CHECKING:
    from chase_fx.graphs.channels import Group

__all__ = ["masks_by_atom"]


def masks_by_atom(groups: Sequence[Group], kept: Mapping[str, torch.Tensor]) -> dict[Atom, np.ndarray]:
    """The masks of the groups that lose units.

    Raises:
        ArgumentError: a mask that is none of a group's, or that keeps fewer units than its group needs.
    """
    if not isinstance(kept, Mapping):
        raise ArgumentError(f"expected a mapping from group names to masks, found {type(kept).__name__}")
    by_name = {group.name: group for group in groups}
    masks: dict[Atom, np.ndarray] = {}
    for name, mask in kept.items():
        if name not in by_name:
            raise ArgumentError(f"no group {name!r}; groups are {', '.join(list(by_name)[:5])}, ...")
        group, array = by_name[name], _as_mask(name, mask)
        if array.shape != (group.size,):
            raise ArgumentError(f"group {name!r} has {group.size} units, found a mask of shape {array.shape}")
        if not array.all():
            _check_width(group, int(array.sum()))
            masks[group.atom] = array
    return masks


def _check_width(group: Group, left: int) -> None:
    if not left:
        raise ArgumentError(f"group {group.name!r} must keep at least one unit")
    if left < group.least:
        raise ArgumentError(
            f"group {group.name!r} must keep at least {group.least} units, for a variance or a norm runs over them, "
            f"found a mask that keeps {left}"
        )
    if left % group.multiple:
        raise ArgumentError(
            f"group {group.name!r} must keep a multiple of {group.multiple} units, for an operator takes rows of such "
            f"lengths only, found a mask that keeps {left}"
        )


def _as_mask(name: str, mask: object) -> np.ndarray:
    try:
        array: np.ndarray = torch.as_tensor(mask).detach().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ArgumentError(f"the mask of group {name!r} can't be read ({e}); found {mask!r}") from e
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():  # such as the indices of the units that stay
        raise ArgumentError(f"the mask of group {name!r} must hold one bool for each unit, found {mask!r}")
    return array.astype(np.bool_)
