"""A run as a checkpoint: the trainer's state, module, optimizer, random generators, and what else the loop has.

The optimizer's state goes by parameter names, so a file outlives a change in their order. A file is checked in full
before anything is changed, and the trainer's part is put back first: where live shrink has cut channels off, it brings
the new module to the size that the tensors have.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from chase_fx.errors import CheckpointError
from chase_fx.sparse import checkpoint_file as files
from chase_fx.sparse import distributed
from chase_fx.sparse.codec import Encoder, decode

__all__ = ["Stateful", "load_run", "read_run", "save_run"]


class Stateful(Protocol):
    """Anything with a state: schedulers, GradScaler, AveragedModel, samplers."""

    def state_dict(self) -> Any:
        """The state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Put it back."""


class Resumable(Stateful, Protocol):
    """A trainer: it can say beforehand whether a state fits."""

    def check_state(self, state: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
        """Raise unless ``state`` fits; the shapes that the parameters have once it is loaded, where they change."""


def save_run(
    path: str | os.PathLike[str], trainer: Stateful, module: nn.Module, optimizer: Optimizer,
    others: Mapping[str, Stateful],
) -> None:  # fmt: skip
    """Write everything to ``path``; with several processes rank 0 writes and all wait for it."""
    generators = distributed.gather(_generators())
    failure: Exception | None = None
    if distributed.rank() == 0:
        encoder = Encoder()
        try:
            content = {
                "trainer": encoder.encode(trainer.state_dict(), "trainer"),
                "module": encoder.encode(dict(module.state_dict()), "module"),
                "optimizer": encoder.encode(_by_name(module, optimizer), "optimizer"),
                "generators": encoder.encode(generators, "generators"),
                "others": {name: encoder.encode(part.state_dict(), f"others.{name}") for name, part in others.items()},
            }
            files.write(path, content, encoder.tensors)
        except Exception as e:  # noqa: BLE001  (raised again below, when the other ranks no longer wait)
            failure = e
    problems = distributed.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if problems[0] is not None:
        raise CheckpointError(f"rank 0 could not write {path}: {problems[0]}")


def read_run(path: str | os.PathLike[str], *, previous: bool = False) -> dict[str, Any]:
    """The checkpoint at ``path``, checked against its checksum.

    Args:
        path: what :func:`save_run` wrote.
        previous: read the checkpoint before it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        run, failure = _read(files.previous_of(path) if previous else path), None
    except CheckpointError as e:
        run, failure = {}, e
    for r, problem in enumerate(distributed.gather(None if failure is None else str(failure))):
        if problem is not None:  # on every rank, so that none waits for the others
            raise failure or CheckpointError(f"rank {r} could not read the checkpoint: {problem}")
    return run


def _read(source: str | os.PathLike[str]) -> dict[str, Any]:
    content, tensors = files.read(source)
    try:
        parts = {key: decode(content[key], tensors) for key in ("trainer", "module", "optimizer", "generators")}
        return {**parts, "others": {name: decode(part, tensors) for name, part in content["others"].items()}}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{source} holds no complete run ({type(e).__name__}: {e})") from e


def load_run(
    run: Mapping[str, Any], trainer: Resumable, module: nn.Module, optimizer: Optimizer, others: Mapping[str, Stateful]
) -> None:
    """Put everything back; see :meth:`SparseTrainer.restore`.

    Raises:
        CheckpointError: the checkpoint belongs to another run. Nothing is changed then.
    """
    _require("tensors of the module", module.state_dict(), run["module"])
    _require("other parts (keyword arguments of save and restore)", others, run["others"])
    _require_groups(module, optimizer, run["optimizer"])
    _require_shapes(module, run["module"], trainer.check_state(run["trainer"]))
    trainer.load_state_dict(run["trainer"])
    module.load_state_dict(run["module"])
    _load_optimizer(module, optimizer, run["optimizer"])
    for name, part in others.items():
        part.load_state_dict(run["others"][name])
    generators = run["generators"]
    if distributed.rank() < len(generators):
        _set_generators(generators[distributed.rank()])


def _require(what: str, mine: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if mine.keys() != found.keys():
        odd = sorted(mine.keys() ^ found.keys())[:3]
        msg = f"the checkpoint has other {what} than this run; they differ in {odd}: build the run as it was"
        raise CheckpointError(msg)


def _require_shapes(module: nn.Module, found: Mapping[str, Any], resized: Mapping[str, tuple[int, ...]]) -> None:
    parameters = dict(module.named_parameters())
    for name, mine in module.state_dict().items():
        saved = found[name]
        if not isinstance(mine, Tensor) or not isinstance(saved, Tensor):
            continue
        # What live shrink makes of buffers is known only once it has: they follow the parameters.
        shape = resized.get(name, tuple(mine.shape)) if name in parameters or not resized else tuple(saved.shape)
        if (tuple(saved.shape), saved.dtype) != (shape, mine.dtype):
            msg = (
                f"the checkpoint has {name!r} as {saved.dtype} of shape {tuple(saved.shape)}, this run needs "
                f"{mine.dtype} of {shape}: build the module as it was"
            )
            raise CheckpointError(msg)


def _names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Per parameter group the names of its parameters; ``#group.place`` for those that are not the module's."""
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [known.get(id(parameter), f"#{g}.{i}") for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def _by_name(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    names, packed = _names(module, optimizer), optimizer.state_dict()
    flat = [name for group in names for name in group]
    order = [index for group in packed["param_groups"] for index in group["params"]]
    by_index = dict(zip(order, flat, strict=True))
    return {
        "kind": type(optimizer).__name__,
        "state": {by_index[index]: state for index, state in packed["state"].items()},
        "groups": [{**group, "params": members} for group, members in zip(packed["param_groups"], names, strict=True)],
    }


def _require_groups(module: nn.Module, optimizer: Optimizer, run: Mapping[str, Any]) -> None:
    mine, found = _names(module, optimizer), [group["params"] for group in run["groups"]]
    if run["kind"] != type(optimizer).__name__ or [set(g) for g in mine] != [set(g) for g in found]:
        msg = (
            f"the checkpoint has the state of {run['kind']} with parameter groups of {[len(g) for g in found]}, this "
            f"run has {type(optimizer).__name__} with {[len(g) for g in mine]}: build the optimizer as it was"
        )
        raise CheckpointError(msg)


def _load_optimizer(module: nn.Module, optimizer: Optimizer, run: Mapping[str, Any]) -> None:
    names = [name for group in _names(module, optimizer) for name in group]
    index = {name: i for i, name in enumerate(names)}
    optimizer.load_state_dict({
        "state": {index[name]: state for name, state in run["state"].items()},
        "param_groups": [
            {**group, "params": [index[name] for name in mine]}
            for group, mine in zip(run["groups"], _names(module, optimizer), strict=True)
        ],
    })  # fmt: skip
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, saved in run["state"].items():
        parameter = parameters[index[name]]
        state = optimizer.state[parameter]
        for key, value in saved.items() if isinstance(saved, Mapping) else ():
            now = state.get(key)
            if not isinstance(value, Tensor) or not isinstance(now, Tensor):
                continue
            # load_state_dict casts to the parameter's dtype, and the file has no strides: both would change the bits.
            if now.dtype != value.dtype:
                now = state[key] = value.to(now.device)
            if now.shape == parameter.shape and now.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=now.dtype, device=now.device).copy_(now)


def _generators() -> dict[str, Any]:
    """The global random generators: torch's, Python's and, where it is in use, numpy's."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def _set_generators(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy as np

        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002  (augmentations draw from it)
