"""Operators that are products summed over dims, each in the notation of ``einsum``: which dims reach the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chase_fx.graphs.tape import Slot, TapedOp

__all__ = ["Product", "is_attention", "name_of", "product_of"]

# A letter for each dim of the factors and of the result; the argument positions of the factors, and of what is added.
_PRODUCTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "mm": ("mk,kn->mn", (0, 1), ()),
    "bmm": ("bmk,bkn->bmn", (0, 1), ()),
    "mv": ("mk,k->m", (0, 1), ()),
    "dot": ("k,k->", (0, 1), ()),
    "vdot": ("k,k->", (0, 1), ()),
    "addmm": ("mk,kn->mn", (1, 2), (0,)),
    "baddbmm": ("bmk,bkn->bmn", (1, 2), (0,)),
    "addbmm": ("bmk,bkn->mn", (1, 2), (0,)),
    "addmv": ("mk,k->m", (1, 2), (0,)),
    "addr": ("m,n->mn", (1, 2), (0,)),
    "_grouped_mm": ("mk,gkn->mn", (0, 1), (3,)),
}
_ATTENTION = "scaled_dot_product"  # in the name of every kernel of it


@dataclass(frozen=True)
class Product:
    """A product of tensors, plus others.

    Attributes:
        factors: the tensors that are multiplied, each with a letter for every dim.
        result: the letters of the result; the dims of a factor with other letters are summed over.
        added: the tensors added to the product, each with a letter for every dim.
    """

    factors: tuple[tuple[Slot, str], ...]
    result: str
    added: tuple[tuple[Slot, str], ...] = ()


def name_of(op: TapedOp) -> str:
    """The name of an operator, the same for its in-place form: ``"add"``."""
    return str(op.op._schema.name).rpartition("::")[2].rstrip("_")


def is_attention(op: TapedOp) -> bool:
    """Whether an operator is scaled dot-product attention: values, weighted by a product."""
    return _ATTENTION in name_of(op)


def product_of(op: TapedOp) -> Product | None:
    """The product that an operator is, if it is one. Attention counts as that of its queries and keys."""
    if is_attention(op):
        query, key = op.args[:2]
        batch = _capitals(len(query.shape) - 2)
        return Product(((query, batch + "qe"), (key, batch + "ke")), batch + "qk")
    name = name_of(op)
    if name in ("convolution", "_convolution"):
        return _convolution(op)
    if name == "linear":
        return _linear(op)
    if name == "_trilinear":
        return _trilinear(op)
    known = _PRODUCTS.get(name)
    if known is None:
        return None
    letters, factors, added = known
    terms, _, result = letters.partition("->")
    slots = [op.args[i] for i in factors]
    return _product(list(zip(slots, terms.split(","), strict=True)), result, [op.arg(i, "bias") for i in added])


def _product(factors: list[tuple[Slot, str]], result: str, added: Sequence[Any]) -> Product:
    """What is added is broadcast to the last dims of the result."""
    slots = [slot for slot in added if isinstance(slot, Slot)]
    return Product(tuple(factors), result, tuple((s, result[len(result) - len(s.shape) :]) for s in slots))


def _linear(op: TapedOp) -> Product:
    x, w = op.arg(0, "input"), op.arg(1, "weight")
    rows, outer = _capitals(len(x.shape) - 1), "o" * (len(w.shape) - 1)
    return _product([(x, rows + "i"), (w, outer + "i")], rows + outer, [op.arg(2, "bias")])


def _convolution(op: TapedOp) -> Product:
    """``convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)``: see its rule."""
    x, w, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    spatial = len(w.shape) - 2
    batch, space = _capitals(len(x.shape) - spatial - 1), "xyz"[:spatial]
    filters = ("io" if op.arg(6, "transposed", False) else "oi") + "uvw"[:spatial]
    added = ((bias, "o"),) if isinstance(bias, Slot) else ()
    return Product(((x, batch + "i" + space), (w, filters)), batch + "o" + space, added)


def _trilinear(op: TapedOp) -> Product:
    """``_trilinear(a, b, c, expand_a, expand_b, expand_c, sumdim)``: operands get dims of size 1 at ``expand``."""
    operands = [op.arg(i, f"i{i + 1}") for i in range(3)]
    expand = [{int(d) for d in op.arg(i + 3, f"expand{i + 1}")} for i in range(3)]
    letters = _capitals(len(operands[0].shape) + len(expand[0]))
    summed = {int(d) for d in op.arg(6, "sumdim")}
    terms = ["".join(c for d, c in enumerate(letters) if d not in gone) for gone in (*expand, summed)]
    return Product(tuple(zip(operands, terms[:3], strict=True)), terms[3])


def _capitals(number: int) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:number]
