"""The options that every method shares, as types: so that each method's own signature stays short."""

from __future__ import annotations

from typing import TypedDict

from chase_fx.sparse.masks import Choice
from chase_fx.sparse.ranking import Ranking
from chase_fx.sparse.structure import ChannelsLike, Rewrite, Shrinker
from chase_fx.sparse.unit_cost import UnitCost
from chase_fx.sparse.unit_score import UnitScore

__all__ = ["Common", "Options"]


class Options(TypedDict, total=False):
    """Options that every method takes; :class:`SparseTrainer` says what they mean."""

    channel_interval: int | None
    channels_from: float
    channels_until: float | None
    channel_score: str | UnitScore
    channel_cost: str | UnitCost | None
    channel_ranking: Ranking
    round_to: int
    live_shrink: bool
    refill: float
    seed: int
    channels: ChannelsLike | None
    rewrite: Rewrite | None
    shrink: Shrinker | None
    parameters: Choice
    embeddings: bool


class Common(Options, total=False):
    """Those, and the two that Chase has defaults of its own for."""

    channel_sparsity: float
    beta: float
