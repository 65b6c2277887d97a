"""Does the traced graph give what the model gives?

A capture records the calls that a forward makes. What leaves no call is not in the graph: an exception that the model
catches, a decision by whether gradients are on. So ``prune`` runs both on the example inputs, in eval mode and without
gradients, as a user of the slim graph will.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from chase_fx.errors import ChaseError, VerificationError
from chase_fx.graphs.alone import alone
from chase_fx.graphs.attempts import copy_of, quiet_torch
from chase_fx.graphs.draws import restored_generators
from chase_fx.graphs.duplicate import duplicate
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.modes import enter_mode
from chase_fx.graphs.traced import TracedModule, capture_of
from chase_fx.graphs.trees import map_tensors, named_tensors, tensors_in
from chase_fx.passes.differences import relative_difference
from chase_fx.passes.evaluation import evaluated, in_double

__all__ = ["check_capture"]

_Found = tuple[str, float]  # what differs, and by how much
# Largest relative differences. Both make the same calls, so hardly anything is left to rounding; kernels may be chosen
# by whether gradients are on. Where the model is not in double precision, a larger difference is measured again in it.
_ALLOWED = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_SINGLE = 1e-4
# In double precision a model may still go through single precision on its way.
_SETTLED = 1e-5


@normal_tensors()
def check_capture(model: nn.Module, traced: TracedModule) -> None:
    """Compare a traced module with its model on the example inputs.

    A model that gives another result each time, that can't run without gradients (it computes some itself), or that has
    no values (meta) can't be compared, and passes.

    Raises:
        VerificationError: they differ; the message names the output.
        OtherPathError: the graph refuses its own example without gradients.
    """
    info = capture_of(traced)
    inputs = (info.args, info.kwargs)
    if any(t.is_meta for t in itertools.chain(tensors_in(inputs), model.parameters(), model.buffers())):
        return
    try:
        want, again = _run_copy(model, inputs), _run_copy(model, inputs)
    except Exception:  # noqa: BLE001 - the model's own, which the capture with gradients did not have
        return
    if _worst(want, again, 0.0) is not None:
        return
    found = _worst(want, _run_graph(model, traced, inputs))
    if found is not None and any(p.is_floating_point() and p.dtype is not torch.float64 for p in model.parameters()):
        found = _settled(model, traced, inputs, found)
    if found is not None:
        raise VerificationError(
            f"the traced graph gives another result than {type(model).__name__} on the example inputs, in eval mode "
            f"and without gradients: {found[0]} differs by {found[1]:.1e} (relative). {_WHY}"
        )


_WHY = (
    "The forward decides by something that leaves no call in the graph, such as an exception that it catches or "
    "whether gradients are on; make the decision outside of the forward"
)


def _settled(model: nn.Module, traced: TracedModule, inputs: Any, found: _Found) -> _Found | None:
    """What is left of a difference in double precision; all of it where the model can't run in that."""
    wide, doubled = copy_of(model).double(), map_tensors(duplicate(inputs, {}), _doubled)
    try:
        want = _run_copy(wide, doubled)
    except Exception:  # noqa: BLE001 - it makes tensors of a fixed type, say
        return found
    return _worst(want, _run_graph(model, in_double(traced), doubled), _SETTLED)


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return alone(tensor, torch.float64) if tensor.is_floating_point() else tensor


def _run_graph(model: nn.Module, traced: TracedModule, inputs: Any) -> Any:
    args, kwargs = duplicate(inputs, {})
    try:
        with evaluated(traced), restored_generators(), torch.no_grad(), quiet_torch(traced):
            return traced(*args, **kwargs)
    except ChaseError:
        raise
    except Exception as e:
        raise VerificationError(
            f"the traced graph raises {type(e).__name__} on the example inputs, in eval mode and without gradients, "
            f"where {type(model).__name__} does not: {e}. {_WHY}"
        ) from e


def _run_copy(model: nn.Module, inputs: Any) -> Any:
    root = copy_of(model)
    enter_mode(root, training=False)
    args, kwargs = duplicate(inputs, {})
    with restored_generators(), torch.no_grad(), quiet_torch(root):
        return root(*args, **kwargs)


def _worst(want: Any, have: Any, allowed: float | None = None) -> _Found | None:
    """The output that differs most by more than is allowed."""
    wanted, found = list(named_tensors(want)), list(named_tensors(have))
    if len(wanted) != len(found):
        return f"the number of output tensors, {len(wanted)} against {len(found)},", float("inf")
    worst = None
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        limit = _ALLOWED.get(a.dtype, _SINGLE) if allowed is None else allowed
        difference = relative_difference(a, b)
        if difference > limit and (worst is None or difference > worst[1]):
            worst = f"output '{path}'", difference
    return worst
