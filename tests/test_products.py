"""What `graphs/products.py` says of an operator is what the operator computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chase_fx.graphs.products import product_of
from chase_fx.graphs.tape import Slot, TapedOp

ATEN = torch.ops.aten
CONV = ([1], [0], [1], False, [0], 1)
TRANSPOSED = ([1], [0], [1], True, [0], 1)
Size = tuple[int, ...]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ATEN.mm.default, [(2, 3), (3, 4)]),
        (ATEN.bmm.default, [(5, 2, 3), (5, 3, 4)]),
        (ATEN.mv.default, [(2, 3), (3,)]),
        (ATEN.dot.default, [(3,), (3,)]),
        (ATEN.addmm.default, [(4,), (2, 3), (3, 4)]),
        (ATEN.addmm.default, [(2, 4), (2, 3), (3, 4)]),
        (ATEN.baddbmm.default, [(2, 4), (5, 2, 3), (5, 3, 4)]),
        (ATEN.addbmm.default, [(2, 4), (5, 2, 3), (5, 3, 4)]),
        (ATEN.addmv.default, [(2,), (2, 3), (3,)]),
        (ATEN.addr.default, [(2, 4), (2,), (4,)]),
        (ATEN.linear.default, [(5, 2, 3), (4, 3), (4,)]),
        (ATEN.linear.default, [(3,), (4, 3)]),
        (ATEN.convolution.default, [(5, 3, 7), (4, 3, 1), (4,), *CONV]),
        (ATEN.convolution.default, [(5, 3, 7), (3, 4, 1), (4,), *TRANSPOSED]),
        (ATEN._trilinear.default, [(2, 3), (6, 3, 4), (2, 4), [1, 3], [0], [1, 2], [2, 3]]),
    ],
)
def test_a_product_is_told_in_the_notation_of_einsum(op: torch._ops.OpOverload, args: list[Any]) -> None:
    tensors: dict[int, Tensor] = {}

    def slot(size: Size) -> Slot:
        tensors[len(tensors)] = torch.randn(size, dtype=torch.float64)
        return Slot(len(tensors) - 1, size, torch.float64)

    taped = tuple(slot(arg) if isinstance(arg, tuple) else arg for arg in args)
    product = product_of(TapedOp(op, taped, {}, ()))
    assert product is not None
    equation = ",".join(letters for _, letters in product.factors) + "->" + product.result
    found = torch.einsum(equation, *(tensors[s.index] for s, _ in product.factors))
    for s, letters in product.added:
        places = [found.shape[d] if c in letters else 1 for d, c in enumerate(product.result)]
        found = found + tensors[s.index].reshape(places)
    expected = op(*(tensors[arg.index] if isinstance(arg, Slot) else arg for arg in taped))
    torch.testing.assert_close(found, expected)


def test_what_is_no_product_has_none() -> None:
    assert product_of(TapedOp(ATEN.add.Tensor, (Slot(0, (2,), torch.float32),), {}, ())) is None
