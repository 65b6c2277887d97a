"""Which units of each group stay: scores, floors and rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

from chase_fx.errors import ArgumentError, NothingToPruneError
from chase_fx.graphs.axes import Atom, Axis, Cat, Picked, Prod, atoms_of, resolve
from chase_fx.graphs.magnitude import Magnitude

if TYPE_CHECKING:
    from chase_fx.graphs.channels import ChannelGraph, Group

__all__ = ["Score", "choose", "widths"]

Score = str | Callable[["Group"], torch.Tensor]
# For each atom, the other atoms of every product that it is a factor of.
_Partners = Mapping[Atom, list[tuple[Atom, ...]]]

# Whole groups of a convolution go, not channels within them, where that is nearer to what is asked for by more than:
_NEARER = 0.05


def choose(
    channels: ChannelGraph, channel_sparsity: Any, score: Score, round_to: Any, scope: str
) -> dict[str, torch.Tensor]:
    """Group name -> (size,) bool of the units that stay. The numbers may be NumPy's."""
    if isinstance(channel_sparsity, bool) or not isinstance(channel_sparsity, Real):
        raise ArgumentError(f"channel_sparsity must be a number in [0, 1), found {channel_sparsity!r}")
    if not 0 <= float(channel_sparsity) < 1:
        raise ArgumentError(f"channel_sparsity must be in [0, 1) (the share that is removed), found {channel_sparsity}")
    if isinstance(round_to, bool) or not isinstance(round_to, Integral) or round_to < 1:
        raise ArgumentError(f"round_to must be a positive integer, found {round_to!r}")
    if scope not in ("group", "global"):
        raise ArgumentError(f"scope must be 'group' or 'global', found {scope!r}")
    if not channels.groups:
        reasons = list(dict.fromkeys(channels.frozen.values()))[:3]
        raise NothingToPruneError(f"every channel is frozen, so nothing can be pruned: {'; '.join(reasons)}")
    if channel_sparsity == 0:
        return {}
    counts = widths(channels, 1 - float(channel_sparsity), int(round_to))
    if score == "magnitude":
        score = Magnitude(channels)
    scores = {group.name: _score(group, score) for group in channels.groups}
    if scope == "global":
        counts = _global_counts(channels, counts, scores)
    kept = {}
    for group in channels.groups:
        # A stable sort on descending scores keeps the lowest index among equals.
        order = torch.sort(scores[group.name], descending=True, stable=True).indices
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[order[: counts[group.name]]] = True
        kept[group.name] = mask
    return kept


def widths(channels: ChannelGraph, density: float, round_to: int = 1) -> dict[str, int]:
    """How many units of each group stay when every coupled axis keeps about ``density`` of its indices.

    In a product (heads x head_dim, groups x channels in a group) one factor gives way first, and the others only make
    up for what its rounding left: both at ``density`` would keep its square.
    """
    partners = _products(channels)
    ways = [(narrow, whole) for narrow in (True, False) for whole in ((True, False) if round_to > 1 else (True,))]
    found = [  # channels within groups can be too few to come near the density, where whole groups do
        _by_turns(channels.groups, partners, density, round_to, narrow=narrow, whole=whole)
        for narrow, whole in (ways if any(map(_goes_last, partners)) else ways[:1])
    ]
    counts = dict(found[0])
    for atoms in _connected(partners) if len(found) > 1 else ():
        if any(map(_goes_last, atoms)):
            costs = [_cost(atoms, partners, other, density, round_to) for other in found]
            best = 0
            for k, cost in enumerate(costs):
                best = k if cost + _NEARER < costs[best] else best
            counts.update({atom: found[best][atom] for atom in atoms})
    return {group.name: counts[group.atom] for group in channels.groups}


def _by_turns(
    groups: Sequence[Group], partners: _Partners, density: float, round_to: int, *, narrow: bool, whole: bool
) -> dict[Atom, int]:
    """Every group in its turn; with ``narrow`` the groups of convolutions go only as far as what is in them can't.

    A factor that is too narrow for ``round_to`` stays ``whole``, or else does its part and leaves the rest to others.
    """
    counts: dict[Atom, int] = {}

    def share(atom: Atom) -> float:
        return counts.get(atom, atom.size) / atom.size

    def lowest(atom: Atom) -> float:
        return share(atom) if atom in counts else max(atom.least, atom.multiple) / atom.size

    order = sorted((group.atom for group in groups), key=lambda atom: _turn(atom, narrow=narrow))
    last = [atom for atom in order if narrow and _goes_last(atom)]
    # These have a second turn, when it is known how far the channels within them went.
    for atom in (*order, *last):
        contexts = partners.get(atom) or [()]
        alone = () in contexts
        need = density if alone else 0.0
        if atom in last and not alone:
            need = min(density / math.prod(map(lowest, others)) for others in contexts)
        for others in contexts:
            need = max(need, density / math.prod(map(share, others)))
        ideal = atom.size * min(need, 1.0)
        keep = max(atom.least, math.floor(ideal + 0.5))
        multiple = atom.multiple
        for others in _rounded(atom, contexts, round_to):
            rest = math.prod(counts.get(o, o.size) for o in others) or 1
            wanted = round_to // math.gcd(round_to, rest)
            if not whole and wanted > atom.size:
                wanted = max(d for d in range(1, atom.size + 1) if wanted % d == 0)
            multiple = math.lcm(multiple, wanted)
        if multiple > 1:
            keep = max(math.ceil(atom.least / multiple), 1, round(ideal / multiple)) * multiple
        counts[atom] = min(atom.size, keep)
    return counts


