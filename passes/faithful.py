"""Does the traced graph give what the model gives?

A capture records the calls that a forward makes. What leaves no call is not in the graph: an exception that the model
catches, a decision by whether gradients are on. So ``prune`` runs both on the example inputs, in eval mode and without
gradients, as a user of the slim graph will.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn

from chase_fx.errors import VerificationError
from chase_fx.graphs.attempts import copy_of, quiet_torch
from chase_fx.graphs.draws import restored_generators
from chase_fx.graphs.duplicate import duplicate
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.modes import enter_mode
from chase_fx.graphs.traced import TracedModule, capture_of
from chase_fx.graphs.trees import map_tensors, named_tensors, tensors_in
from chase_fx.passes.differences import relative_difference
from chase_fx.passes.evaluation import evaluated

__all__ = ["check_capture"]

# Both make the same calls, so hardly anything is left to rounding; kernels may be chosen by whether gradients are on.
_ALLOWED = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 2e-1}
_SINGLE = 1e-4
# In double precision a model may still go through single precision on its way.
_SETTLED = 1e-5


@normal_tensors()
def check_capture(model: nn.Module, traced: TracedModule) -> None:
    """Compare a traced module with its model on the example inputs.

    A model that gives another result each time, or that has no values (meta), can't be compared and passes.

    Raises:
        VerificationError: they differ; the message names the output.
    """
    info = capture_of(traced)
    inputs = (info.args, info.kwargs)
    if any(t.is_meta for t in itertools.chain(tensors_in(inputs), model.parameters(), model.buffers())):
        return
    found = _difference(model, traced, inputs)
    if found is None:
        return
    path, difference = found
    if all(p.dtype is torch.float32 for p in model.parameters() if p.is_floating_point()):
        try:
            wide = copy_of(model).double(), copy.deepcopy(traced).double()
            doubled = map_tensors(duplicate(inputs, {}), lambda t: t.double() if t.is_floating_point() else t)
            settled = _difference(*wide, doubled, allowed=_SETTLED)
        except Exception:  # noqa: BLE001 - the model can't run in double precision, so the first result stands
            settled = found
        if settled is None:
            return
        path, difference = settled
    raise VerificationError(
        f"the traced graph gives another result than {type(model).__name__} on the example inputs, in eval mode and "
        f"without gradients: {path or 'the output'} differs by {difference:.1e} (relative). The forward decides by "
        "something that leaves no call in the graph, such as an exception that it catches or whether gradients are on; "
        "make the decision outside of the forward"
    )


def _difference(
    model: nn.Module, traced: TracedModule, inputs: Any, *, allowed: float | None = None
) -> tuple[str, float] | None:
    """The output that differs most by more than is allowed, and by how much."""
    try:
        want, again = _run_copy(model, inputs), _run_copy(model, inputs)
    except Exception:  # noqa: BLE001 - it runs with gradients only, so there is nothing to compare with
        return None
    if _worst(want, again, 0.0) is not None:
        return None
    args, kwargs = duplicate(inputs, {})
    with evaluated(traced), restored_generators(), torch.no_grad(), quiet_torch(traced):
        have = traced(*args, **kwargs)
    return _worst(want, have, allowed)


def _run_copy(model: nn.Module, inputs: Any) -> Any:
    root = copy_of(model)
    enter_mode(root, training=False)
    args, kwargs = duplicate(inputs, {})
    with restored_generators(), torch.no_grad(), quiet_torch(root):
        return root(*args, **kwargs)


def _worst(want: Any, have: Any, allowed: float | None) -> tuple[str, float] | None:
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
