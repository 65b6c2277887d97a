"""Recurrent layers: what a whole one asks for, and the fused steps of GPUs. On a CPU steps are other ATen calls.

Shape legend: B samples, H hidden units, P projected ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from chase_fx.graphs.axes import Axis
from chase_fx.graphs.rules.base import LabelledOp, Labels
from chase_fx.graphs.tape import Slot, TapedOp

__all__ = ["gru_cell", "lstm_cell", "projections"]


def lstm_cell(op: LabelledOp) -> Sequence[Labels]:
    """A step of an LSTM: hidden unit h goes with rows h, H + h, 2H + h and 3H + h of the gates.

    input_gates, hidden_gates: (B, 4H); c: (B, H); biases: (4H,) -> h: (B, H), c: (B, H), gates: (B, 4H)
    """
    batch, hidden, gates = _step(op, 4)
    return [(batch, hidden), (batch, hidden), (batch, gates)]


def gru_cell(op: LabelledOp) -> Sequence[Labels]:
    """A step of a GRU: hidden unit h goes with rows h, H + h and 2H + h of the gates.

    input_gates, hidden_gates: (B, 3H); h: (B, H); biases: (3H,) -> h: (B, H), kept for the backward pass: (B, 5H)
    """
    batch, hidden, _ = _step(op, 3)
    return [(batch, hidden), (batch, op.fixed(5 * hidden.size))]


def _step(op: LabelledOp, count: int) -> tuple[Axis, Axis, Axis]:
    """The axes of the samples, of the hidden units, and of ``count`` gates for each of these."""
    inputs, recurrent, state, *biases = op.op.inputs()
    (batch, gates), hidden = op[inputs], op[state][1]
    for slot in (recurrent, state):
        op.tie(batch, op[slot][0])
    for slot in (recurrent, *biases):
        op.tie(gates, op[slot][-1])
    for k in range(count):
        op.tie(hidden, op.take(gates, k * hidden.size, (k + 1) * hidden.size))
    return batch, hidden, gates


def projections(ops: Iterable[TapedOp]) -> Iterator[tuple[TapedOp, Slot]]:
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
            if p < h and inputs.shape[0] == 4 * h and recurrent.shape == (4 * h, p):
                yield op, projection
