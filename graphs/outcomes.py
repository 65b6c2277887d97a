"""What Python decides in a forward by data or by random draws, and how it is to decide.

A capture can be told how its first decisions go; each is remembered, so that another capture can try the other way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch.fx import Node

__all__ = ["Decision", "Outcomes"]


@dataclass(frozen=True)
class Decision:
    """Something that was decided.

    Attributes:
        node: its node in the graph, ``decided`` for a draw and ``check_data`` for data.
        line: the line that decides.
        place: the line of a draw; of data the part of it that asks, for a line may ask several things.
        outcome: how the forward went on.
        found: how the data or the draw decided.
        drawn: by a random draw.
        read: what the warning says of it.
    """

    node: Node
    line: str
    place: str
    outcome: bool
    found: bool
    drawn: bool
    read: str = ""


@dataclass
class Outcomes:
    """How decisions are to go: the first ones as told, the others as usual at their place.

    Attributes:
        told: outcomes in the order of the decisions.
        usual: by place; a place that is not in it yet gets the outcome of its first decision.
        free: places at which data decide as they do; None for all.
    """

    told: tuple[bool, ...] = ()
    usual: dict[str, bool] = field(default_factory=dict)
    free: Collection[str] | None = None

    def of(self, index: int, place: str, found: bool, *, drawn: bool) -> bool:
        """The outcome of decision ``index``, which lies at ``place`` and would be ``found``."""
        if index < len(self.told):
            return self.told[index]
        if not drawn and (self.free is None or place in self.free):
            return found
        return self.usual.setdefault(place, found)
