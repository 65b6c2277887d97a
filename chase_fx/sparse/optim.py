"""Optimizer state of sparse weights, for any optimizer: a slot is told by its shape.

SGD's ``momentum_buffer``, Adam's ``exp_avg`` and ``exp_avg_sq``, RMSprop's ``square_avg``, Adagrad's ``sum``, and
whatever an optimizer that we have never seen calls its own: one tensor per parameter with the parameter's shape.
Scalars such as ``step`` have another shape and are left alone. Zeroing such a slot is what a fresh weight would start
with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from chase_fx.errors import OptimizerMismatchError

__all__ = ["held_parameters", "require_held", "slots"]


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


def held_parameters(optimizer: Optimizer) -> set[int]:
    """``id`` of every parameter that the optimizer updates."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


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
