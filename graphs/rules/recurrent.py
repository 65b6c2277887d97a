"""Recurrent layers. Their ATen calls are those of their steps and need no rule; this is what a whole layer asks for.

Shape legend: H hidden units, P projected ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chase_fx.graphs.tape import Slot, TapedOp

__all__ = ["projections"]


def projections(ops: Iterable[TapedOp]) -> Iterator[Slot]:
    """The (P, H) weights by which LSTMs project what they give on, each of which follows a (4H, inputs) and a (4H, P).

    torch takes an LSTM for one with projections if P differs from H, so P has to stay below H.
    """
    seen = set()
    for op in ops:
        if op.call != "lstm" or op.node in seen:
            continue
        seen.add(op.node)
        weights = [slot for slot in op.operands if len(slot.shape) == 2]
        for inputs, recurrent, projection in zip(weights, weights[1:], weights[2:], strict=False):
            p, h = projection.shape
            if inputs.shape[0] == 4 * h and recurrent.shape == (4 * h, p):
                yield projection