def _turn(atom: Atom, *, narrow: bool) -> tuple[bool, bool, bool, int]:
    """When an atom's turn is among the factors of a product: those with the lowest value give way first.

    Heads go whole. Groups of a convolution only go as far as the channels within them can't: with half of these, both
    sides are narrower and a quarter of the weights is left; half of the groups would leave half.
    """
    whole = atom.carrier or (atom.grouping and not narrow)
    return atom.weak, not whole, not atom.grouping, -atom.size


def _goes_last(atom: Atom) -> bool:
    """Whether it is the groups of a convolution; heads go whole, also where they are its groups."""
    return atom.grouping and not atom.carrier


def _rounded(atom: Atom, contexts: Sequence[tuple[Atom, ...]], round_to: int) -> list[tuple[Atom, ...]]:
    """The products whose width has to be a multiple of ``round_to``.

    What has one index for each head, or for each channel within a narrow group, is no width.
    """
    alone = not any(contexts) or (atom.size >= round_to and not atom.carrier)
    return [others for others in contexts if others or alone]


def _connected(partners: _Partners) -> list[list[Atom]]:
    """Atoms that are factors of one product, or of several that share a factor."""
    found: dict[Atom, list[Atom]] = {}
    for atom, contexts in partners.items():
        for other in (atom, *(o for others in contexts for o in others)):
            mine, its = found.setdefault(atom, [atom]), found.setdefault(other, [other])
            if mine is not its:
                mine, its = (mine, its) if len(mine) >= len(its) else (its, mine)
                mine.extend(its)
                found.update(dict.fromkeys(its, mine))
    return list({id(atoms): atoms for atoms in found.values()}.values())


def _cost(
    atoms: Sequence[Atom], partners: _Partners, counts: Mapping[Atom, int], density: float, round_to: int
) -> float:
    """How far axes of channels are from ``density``, in the mean, and how many of them are not rounded."""
    total, axes = 0.0, 0
    for atom in atoms:
        within = not atom.grouping and any(o.grouping for others in partners[atom] for o in others)
        for others in partners[atom]:
            if within and not others:  # the channels within one group, as the weight has them
                continue
            factors = (atom, *others)
            size, kept = math.prod(f.size for f in factors), math.prod(counts[f] for f in factors)
            total += abs(kept / size - density) + (size >= round_to and kept < size and kept % round_to > 0)
            axes += 1
    return total / max(axes, 1)


def _products(channels: ChannelGraph) -> _Partners:
    """For each atom, the other live atoms of every product that it is a factor of (empty: it also stands alone)."""
    found: dict[Atom, dict[tuple[Atom, ...], None]] = {}

    seen: set[tuple[Axis, tuple[Atom, ...]]] = set()

    def visit(given: Axis, outer: tuple[Atom, ...]) -> None:
        axis = resolve(given)
        if (axis, outer) in seen:  # tensors of one layer share their axes
            return
        seen.add((axis, outer))
        if isinstance(axis, Atom):
            found.setdefault(axis, {})[outer] = None
        elif isinstance(axis, Cat):
            for part in axis.parts:
                visit(part, outer)
        elif isinstance(axis, Picked):
            visit(axis.base, outer)
        elif isinstance(axis, Prod):
            for i, factor in enumerate(axis.factors):
                others = [f for j, f in enumerate(axis.factors) if j != i]
                # A factor that is itself a concatenation stands for the first of its atoms.
                atoms = [inner[0] for f in others if (inner := atoms_of(f))]
                visit(factor, (*outer, *atoms))

    for name, labels in channels.labelling.state.items():
        if name not in channels.info.aliases:
            for axis in labels:
                visit(axis, ())
    return {atom: list(contexts) for atom, contexts in found.items()}


def _score(group: Group, score: Score) -> torch.Tensor:
    if callable(score):
        values = _as_scores(group, score(group))
        if values.shape != (group.size,):
            raise ArgumentError(
                f"the score of {group.name!r} must have shape ({group.size},), found {tuple(values.shape)}"
            )
        if torch.isnan(values).any():
            raise ArgumentError(f"the score of {group.name!r} holds NaN")
        return values
    if score == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.rand(group.size, generator=generator, dtype=torch.float64)
    raise ArgumentError(f"unknown score {score!r}; choose 'magnitude', 'random' or a function of a group")


def _as_scores(group: Group, given: object) -> torch.Tensor:
    wrong = f"the score of {group.name!r} must be ({group.size},) real numbers, found"
    try:
        values = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ArgumentError(f"{wrong} {type(given).__name__}: {e}") from e
    if values.is_complex() or values.is_meta:
        raise ArgumentError(f"{wrong} {'complex ones' if values.is_complex() else 'a meta tensor, which holds none'}")
    return values.to_dense().to("cpu", torch.float64)


def _global_counts(channels: ChannelGraph, counts: dict[str, int], scores: dict[str, torch.Tensor]) -> dict[str, int]:
    """Spend the same total over all groups by rank; no group falls below a tenth of its share, nor below one unit."""
    floors = {g.name: max(g.atom.least, math.ceil(0.1 * counts[g.name])) for g in channels.groups}
    left = sum(counts.values()) - sum(floors.values())
    ranked = []
    for i, group in enumerate(channels.groups):
        values = torch.sort(scores[group.name], descending=True, stable=True).values.tolist()
        ranked += [(-v, i, k) for k, v in enumerate(values) if k >= floors[group.name]]
    out = dict(floors)
    for _, i, _ in sorted(ranked)[:left]:
        out[channels.groups[i].name] += 1
    for group in channels.groups:
        multiple = group.atom.multiple
        out[group.name] = min(group.size, -(-out[group.name] // multiple) * multiple)
    return out
