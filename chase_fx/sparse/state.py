"""The trainer's state as a plain dict: what a resumed run needs to end bit-identical to the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chase_fx.errors import CheckpointError
from chase_fx.sparse.channels import ChannelState
from chase_fx.sparse.masks import SparseWeights

__all__ = ["VERSION", "RunState"]

VERSION = 1
_KEYS = {"version", "step", "budget", "shortfall", "generator", "masks", "explored", "explored_gone", "kept", "history"}


@dataclass
class RunState:
    """Everything that changes while a trainer runs, beside the module and the optimizer.

    Attributes:
        identity: what tells this run from another: method, length, sparsity...
        weights, channels: the masks, and what is left of the groups.
        generator: the trainer's own random numbers.
        cut: cuts removed channels off; ``None`` without live shrink.
        step, budget: calls of ``step()`` so far, and what nnz must be.
    """

    identity: Mapping[str, Any]
    weights: SparseWeights
    channels: ChannelState
    generator: torch.Generator
    cut: Callable[[], None] | None = None
    step: int = 0
    budget: int = 0

    def pack(self) -> dict[str, Any]:
        """A copy as tensors, numbers and strings."""
        names, explored = self.weights.names, self.weights.explored or ()
        return {
            "version": VERSION,
            **self.identity,
            "step": self.step,
            "budget": self.budget,
            "shortfall": self.channels.shortfall,
            "generator": self.generator.get_state(),
            "masks": {name: mask.clone() for name, mask in zip(names, self.weights.masks, strict=True)},
            "explored": {name: mask.clone() for name, mask in zip(names, explored, strict=False)},
            "explored_gone": self.weights.explored_gone,
            "kept": {name: mask.clone() for name, mask in self.channels.kept.items()},
            "history": deepcopy(self.channels.history),
        }

    def unpack(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` in place; the module's weights are untouched, except that live shrink cuts them to size.

        Raises:
            CheckpointError: the state is incomplete or belongs to another run.
        """
        self.check(state)
        weights, channels = self.weights, self.channels
        kept: Mapping[str, Tensor] = {name: mask.cpu() for name, mask in state["kept"].items()}
        if self.cut is None:
            weights.forget_removed()
            for mask in channels.kept.values():
                mask.fill_(True)
        gone = {name: (now & ~kept[name]).nonzero().squeeze(1) for name, now in channels.kept.items()}
        if any(len(indices) for indices in gone.values()):
            channels.remove(gone, weights)
            if self.cut is not None:
                self.cut()
        for i, name in enumerate(weights.names):
            weights.masks[i].copy_(state["masks"][name])
            if weights.explored is not None and name in state["explored"]:
                weights.explored[i].copy_(state["explored"][name])
        weights.explored_gone = int(state["explored_gone"])
        self.generator.set_state(state["generator"].cpu().to(torch.uint8))
        self.step, self.budget, channels.shortfall = int(state["step"]), int(state["budget"]), int(state["shortfall"])
        channels.history[:] = deepcopy(state["history"])

    def check(self, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes that parameters have once ``state`` is loaded, by name: of all that channels are removed from.

        Raises:
            CheckpointError: the state is incomplete or belongs to another run; nothing has been changed.
        """
        self._check_identity(state)
        kept: Mapping[str, Tensor] = {name: mask.cpu() for name, mask in state["kept"].items()}
        for name, now in self.channels.kept.items():
            if kept[name].shape != now.shape:
                msg = f"the trainer state has {len(kept[name])} units in group {name!r}, this module {len(now)}"
                raise CheckpointError(msg)
            if self.cut is not None and bool((kept[name] & ~now).any()):
                msg = "the state has channels that live shrink has already cut off; load it into a newly built trainer"
                raise CheckpointError(msg)
        shapes = self.channels.shapes_keeping(kept) if self.cut is not None else {}
        for name, weight in zip(self.weights.names, self.weights.parameters, strict=True):
            expected, found = shapes.get(name, tuple(weight.shape)), tuple(state["masks"][name].shape)
            if expected != found:
                msg = (
                    f"the mask of {name!r} has shape {found}, the weight will have {expected}: the state belongs to "
                    f"another module"
                )
                raise CheckpointError(msg)
        return shapes

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        if lacking := sorted((_KEYS | self.identity.keys()) - state.keys()):
            msg = f"the trainer state lacks {lacking}; expected what trainer.state_dict() returns"
            raise CheckpointError(msg)
        for key, mine in {"version": VERSION, **self.identity}.items():
            if state[key] != mine:
                msg = (
                    f"the trainer state was taken with {key}={state[key]!r}, this trainer has {mine!r}; "
                    f"build it the same way before loading"
                )
                raise CheckpointError(msg)
        for what, names, found in (
            ("masked weights", set(self.weights.names), set(state["masks"])),
            ("channel groups", set(self.channels.kept), set(state["kept"])),
        ):
            if names != found:
                msg = f"the trainer state has other {what} than this module; they differ in {sorted(names ^ found)[:3]}"
                raise CheckpointError(msg)
