"""Which units vanish with their weights: whether an activation is zero where every weight of a unit is.

A removed unit counts as zero in every sum. That is what the model itself would make of a unit without weights only if
the unit is zero there, or meets a zero: ``relu(w @ x)`` is, ``elu(w @ x) + 1`` is not, nor is a copy that ``expand``
made of a tensor that has other units. A sum of such values alone would lose something that no weight of the unit
brought in, so those units stay.

This is abstract interpretation of the tapes, once the axes are settled: for each tensor the atoms whose units are zero
in it. What is not known to be zero is taken for something else. That is careful, and seldom matters: a product with a
weight is zero whatever the other operand is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from chase_fx.graphs.axes import Atom, Axis, Cause, atoms_of
from chase_fx.graphs.rules.base import Facts, Labels
from chase_fx.graphs.tape import Slot, TapedOp
from chase_fx.graphs.unification import Axes

__all__ = ["freeze_what_stays"]

Atoms = frozenset[Atom]
_NONE: Atoms = frozenset()

# Operators that are products of two operands: argument positions of the factors, and of what is added to the product.
_PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mm": ((0, 1), ()),
    "bmm": ((0, 1), ()),
    "mv": ((0, 1), ()),
    "dot": ((0, 1), ()),
    "vdot": ((0, 1), ()),
    "linear": ((0, 1), (2,)),
    "convolution": ((0, 1), (2,)),
    "_convolution": ((0, 1), (2,)),
    "addmm": ((1, 2), (0,)),
    "baddbmm": ((1, 2), (0,)),
    "addbmm": ((1, 2), (0,)),
    "addmv": ((1, 2), (0,)),
    "addr": ((1, 2), (0,)),
    "_trilinear": ((0, 1, 2), ()),
    "_grouped_mm": ((0, 1), ()),
    "_weight_norm_interface": ((0, 1), ()),
}
# Operators whose result is zero where their operands are, whatever dim they work along.
_KEEPING_ZERO = """
    view _unsafe_view reshape _reshape_alias view_copy flatten unflatten _reshape_copy channel_shuffle pixel_shuffle
    native_channel_shuffle pixel_unshuffle view_as_real view_as_complex detach alias contiguous detach_copy alias_copy
    conj _conj resolve_conj resolve_neg real permute transpose swapaxes t numpy_T squeeze unsqueeze expand expand_copy
    cat stack slice select unbind split split_with_sizes unsafe_split unsafe_split_with_sizes flip roll repeat
    repeat_interleave diagonal diag_embed tril triu unfold unfold_backward as_strided index_select gather index
    _unsafe_index index_add index_copy index_put _index_put_impl _unsafe_index_put scatter scatter_add scatter_reduce
    embedding _embedding_bag _embedding_bag_forward_only sum nansum mean var std max min amax amin median
    linalg_vector_norm norm cumsum cumprod sort topk avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    _adaptive_avg_pool2d _adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d grid_sampler_2d grid_sampler_3d im2col col2im _fft_r2c _fft_c2c _fft_c2r glu
    _pack_padded_sequence index_fill slice_scatter select_scatter block_diag
