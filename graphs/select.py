"""Which units of each group stay: scores, floors and rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    share: dict[Atom, float] = {}
    counts: dict[str, int] = {}
    order = sorted(channels.groups, key=_turn)
    # Groups of a convolution have a second turn, when it is known how far the channels within them went.
    for group in (*order, *(group for group in order if group.atom.grouping)):
        contexts = partners.get(group.atom, [])
        alone = len(contexts) == 0 or any(not others for others in contexts)
        need = density if alone else 0.0
        if group.atom.grouping and not alone:
            need = min(density / math.prod(share.get(o, o.least / o.size) for o in others) for others in contexts)
        for others in contexts:
            need = max(need, density / math.prod(share.get(o, 1.0) for o in others))
        need = min(need, 1.0)
        keep = max(group.atom.least, min(group.size, math.floor(group.size * need + 0.5)))
        multiple = round_to
        for others in contexts:
            multiple = round_to // math.gcd(round_to, math.prod(_kept(o, share) for o in others) or 1)
        multiple = math.lcm(multiple, group.atom.multiple)
        if multiple > 1:
            least = max(1, math.ceil(group.atom.least / multiple))
            keep = min(group.size, max(least, round(keep / multiple)) * multiple)
        counts[group.name] = keep
        share[group.atom] = keep / group.size
    return counts


def _turn(group: Group) -> tuple[bool, bool, bool, int]:
    """When a group's turn is among the factors of a product: those with the lowest value give way first.

    Heads go whole. Groups of a convolution only go as far as the channels within them can't: with half of these, both
    sides are narrower and a quarter of the weights is left; half of the groups would leave half.
    """
    atom = group.atom
    return atom.weak, not atom.carrier, not atom.grouping, -group.size


def _kept(atom: Atom, share: dict[Atom, float]) -> int:
    return round(atom.size * share.get(atom, 1.0))


def _products(channels: ChannelGraph) -> dict[Atom, list[tuple[Atom, ...]]]:
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
