"""The whole way in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from chase_fx.errors import OtherPathError, VerificationError
from chase_fx.graphs.capture import trace
from chase_fx.graphs.channels import analyze
from chase_fx.graphs.outputs import Outputs
from chase_fx.graphs.select import Score
from chase_fx.graphs.traced import TracedModule, capture_of
from chase_fx.graphs.whole import Function, FunctionName, named
from chase_fx.passes.faithful import check_capture
from chase_fx.passes.rewrite import rewrite
from chase_fx.passes.verify import verify as verify_slim

__all__ = ["prune"]


def prune(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    channel_sparsity: float = 0.5,
    score: Score = "magnitude",
    round_to: int = 1,
    outputs: Outputs = None,
    verify: bool = True,
) -> TracedModule:
    """Capture, analyse, plan, rewrite and verify.

    Where verifying shows that the data decides what a function of the model's code does, the function stays one call
    (see ``whole`` of :func:`trace`).

    Args:
        model: any module; it is not changed.
        args: example positional inputs: a tuple, or a single tensor.
        kwargs: example keyword inputs.
        channel_sparsity: share of the channels of each coupled axis to remove, in [0, 1).
        score: ``"magnitude"``, ``"random"``, or a function from a group to (size,) scores; the lowest go.
        round_to: kept widths are multiples of this where possible.
        outputs: which outputs must keep their shape; default all.
        verify: before returning, compare the slim graph with the masked dense one, and the dense one with the model.

    Returns:
        The slim GraphModule; ``slim.plan`` tells what was kept.

    Raises:
        ChaseError: what, where, expected against found, and what to do; see :mod:`chase_fx.errors`.

    Example:
        >>> import torch, chase_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> slim = chase_fx.prune(net, torch.zeros(1, 4), channel_sparsity=0.75)
        >>> slim.get_submodule("0").weight.shape
        torch.Size([2, 4])
    """
    whole: list[Function] = []
    while True:
        traced = trace(model, args, kwargs, whole=whole)
        slim = rewrite(traced, analyze(traced, outputs).plan(channel_sparsity, score, round_to))
        if not verify:
            return slim
        try:
            verify_slim(traced, slim)
        except (OtherPathError, VerificationError) as e:
            # The masked model goes another way than the dense one: the data decides, in functions that have to stay.
            info = capture_of(traced)
            places = [info.deciders.get(e.where, ())] if isinstance(e, OtherPathError) else info.reads.values()
            found = [f for place in places if (f := _next(place, whole)) is not None]
            if not found:
                raise
            whole += dict.fromkeys(found)
        else:
            check_capture(model, traced)
            return slim


def _next(place: Sequence[FunctionName], whole: Sequence[Function]) -> Function | None:
    """The innermost of the functions around a place in the code that does not stay one call yet."""
    return next((f for f in map(named, place) if f is not None and f not in whole), None)
