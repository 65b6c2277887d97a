"""Optimizer state of sparse weights, for any optimizer: a slot is told by its shape.

SGD's ``momentum_buffer``, Adam's ``exp_avg`` and ``exp_avg_sq``, RMSprop's ``square_avg``, Adagrad's ``sum``, and
whatever an optimizer that we have never seen calls its own: one tensor per parameter with the parameter's shape.
Scalars such as ``step`` have another shape and are left alone. Zero is what such a slot starts with, except for Rprop's
``step_size``, which begins again at its smallest step, and Adagrad's ``sum`` with an ``initial_accumulator_value``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from chase_fx.errors import OptimizerMismatchError

__all__ = ["dense", "held_parameters", "require_held", "require_sliceable", "slots"]


def dense(gradient: Tensor) -> Tensor:
    """The gradient itself, or a dense copy of a sparse one (``nn.Embedding(sparse=True)``)."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def slots(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The state tensors of ``parameter`` that hold one number per weight, with their names.

    >>> import torch
    >>> weight = nn.Parameter(torch.ones(2, 3)); weight.grad = torch.ones(2, 3)
    >>> optimizer = torch.optim.Adam([weight]); optimizer.step()
    >>> sorted(name for name, _ in slots(optimizer, weight))
    ['exp_avg', 'exp_avg_sq']
    """
    # .get: the state is a defaultdict, and asking it would leave an empty entry that load_state_dict stumbles over.
    state = optimizer.state.get(parameter)
    if isinstance(state, Mapping):
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield name, value


def sliceable(slot: Any, shape: Sequence[int]) -> bool:
    """Whether a slot of a parameter of ``shape`` can be cut with it: one number, or one per weight, row or column.

    A factored slot has the parameter's dims, some of them shrunk to 1 (Adafactor's ``row_var``). What has other dims
    (the vectors that LBFGS makes of all parameters, a preconditioner, blocks of a quantised moment) belongs to the
    parameter as it was.

    >>> import torch
    >>> [sliceable(torch.ones(s), (4, 3)) for s in ((4, 3), (4, 1), (), (12,), (4, 4))]
    [True, True, True, False, False]
    """
    if isinstance(slot, (list, tuple)):
        return all(not isinstance(part, Tensor) or part.numel() <= 1 for part in slot)
    if not isinstance(slot, Tensor) or slot.numel() <= 1:
        return True
    return len(slot.shape) == len(shape) and all(n in (1, m) for n, m in zip(slot.shape, shape, strict=True))


def require_sliceable(optimizer: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise unless live shrink can cut the state of ``parameters``.

    Raises:
        OptimizerMismatchError: naming the first slot that it can't.
    """
    total = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    named: dict[Any, str] = {parameter: name for name, parameter in parameters}
    for parameter, state in optimizer.state.items():
        name = named.get(parameter)
        for key, slot in state.items() if isinstance(state, Mapping) else ():
            # One slot for all parameters stands with the first of them, whichever that is.
            of_all = isinstance(slot, Tensor) and slot.numel() == total > parameter.numel()
            if of_all or (name is not None and not sliceable(slot, parameter.shape)):
                shape = f"shape {tuple(slot.shape)}" if isinstance(slot, Tensor) else "several tensors"
                msg = (
                    f"live_shrink=True can't cut the slot {key!r} ({shape}) that {type(optimizer).__name__} keeps for "
                    f"{name or 'its first parameter'} of shape {tuple(parameter.shape)}: only numbers and tensors with "
                    f"one entry per weight, row or column can follow. Use live_shrink=False, or another optimizer"
                )
                raise OptimizerMismatchError(msg)


def held_parameters(optimizer: Optimizer) -> set[int]:
    """``id`` of every parameter that the optimizer updates."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def require_optimizer(optimizer: object) -> None:
    """Raise unless ``optimizer`` has what an optimizer has; wrappers of one do.

    Raises:
        OptimizerMismatchError: with what it is.
    """
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise OptimizerMismatchError(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}")


def require_held(optimizer: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise unless the optimizer holds all of ``parameters``.

    Raises:
        OptimizerMismatchError: naming the first ones that it doesn't hold.
    """
    held = held_parameters(optimizer)
    wanted = list(parameters)
    missing = [name for name, parameter in wanted if id(parameter) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        msg = (
            f"the optimizer ({type(optimizer).__name__}, {len(held)} parameters) does not hold {len(missing)} of the "
            f"{len(wanted)} parameters to be trained sparsely: {shown}. Build it on the parameters of the very "
            f"module that is trained: a traced module owns copies, so use SGD(traced.parameters(), ...), not model's"
        )
        raise OptimizerMismatchError(msg)
