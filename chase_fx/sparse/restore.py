"""``restore`` of the methods: into a trainer just built, or as a way to build one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from chase_fx.errors import CheckpointError
from chase_fx.sparse.checkpoint import Stateful, load_run, read_run

if TYPE_CHECKING:
    from chase_fx.sparse.trainer import SparseTrainer

__all__ = ["Restore"]

T = TypeVar("T", bound="SparseTrainer")
_TAKEN_OVER = ("total_steps", "sparsity", "channel_sparsity", "live_shrink")


class Restore:
    """Continue a run from a checkpoint that ``save`` wrote, to the bit-identical end.

    Build module and optimizer as they were when training began, with any weights. Then either::

        trainer = Chase(traced, optimizer, total_steps=1000, ...)      # as before
        trainer.restore("run.ckpt", scheduler=scheduler)               # returns the trainer

        trainer = Chase.restore("run.ckpt", traced, optimizer, others={"scheduler": scheduler}, ...)

    The second takes ``total_steps``, ``sparsity``, ``channel_sparsity`` and ``live_shrink`` from the checkpoint; other
    options that were not left at their defaults must be given again. ``previous=True`` loads the checkpoint before,
    which stays whole whatever happens to the newest. The objects saved under names are given again under the same
    names. The global random generators of torch, Python and numpy continue as well.

    Raises:
        CheckpointError: the file is missing, truncated or tampered with, or belongs to another run: another module,
            optimizer, method or option. The module is unchanged then.
    """

    @overload
    def __get__(self, trainer: None, owner: type[T]) -> Callable[..., T]: ...
    @overload
    def __get__(self, trainer: T, owner: type[T]) -> Callable[..., T]: ...
    def __get__(self, trainer: T | None, owner: type[T]) -> Callable[..., T]:
        """The form for an instance, or the one for a class."""
        if trainer is not None:
            return _into(trainer)
        return _build(owner)


def _into(trainer: T) -> Callable[..., T]:
    def restore(path: str | os.PathLike[str], *, previous: bool = False, **others: Stateful) -> T:
        """Load the checkpoint at ``path`` into this trainer, its module and its optimizer."""
        load_run(read_run(path, previous=previous), trainer, trainer.module, trainer.optimizer, others)
        return trainer

    return restore


def _build(method: type[T]) -> Callable[..., T]:
    def restore(
        path: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer, *, previous: bool = False,
        others: dict[str, Stateful] | None = None, **options: Any,
    ) -> T:  # fmt: skip
        """Build the trainer of the run at ``path`` around ``module`` and ``optimizer``, and load all three."""
        run = read_run(path, previous=previous)
        if lacking := sorted({"method", *_TAKEN_OVER} - run["trainer"].keys()):
            raise CheckpointError(f"{path}: the trainer's state lacks {lacking}; expected what save() wrote")
        known = {name: run["trainer"][name] for name in _TAKEN_OVER}
        # A trainer zeroes weights as it is built; where the run does not fit, they have to be as they were.
        before = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
        trainer = method(module, optimizer, **{**known, **options})
        try:
            load_run(run, trainer, trainer.module, trainer.optimizer, others or {})
        except CheckpointError:
            trainer.release()
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            raise
        return trainer

    return restore
