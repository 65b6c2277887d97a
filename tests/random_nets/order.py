"""Blocks that put channels in another order, by an index, flips and rolls."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from tests.random_nets.parts import part

__all__ = ["ordered"]

KINDS = ("buffer", "list", "attribute", "inverse", "mask", "flip", "roll")


class Ordered(nn.Module):
    """Channels in another order, or those of a mask before the others; with a body beside or without."""

    def __init__(self, kind: str, order: list[int], body: nn.Module | None) -> None:
        super().__init__()
        self.kind, self.body, self.numbers, self.hidden = kind, body, order, torch.tensor(order)
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("mask", torch.tensor([n % 2 == order[0] % 2 for n in order]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.reordered(x)
        return y if self.body is None else y + self.body(x)

    def reordered(self, x: Tensor) -> Tensor:
        if self.kind == "flip":
            return x.flip(1)
        if self.kind == "roll":
            return x.roll(self.numbers[0], 1)
        if self.kind == "mask":
            return torch.cat([x[:, self.mask], x[:, ~self.mask]], 1)
        if self.kind == "inverse":
            return x.index_select(1, self.order.argsort())
        return x[:, {"buffer": self.order, "list": self.numbers, "attribute": self.hidden}[self.kind]]


def ordered(draw: st.DrawFn, width: int, body: nn.Module) -> nn.Module:
    """A random order of ``width`` channels; of some of them, the same order in pieces of the same length."""
    order = draw(st.permutations(range(width)))
    if draw(st.booleans()):
        rows = [n for n in range(2, width) if width % n == 0] or [width]
        row = draw(st.sampled_from(rows))
        inner = draw(st.permutations(range(row)))
        order = [start + n for start in range(0, width, row) for n in inner]
    elif draw(st.booleans()):
        first = part(draw, width)
        order = [*range(first, width), *range(first)]
    return Ordered(draw(st.sampled_from(KINDS)), order, body if draw(st.booleans()) else None)