"""
_LINEAR = frozenset(_KEEPING_ZERO.split())
# Operators that give a weight another shape, or a part of it.
_MOVES = frozenset(
    {"t", "numpy_T", "transpose", "permute", "view", "reshape", "_unsafe_view", "detach", "alias", "select", "slice"}
)
# Matrices whose rows and columns are the same units: zero in a removed row at every kept column.
_DIAGONAL = frozenset({"eye", "diag_embed"})
_ATTENTION = "scaled_dot_product"  # in the name of every kernel of it
_ZEROS = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "empty_strided", "zero"})


def freeze_what_stays(
    axes: Axes, ops: list[TapedOp], labels: dict[int, Labels], facts: dict[int, Facts], zero: dict[int, Atoms]
) -> None:
    """Freeze the units that are summed over although they do not vanish with their weights.

    Args:
        axes: where to freeze.
        ops: the tape of one capture.
        labels: the labels of its tensors by slot.
        facts: what the rules noted, by position on the tape.
        zero: for each parameter and buffer, by slot, the atoms that it has.
    """
    doubtful = _doubtful(ops, labels, facts)
    if not doubtful:
        return
    known = _Known(labels, {index: atoms & doubtful for index, atoms in zero.items()}, doubtful)
    for position, op in enumerate(ops):
        fact = facts.get(position)
        if fact is None:
            continue
        for slot, dim in fact.contracted:
            for atom in known.atoms(labels[slot.index][dim]):
                if not _vanishes(op, atom, known, fact):
                    cause = Cause(op.node, str(op.op), op.source, "its units do not vanish with their weights")
                    axes.freeze(atom, cause)
        known.run(op)


def _doubtful(ops: list[TapedOp], labels: dict[int, Labels], facts: dict[int, Facts]) -> Atoms:
    """The atoms that are summed over where no factor is a weight; nets of convolutions have none of them."""
    weights: set[int] = set()  # slots of parameters, and of what only moves them
    atoms: dict[int, Axis] = {}
    for position, op in enumerate(ops):
        first = next(op.inputs(), None)
        if first is not None and _name(op) in _MOVES and (first.kind == "parameter" or first.index in weights):
            weights.update(slot.index for slot in op.outs)
        fact = facts.get(position)
        if fact is None or not fact.contracted:
            continue
        factors = (_factors(op) or ([], []))[0]
        if not any(slot.kind == "parameter" or slot.index in weights for slot in factors):
            found = (labels[slot.index][dim] for slot, dim in fact.contracted)
            atoms.update({id(axis): axis for axis in found})
    return frozenset(atom for axis in atoms.values() for atom in atoms_of(axis))


def _vanishes(op: TapedOp, atom: Atom, known: _Known, fact: Facts) -> bool:
    """Whether the term of a sum is zero that the units of ``atom`` bring in."""
    product = _factors(op)
    if product is not None:
        return any(atom in known.zero(slot) for slot in product[0])
    return all(atom in known.zero(slot) for slot, dim in fact.contracted if atom in known.atoms_of(slot))


def _factors(op: TapedOp) -> tuple[list[Slot], list[Slot]] | None:
    """The factors of a product and what is added to it."""
    name = _name(op)
    if _ATTENTION in name:
        return [s for s in op.args[:2] if isinstance(s, Slot)], []
    places = _PRODUCTS.get(name)
    if places is None:
        return None
    factors, added = ([op.args[i] for i in where if i < len(op.args)] for where in places)
    return [s for s in factors if isinstance(s, Slot)], [s for s in added if isinstance(s, Slot)]


def _name(op: TapedOp) -> str:
    return str(op.op._schema.name).rpartition("::")[2].rstrip("_")


class _Known:
    """For each tensor, the atoms whose units are zero in it; atoms that nobody doubts are left out."""

    def __init__(self, labels: dict[int, Labels], zero: dict[int, Atoms], doubtful: Atoms) -> None:
        self._labels = labels
        self._zero = zero
        self._doubtful = doubtful
        self._atoms: dict[int, tuple[Axis, Atoms]] = {}
        self._of_slot: dict[int, Atoms] = {}
        self._aliases: dict[int, list[int]] = {}

    def atoms(self, axis: Axis) -> Atoms:
        """The live atoms of an axis."""
        found = self._atoms.get(id(axis))
        if found is None:  # the axis is held so that its id stays its own
            found = self._atoms[id(axis)] = (axis, self._doubtful.intersection(atoms_of(axis)))
        return found[1]

    def atoms_of(self, slot: Slot) -> Atoms:
        """The live atoms of every dim of a tensor."""
        found = self._of_slot.get(slot.index)
        if found is None:
            found = _NONE.union(*(self.atoms(axis) for axis in self._labels.get(slot.index, ())))
            self._of_slot[slot.index] = found
        return found

    def zero(self, slot: Slot) -> Atoms:
        """The atoms whose units are zero in a tensor."""
        return self._zero.get(slot.index, _NONE)

    def run(self, op: TapedOp) -> None:
        """Note what an operator gives."""
        for slot in op.outs:
            atoms = self.atoms_of(slot)
            found = frozenset(atom for atom in atoms if self._stays_zero(op, atom)) if atoms else _NONE
            if op.op._schema.is_mutable:
                self._write(slot, found)
            self._zero[slot.index] = found
            self._aliases.setdefault(slot.storage, []).append(slot.index)

    def _write(self, slot: Slot, found: Atoms) -> None:
        """What was written to may be seen through other views too."""
        written = self.atoms_of(slot) - found
        for index in self._aliases.get(slot.storage, ()):
            self._zero[index] = self._zero.get(index, _NONE) - written

    def _stays_zero(self, op: TapedOp, atom: Atom) -> bool:
        name = _name(op)
        if name in _ZEROS or name in _DIAGONAL:
            return True
        if _ATTENTION in name:
            return atom in self.zero(op.args[2])
        product = _factors(op)
        if product is not None:
            factors, added = product
            return any(atom in self.zero(s) for s in factors) and all(atom in self.zero(s) for s in added)
        operands = [s for s in op.inputs() if s.dtype.is_floating_point or s.dtype.is_complex]
        if "norm" in name and name not in _LINEAR:
            own = [s for s in operands[1:] if atom in self.atoms_of(s)]  # gamma, beta, statistics
            if not own and "batch_norm" in name:  # each channel by itself: zeros have no mean and no spread
                others = self._labels[operands[0].index]
                apart = not any(atom in self.atoms(axis) for d, axis in enumerate(others) if d != 1)
                return apart and atom in self.zero(operands[0])
            return bool(own) and all(atom in self.zero(s) for s in own)
        carrying = [s for s in operands if atom in self.atoms_of(s)]
        if name == "constant_pad_nd":
            return not op.arg(2, "value", 0) and all(atom in self.zero(s) for s in carrying)
        if name in _LINEAR:
            return bool(carrying) and all(atom in self.zero(s) for s in carrying) and _plain_writes(op, carrying)
        return self._pointwise(op, atom)

    def _pointwise(self, op: TapedOp, atom: Atom) -> bool:
        """Whether the operator gives zero, with zeros for the operands that are zero and numbers for the others."""
        pattern = tuple(("z" if atom in self.zero(s) else "r", s.dtype) for s in op.inputs())
        return any(kind == "z" for kind, _ in pattern) and _gives_zero(_Call(op, pattern))


def _plain_writes(op: TapedOp, carrying: list[Slot]) -> bool:
    """Whether all that is written comes from operands of the same units, as in ``x[i] = y`` with y of x's channels."""
    if _name(op) not in ("index_put", "_index_put_impl", "_unsafe_index_put", "scatter", "index_fill"):
        return True
    values = [s for s in op.inputs() if s.dtype == op.outs[0].dtype]
    return len(values) > 1 and all(s in carrying for s in values)


