"""Which units go next: the lowest scores of all groups together, above floors, in exact numbers.

Channels are counted along the axes of the tensors. Most axes belong to one group, and a unit is a channel. Some are
products: an axis of heads x head_dim belongs to two groups, and a channel stays iff both its units do. Such an axis
counts as one product, kept heads times kept dims, and a head costs as many channels as there are dims left. So a share
of 50 % means half of that *axis*: were the units counted instead, half the heads and half the dims would go, three
quarters of the axis.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from chase_fx.sparse.structure import GroupLike

__all__ = ["RANKINGS", "ChannelCount", "Ranking", "choose", "comparable"]

Ranking = Literal["global", "normalised", "group", "coupled"]
"""How scores of different groups compare; see :func:`comparable`."""
RANKINGS: tuple[str, ...] = get_args(Ranking)


def comparable(scores: Tensor, kept: Tensor, first: int, ranking: Ranking, producers: int = 1) -> Tensor:
    """Scores of one group in a form that ranks it against the others.

    ``"global"``: as they are. ``"normalised"``: over the mean of the units left, so that a group of small weights does
    not lose everything. ``"group"``: the share of the group that is gone once the unit and all below it are, so that
    every group loses the same share, lowest scores first. ``"coupled"``: as that, but a group that k layers write to
    (a residual stream) keeps the share ``r ** (1 / sqrt(k))`` where one of a single layer keeps ``r``: all that its
    layers hand on has to fit into it, while what goes inside a block is missing in that block alone.

    Args:
        scores: Tensor (size,), float64.
        kept: BoolTensor (size,), the units left.
        first: units of the group when training began.
        ranking: one of the above.
        producers: how many weights produce the group's units.

    >>> scores, kept = torch.tensor([4.0, 1.0, 3.0]), torch.tensor([True, True, True])
    >>> comparable(scores, kept, 4, "normalised").tolist(), comparable(scores, kept, 4, "group").tolist()
    ([1.5, 0.375, 1.125], [1.0, 0.5, 0.75])
    >>> comparable(scores, kept, 4, "coupled", producers=4).tolist()
    [1.0, 0.75, 0.9375]
    """
    if ranking == "global":
        return scores
    left = kept.nonzero().squeeze(1)
    if ranking == "normalised":
        mean = scores[left].mean() if len(left) else scores.new_ones(())
        return scores / mean if mean else scores
    order = left[torch.sort(torch.where(scores.isnan(), -math.inf, scores)[left], stable=True).indices]
    gone = torch.zeros_like(scores)
    gone[order] = (torch.arange(1, len(left) + 1, dtype=scores.dtype) + (first - len(left))) / first
    return gone if ranking == "group" else 1 - (1 - gone) ** math.sqrt(producers)


@dataclass(frozen=True)
class ChannelCount:
    """How many channels a choice of units stands for.

    Attributes:
        terms: sets of groups whose units multiply along some axis; a group without partner is a term of its own.
    """

    terms: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, groups: Sequence[GroupLike]) -> ChannelCount:
        """The terms of ``groups``: groups are partners where they share an index of an axis.

        Groups that lie side by side on an axis (a concatenation) are no partners.
        """
        on_axis: dict[tuple[str, int], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for group in groups:
            for member in group.members:
                on_axis[member.tensor, member.dim][group.name].update(member.positions.reshape(-1).tolist())
        products: dict[tuple[str, ...], None] = {}
        for owners in on_axis.values():
            if len(owners) > 1 and sum(map(len, owners.values())) > len(set().union(*owners.values())):
                for a, b in combinations(owners, 2):
                    if owners[a] & owners[b]:
                        products[tuple(sorted((a, b)))] = None
        partnered = {name for term in products for name in term}
        alone = [(group.name,) for group in groups if group.name not in partnered]
        return cls((*alone, *products))

    def total(self, units: Mapping[str, int]) -> int:
        """Channels, where group ``name`` has ``units[name]`` units."""
        return sum(math.prod(units[name] for name in term) for term in self.terms)

    def partners(self) -> dict[str, list[tuple[str, ...]]]:
        """Per group and term the other groups: one unit stands for the product of their units, summed over terms."""
        result: dict[str, list[tuple[str, ...]]] = {}
        for term in self.terms:
            for name in term:
                result.setdefault(name, []).append(tuple(other for other in term if other != name))
        return result


def choose(
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    floors: Mapping[str, int],
    count: ChannelCount,
    *,
    quota: int,
    multiples: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The units to remove now: lowest scores first, at most ``quota`` channels.

    A group at its floor gives nothing, and what it may not give is taken from the next lowest scores elsewhere. One
    pass over a finite list, so floors that cannot be met end it instead of stalling it. A group gives its lowest units
    in blocks that leave a multiple of what it is brought to, ranked by their mean score.

    Args:
        scores: per group Tensor (size,), float64.
        kept: per group BoolTensor (size,) of the units left.
        floors: per group the units that must stay.
        count: how units count as channels.
        quota: channels to remove.
        multiples: per group what the number of units that stay is brought to a multiple of; 1 for a group not in it.

    Returns:
        Per group the LongTensor of units to remove, ascending; groups that give nothing are left out.
    """
    units = {name: int(mask.count_nonzero()) for name, mask in kept.items()}
    partners = count.partners()
    blocks: list[tuple[float, int, str, list[int]]] = []
    for order, (name, mask) in enumerate(kept.items()):
        left = mask.nonzero().squeeze(1)
        ranked = left[torch.sort(scores[name][left], stable=True).indices]
        step = multiples.get(name, 1)
        values, first = scores[name][ranked].tolist(), len(ranked) % step or step
        bounds = [0, *range(first, len(ranked) + 1, step)]
        for start, end in pairwise(bounds):
            mean = values[start] if end == start + 1 else math.fsum(values[start:end]) / (end - start)
            blocks.append((-math.inf if math.isnan(mean) else mean, order, name, ranked[start:end].tolist()))
    blocks.sort(key=lambda block: (block[0], block[1]))
    removed: dict[str, list[int]] = {}
    closed: set[str] = set()
    for _, _, name, block in blocks:
        if quota <= 0:
            break
        rest = units[name] - len(block)
        price = len(block) * sum(math.prod(units[other] for other in others) for others in partners[name])
        if name in closed or rest < max(1, floors[name]) or price > quota:
            closed.add(name)  # its later blocks score higher, so they wait for another event
            continue
        units[name] = rest
        quota -= price
        removed.setdefault(name, []).extend(block)
    return {name: torch.tensor(sorted(indices)) for name, indices in removed.items()}
