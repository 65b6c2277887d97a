"""Sizes as products of a number and of sizes that may be others in another call.

Two products of the same factors are equal whatever goes in; of others it can only be seen when the graph runs.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch.fx import Graph, Node

from chase_fx.graphs.axes import Axis

__all__ = ["Read", "Size", "product"]


@dataclass(frozen=True)
class Read:
    """The dense size of a dim of a tensor, to be read where it is needed."""

    tensor: Node
    dim: int
    axis: Axis


@dataclass(frozen=True)
class Size:
    """A number times powers of factors, each with what gives its value: a node of the graph, or a dim of a tensor."""

    number: Fraction = Fraction(1)
    powers: Mapping[Hashable, int] = field(default_factory=dict)
    sources: Mapping[Hashable, Node | Read] = field(default_factory=dict)

    @staticmethod
    def of(key: Hashable, source: Node | Read) -> Size:
        """A single factor. Factors of the same key are equal."""
        return Size(powers={key: 1}, sources={key: source})

    def __mul__(self, other: Size | int) -> Size:
        if not isinstance(other, Size):
            return Size(self.number * other, self.powers, self.sources)
        return self._times(other, 1)

    def __truediv__(self, other: Size | int) -> Size:
        if not isinstance(other, Size):
            return Size(self.number / other, self.powers, self.sources)
        return self._times(other, -1)

    def _times(self, other: Size, sign: int) -> Size:
        keys = {**self.powers, **other.powers}
        powers = {k: n for k in keys if (n := self.powers.get(k, 0) + sign * other.powers.get(k, 0))}
        sources = {**other.sources, **self.sources}
        return Size(self.number * other.number**sign, powers, {k: sources[k] for k in powers})

    @property
    def whole(self) -> bool:
        """Whether it is a whole number whatever goes in."""
        return self.number.denominator == 1 and all(n > 0 for n in self.powers.values())

    def example(self) -> Fraction | None:
        """Its value in the capture, if that is known."""
        found = self.number
        for key, power in self.powers.items():
            value = _example(self.sources[key])
            if not value:
                return None
            found *= Fraction(value) ** power
        return found

    def written(self, graph: Graph, grow: Any) -> tuple[Any, Any]:
        """Its numerator and denominator as numbers or nodes, made at the graph's insertion point."""
        above, below = (
            _written(graph, grow, number, [(self.sources[k], n * sign) for k, n in self.powers.items() if n * sign > 0])
            for number, sign in ((self.number.numerator, 1), (self.number.denominator, -1))
        )
        return above, below

    def noted(self, graph: Graph, grow: Any) -> Size:
        """The same with nodes for all factors, so that it keeps no tensor alive."""
        return Size(self.number, self.powers, {k: _node(graph, grow, s) for k, s in self.sources.items()})


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    found = Size()
    for size in sizes:
        found *= size
    return found


def _example(source: Node | Read) -> Any:
    if isinstance(source, Read):
        return source.tensor.meta["slot"].shape[source.dim]
    return source.meta.get("value")


def _node(graph: Graph, grow: Any, source: Node | Read) -> Node:
    if isinstance(source, Node):
        return source
    read = graph.call_method("size", (source.tensor, source.dim))
    found: Node = grow(graph, read, (source.axis,))
    return found


def _written(graph: Graph, grow: Any, number: int, factors: list[tuple[Node | Read, int]]) -> Any:
    found: Any = number
    for source, power in factors:
        node = _node(graph, grow, source)
        for _ in range(power):
            found = (
                node if found == 1 and not isinstance(found, Node) else graph.call_function(operator.mul, (found, node))
            )
    return found