class _Call:
    """A pointwise call, hashable by what decides its result."""

    def __init__(self, op: TapedOp, pattern: tuple[tuple[str, torch.dtype], ...]) -> None:
        self.op = op
        self.key = (op.op, pattern, repr(_scalars(op.args)), repr(_scalars(op.kwargs)))
        self.pattern = pattern

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.key == other.key


def _scalars(value: Any) -> Any:
    if isinstance(value, Slot):
        return "tensor"
    if isinstance(value, (tuple, list)):
        return [_scalars(v) for v in value]
    if isinstance(value, dict):
        return {k: _scalars(v) for k, v in value.items()}
    return value


@functools.lru_cache(4096)
def _gives_zero(call: _Call) -> bool:
    op = call.op
    if torch.Tag.pointwise not in op.op.tags and op.op.is_view:
        return False
    samples = iter([_sample(kind, dtype) for kind, dtype in call.pattern])

    def fill(value: Any) -> Any:
        if isinstance(value, Slot):
            return next(samples)
        if isinstance(value, (tuple, list)):
            return type(value)(fill(v) for v in value)
        return value

    try:
        args = fill(op.args)
        kwargs = {k: fill(v) for k, v in op.kwargs.items()}
        with torch.no_grad():
            found = op.op(*args, **{k: v for k, v in kwargs.items() if k != "device"})
    except Exception:  # noqa: BLE001 - what can't be tried is not known to be zero
        return False
    first = found[0] if isinstance(found, (tuple, list)) else found
    return isinstance(first, torch.Tensor) and first.shape == (8,) and not bool(first.nan_to_num().any())


def _sample(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, or numbers of both signs."""
    if kind == "z":
        return torch.zeros(8, dtype=dtype)
    numbers = torch.tensor([-2.3, -1.0, -0.4, 0.3, 0.7, 1.0, 1.6, 2.9])
    return (numbers > 0) if dtype is torch.bool else numbers.mul(1 if dtype.is_floating_point else 3).to(dtype)
