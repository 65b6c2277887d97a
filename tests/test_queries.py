"""Learned queries that are copied once for each sample: sizes that are read from the copies are sizes of the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.oracle import assert_exact, randomise


class Queries(nn.Module):
    """Cross-attention of learned queries, sequence first inside, as in DETR, Perceiver and the Set Transformer."""

    def __init__(self, copies: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.copies, self.queries = copies, nn.Parameter(torch.randn(3, 8))
        self.inner, self.out = nn.Linear(2, 8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        found: Tensor = self.attention(self.copies(self.queries, x.shape[0]), y, y, need_weights=False)[0]
        return self.out(found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "copies",
    [
        lambda q, n: q.expand(n, -1, -1),
        lambda q, n: q[None].broadcast_to((n, 3, 8)),
        lambda q, n: q.repeat(n, 1, 1),
        lambda q, n: q[None].repeat(n, 1, 1),
        lambda q, n: q.unsqueeze(0).tile(n, 1, 1),
    ],
)
def test_attention_of_copied_queries_shrinks(copies: Callable[[Tensor, int], Tensor], batch: int) -> None:
    """Whatever the batch of the example, the heads get narrower, and other batches are served."""
    torch.manual_seed(0)
    net = randomise(Queries(copies))
    slim = chase_fx.prune(net, torch.randn(batch, 5, 2).double())
    assert slim.get_parameter("attention.in_proj_weight").shape[0] < 24
    for other in (2, 3, 4):
        assert_exact(net, slim, (torch.randn(other, 6, 2).double(),))
