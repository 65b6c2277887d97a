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
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from chase_fx.graphs.axes import Atom, Axis, Cause, atoms_of
from chase_fx.graphs.products import Product, is_attention, name_of, product_of
from chase_fx.graphs.rules.base import Facts, Labels
from chase_fx.graphs.tape import Slot, TapedOp
from chase_fx.graphs.unification import Axes

__all__ = ["freeze_what_stays"]

Atoms = frozenset[Atom]
_NONE: Atoms = frozenset()

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
    _pack_padded_sequence index_fill slice_scatter select_scatter block_diag count_nonzero renorm rot90 narrow_copy
    nanmedian diagonal_scatter
"""
_LINEAR = frozenset(_KEEPING_ZERO.split())
# Operators that give a weight another shape, or a part of it.
_MOVES = frozenset(
    {"t", "numpy_T", "transpose", "permute", "view", "reshape", "_unsafe_view", "detach", "alias", "select", "slice"}
)
# Matrices whose rows and columns are the same units: zero off the diagonal.
_DIAGONAL = frozenset({"eye", "diag_embed"})
_ZEROS = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "empty_strided", "zero"})


def freeze_what_stays(
    axes: Axes, ops: list[TapedOp], labels: dict[int, Labels], facts: dict[int, Facts], weights: Iterable[int]
) -> None:
    """Freeze the units that are summed over although they do not vanish with their weights.

    Args:
        axes: where to freeze.
        ops: the tape of one capture.
        labels: the labels of its tensors by slot.
        facts: what the rules noted, by position on the tape.
        weights: the slots of the parameters. Buffers are no weights: nobody puts them to zero with a unit.
    """
    doubtful = _doubtful(ops, labels, facts)
    if not doubtful:
        return
    known = _Known(labels, weights, doubtful)
    for position, op in enumerate(ops):
        fact = facts.get(position)
        if fact is None:
            continue
        for slot, dim in fact.contracted:
            for atom in known.atoms(labels[slot.index][dim]):
                if not _vanishes(op, atom, known, fact):
                    cause = Cause(op.node, str(op.op), op.source, "its units do not vanish with their weights")
                    axes.freeze(atom, cause)
        known.run(op, fact)


def _doubtful(ops: list[TapedOp], labels: dict[int, Labels], facts: dict[int, Facts]) -> Atoms:
    """The atoms that are summed over where no factor is a weight; nets of convolutions have none of them."""
    weights: set[int] = set()  # slots of parameters, and of what only moves them
    atoms: dict[int, Axis] = {}
    for position, op in enumerate(ops):
        first = next(op.inputs(), None)
        if first is not None and name_of(op) in _MOVES and (first.kind == "parameter" or first.index in weights):
            weights.update(slot.index for slot in op.outs)
        fact = facts.get(position)
        if fact is None or not fact.contracted:
            continue
        product = product_of(op)
        told = any if product is not None else all
        terms = [slot for slot, _ in (product.factors if product is not None else fact.contracted)]
        if not told(slot.kind == "parameter" or slot.index in weights for slot in terms):
            found = (labels[slot.index][dim] for slot, dim in fact.contracted)
            atoms.update({id(axis): axis for axis in found})
    return frozenset(atom for axis in atoms.values() for atom in atoms_of(axis))


def _vanishes(op: TapedOp, atom: Atom, known: _Known, fact: Facts) -> bool:
    """Whether the term of a sum is zero that the units of ``atom`` bring in.

    Where the sum keeps a dim of these units, only what it gives for the others matters here: the diagonal does not.
    """
    product = product_of(op)
    if product is not None:
        if _by_group(atom, known, fact):
            return any(known.is_zero(slot, atom) for slot, _ in product.factors)
        return _meets_zero(product, atom, known)
    summed = [(slot, dim - len(slot.shape)) for slot, dim in fact.contracted]
    times = Counter(slot.index for slot, dim in summed if dim in known.dims(slot, atom))
    return all(
        known.is_zero(slot, atom, dim) or (times[slot.index] == 1 and known.is_diagonal(slot, atom))
        for slot, dim in summed
        if dim in known.dims(slot, atom)
    )


def _meets_zero(product: Product, atom: Atom, known: _Known) -> bool:
    """Whether along each dim that a product sums over some factor is zero where the units of ``atom`` are."""
    summed: dict[str, list[bool]] = {}
    for slot, letters in product.factors:
        dims = [d for d in known.dims(slot, atom) if letters[d] not in product.result]
        for d in dims:
            zero = known.is_zero(slot, atom, d) or (len(dims) == 1 and known.is_diagonal(slot, atom))
            summed.setdefault(letters[d], []).append(zero)
    return bool(summed) and all(map(any, summed.values()))


def _by_group(atom: Atom, known: _Known, fact: Facts) -> bool:
    """Whether an atom is the groups of a convolution: what it sums over for a group goes to that group alone."""
    groups = fact.notes.get("groups")
    return groups is not None and atom in known.atoms(groups)


class _Known:
    """For each tensor, the atoms whose units are zero in it; atoms that nobody doubts are left out.

    A tensor that has an atom along several dims may be zero along some of them: ``sigmoid(y)[:, None] * y`` is zero in
    a removed column, not in a removed row. Where it has two, it may be diagonal: zero where a removed unit is along one
    of them and a kept one along the other.
    """

    def __init__(self, labels: dict[int, Labels], weights: Iterable[int], doubtful: Atoms) -> None:
        self._labels = labels
        self._diagonal: dict[int, Atoms] = {}
        self._doubtful = doubtful
        self._atoms: dict[int, tuple[Axis, Atoms]] = {}
        self._of_slot: dict[int, Atoms] = {}
        self._aliases: dict[int, list[int]] = {}
        self._zero: dict[int, frozenset[tuple[Atom, int]]] = {}
        for index in weights:
            dims = enumerate(labels.get(index, ()), -len(labels.get(index, ())))
            self._zero[index] = frozenset((atom, d) for d, axis in dims for atom in self.atoms(axis))

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

    def dims(self, slot: Slot, atom: Atom) -> list[int]:
        """The dims of a tensor that have an atom, counted from the last one."""
        axes = self._labels.get(slot.index, ())
        return [d - len(axes) for d, axis in enumerate(axes) if atom in self.atoms(axis)]

    def is_zero(self, slot: Slot, atom: Atom, dim: int | None = None) -> bool:
        """Whether the units of an atom are zero in a tensor, along one of its dims or every dim that has them."""
        zero = self._zero.get(slot.index, frozenset())
        dims = self.dims(slot, atom) if dim is None else [dim]
        return bool(dims) and all((atom, d) in zero for d in dims)

    def is_diagonal(self, slot: Slot, atom: Atom) -> bool:
        """Whether a tensor that has an atom along two dims is zero but for places with the same unit along both."""
        return atom in self._diagonal.get(slot.index, _NONE)

    def run(self, op: TapedOp, fact: Facts) -> None:
        """Note what an operator gives."""
        for slot in op.outs:
            atoms = self.atoms_of(slot)
            zero = frozenset((atom, d) for atom in atoms for d in self._zero_dims(op, atom, slot, fact))
            diagonal = frozenset(atom for atom in atoms if self._stays_diagonal(op, atom, slot))
            if op.op._schema.is_mutable:
                written = {atom for atom in atoms if any((atom, d) not in zero for d in self.dims(slot, atom))}
                self._write(slot, frozenset(written), diagonal)
            self._zero[slot.index], self._diagonal[slot.index] = zero, diagonal
            self._aliases.setdefault(slot.storage, []).append(slot.index)

    def _write(self, slot: Slot, written: Atoms, diagonal: Atoms) -> None:
        """What was written to may be seen through other views too."""
        for index in self._aliases.get(slot.storage, ()):
            zero = self._zero.get(index, frozenset())
            self._zero[index] = frozenset(pair for pair in zero if pair[0] not in written)
            self._diagonal[index] = self._diagonal.get(index, _NONE) - (written - diagonal)

    def _zero_dims(self, op: TapedOp, atom: Atom, out: Slot, fact: Facts) -> list[int]:
        """The dims of a result along which the units of an atom are zero."""
        dims = self.dims(out, atom)
        product = product_of(op)
        if product is not None and not is_attention(op):
            return [d for d in dims if self._product_is_zero(product, atom, d, fact)]
        if name_of(op) == "_weight_norm_interface":  # the first operand times a factor for each slice; norms of slices
            factors = op.args[: 2 if out is op.outs[0] else 1]
            return [d for d in dims if any(self.is_zero(s, atom, d) for s in factors)]
        whole = self._stays_zero(op, atom, out, dims)
        if whole is not None:
            return dims if whole else []
        return [d for d in dims if self._pointwise(op, atom, d, self.is_zero)]

    def _stays_zero(self, op: TapedOp, atom: Atom, out: Slot, dims: list[int]) -> bool | None:
        """Whether a result is zero along every dim; None if that has to be seen for each dim."""
        name = name_of(op)
        if name in _ZEROS:
            return True
        if is_attention(op):
            return out is op.outs[0] and self._cover([op.args[2]], atom, dims)
        operands = [s for s in op.inputs() if s.dtype.is_floating_point or s.dtype.is_complex]
        if "norm" in name and name not in _LINEAR:
            own = [s for s in operands[1:] if s.kind != "buffer" and atom in self.atoms_of(s)]  # gamma, beta
            if not own and "batch_norm" in name:  # each channel by itself: zeros have no mean and no spread
                others = self._labels[operands[0].index]
                apart = not any(atom in self.atoms(axis) for d, axis in enumerate(others) if d != 1)
                kept = any(s.kind == "buffer" for s in operands[1:])  # statistics: zeros do not have them
                return apart and not kept and self.is_zero(operands[0], atom)
            return out is op.outs[0] and self._cover(own, atom, dims)
        carrying = [s for s in operands if atom in self.atoms_of(s)]
        if name == "constant_pad_nd":
            return not op.arg(2, "value", 0) and all(self.is_zero(s, atom) for s in carrying)
        if name == "diag_embed":
            return all(self.is_zero(s, atom) for s in carrying)
        if name in _LINEAR:
            return self._cover(carrying, atom, dims) and _plain_writes(op, carrying)
        return None

    def _cover(self, slots: list[Slot], atom: Atom, dims: list[int]) -> bool:
        """Whether tensors are zero, and have an atom along as many dims as what is made of them."""
        return bool(slots) and all(self.is_zero(s, atom) and len(self.dims(s, atom)) >= len(dims) for s in slots)

    def _product_is_zero(self, product: Product, atom: Atom, dim: int, fact: Facts) -> bool:
        """Whether a product is zero along a dim: a factor is, or a diagonal one whose other units meet zeros."""
        by_group = _by_group(atom, self, fact)

        def zero_along(letter: str, slots: Iterable[tuple[Slot, str]]) -> list[bool]:
            letters = [(s, term.replace("i", "o") if by_group else term) for s, term in slots]
            return [
                any(term[d] == letter and self.is_zero(s, atom, d) for d in self.dims(s, atom)) for s, term in letters
            ]

        wanted = product.result[dim]
        if not all(zero_along(wanted, product.added)):
            return False
        if any(zero_along(wanted, product.factors)):
            return True
        for slot, letters in product.factors:
            met = [letters[d] for d in self.dims(slot, atom)]
            others = [factor for factor in product.factors if factor[0] is not slot]
            if self.is_diagonal(slot, atom) and wanted in met:
                summed = [letter for letter in met if letter not in product.result]
                if any(any(zero_along(letter, others)) for letter in summed):
                    return True
        return False

    def _stays_diagonal(self, op: TapedOp, atom: Atom, out: Slot) -> bool:
        dims = self.dims(out, atom)
        if len(dims) != 2:
            return False
        if name_of(op) in _DIAGONAL:
            return True
        if op.op.is_view:
            return all(self.is_diagonal(s, atom) for s in op.inputs())
        return name_of(op) not in _LINEAR and all(self._pointwise(op, atom, d, self._is_zero_apart) for d in dims)

    def _is_zero_apart(self, slot: Slot, atom: Atom, dim: int) -> bool:
        return self.is_zero(slot, atom, dim) or self.is_diagonal(slot, atom)

    def _pointwise(self, op: TapedOp, atom: Atom, dim: int, is_zero: Callable[[Slot, Atom, int], bool]) -> bool:
        """Whether the operator gives zero, with zeros for the operands that are zero and numbers for the others.

        An operand that has the units along another dim than ``dim`` only has a number for each of them there.
        """
        zeros = [is_zero(s, atom, dim) for s in op.inputs()]
        pattern = tuple(("z" if zero else "r", s.dtype) for zero, s in zip(zeros, op.inputs(), strict=True))
        return any(zeros) and _gives_zero(_Call(op, pattern))


def _plain_writes(op: TapedOp, carrying: list[Slot]) -> bool:
    """Whether all that is written comes from operands of the same units, as in ``x[i] = y`` with y of x's channels."""
    if name_of(op) not in ("index_put", "_index_put_impl", "_unsafe_index_put", "scatter", "index_fill"):
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
