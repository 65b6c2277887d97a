"""Linear algebra on the last two dims: a matrix is inverted or factored as a whole, those of a batch by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chase_fx.graphs.axes import Axis
from chase_fx.graphs.rules.base import LabelledOp, Labels
from chase_fx.graphs.rules.dims import align
from chase_fx.graphs.tape import Slot

__all__ = ["over_matrices", "solve"]


def over_matrices(*core: int) -> Callable[[LabelledOp], Sequence[Labels]]:
    """A rule for operands with so many dims of their own each: the leading ones are a batch, which passes.

    (*N, n, m), (*N, n) for core = (2, 1) -> (*N, ...)
    """

    def rule(op: LabelledOp) -> Sequence[Labels]:
        batch: list[Axis] = []
        for k, slot in enumerate(op.op.inputs()):
            lead = len(slot.shape) - core[k] if k < len(core) else 0
            for axis in op[slot][lead:]:
                op.freeze(axis, "a matrix is taken as a whole")
            batch = align(op, batch, list(op[slot][:lead]))
        return [_after(op, batch, out) for out in op.op.outs]

    return rule


# operator -> the names of its matrix and of its right-hand side
_EQUATIONS = {
    "linalg_solve_triangular": ("self", "B"),
    "_linalg_solve_ex": ("A", "B"),
    "triangular_solve": ("A", "self"),
    "cholesky_solve": ("input2", "self"),
    "linalg_lu_solve": ("LU", "B"),
}


def solve(op: LabelledOp) -> Sequence[Labels]:
    """``linalg.solve(A, B, left=True)`` and its like: a row of the solution needs all rows, a column its own.

    A: (*N, n, n), B: (*N, n, k) -> (*N, n, k);  B: (*N, k, n) with left=False;  B: (*N, n) -> (*N, n)
    """
    a, b = (op.named(name) for name in _EQUATIONS[op.name.rpartition("::")[2]])
    left = bool(op.named("left", True))
    lead = len(b.shape) - (1 if _is_vector(a, b) else 2)
    own = list(op[b][lead:])
    for axis in (*op[a][-2:], own[0] if left else own[-1]):
        op.freeze(axis, "an equation is solved over it")
    batch = align(op, list(op[a][:-2]), list(op[b][:lead]))
    return [(*batch, *own), *(_after(op, list(op[a][:-2]), out) for out in op.op.outs[1:])]


def _is_vector(a: Slot, b: Slot) -> bool:
    return len(b.shape) == 1 or (len(b.shape) < len(a.shape) and b.shape == a.shape[:-1])


def _after(op: LabelledOp, batch: Sequence[Axis], out: Slot) -> Labels:
    return (*batch, *(op.fixed(n, "of a matrix") for n in out.shape[len(batch) :]))
