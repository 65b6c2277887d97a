"""When an update is due, and how many weights it leaves: every schedule is a pure function of the step.

Densities are shares of N, the number of masked weights at the start. A schedule answers :class:`Targets` on update
steps and ``None`` otherwise, so a resumed run needs the step and nothing else. Step t is the t-th call of
``trainer.step()``, from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "Alternating", "Elastic", "Fixed", "Gradual", "OneShot", "Phases", "Refill", "Replace", "Schedule", "SoftBound",
    "Targets", "cosine", "cubic", "interval_for",
]  # fmt: skip


def cubic(step: int, start: int, end: int) -> float:
    """From 0 at ``start`` to 1 at ``end``, fast at first: ``1 - (1 - t)^3`` (Zhu and Gupta, arXiv 1710.01878).

    >>> [cubic(t, 0, 4) for t in (0, 1, 2, 4, 9)]
    [0.0, 0.578125, 0.875, 1.0, 1.0]
    """
    share = 1.0 if end <= start else min(max((step - start) / (end - start), 0.0), 1.0)
    return float(1 - (1 - share) ** 3)


def cosine(step: int, start: int, end: int, high: float, low: float = 0.0) -> float:
    """From ``high`` at ``start`` to ``low`` at ``end`` along half a cosine.

    >>> [round(cosine(t, 0, 4, 0.5, 0.1), 3) for t in (0, 2, 4)]
    [0.5, 0.3, 0.1]
    """
    share = 1.0 if end <= start else min(max((step - start) / (end - start), 0.0), 1.0)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))


def interval_for(total_steps: int, published: int, updates: int) -> int:
    """The published interval, or a shorter one where a short run would otherwise have fewer than ``updates`` updates.

    >>> interval_for(500, 1000, 50), interval_for(250_000, 1000, 50)
    (10, 1000)
    """
    return max(1, min(published, total_steps // updates))


@dataclass(frozen=True)
class Targets:
    """Densities of one update, in the order in which it happens.

    Attributes:
        grow: density after growth; with ``fill`` what nnz is after the update.
        drop: density left by the drop before that; 1 drops only what ``grow`` demands.
        prune: density left by a global magnitude drop before everything else, or ``None``.
        fill: share of the places still empty in the kept channels that is filled up on top.
    """

    grow: float
    drop: float = 1.0
    prune: float | None = None
    fill: float = 0.0


class Schedule(Protocol):
    """When an update is due and how many weights it leaves."""

    def at(self, step: int) -> Targets | None:
        """The targets of the update at ``step``, or ``None`` when none is due."""


@dataclass(frozen=True)
class Fixed:
    """No updates: the mask stays as it was drawn."""

    def at(self, step: int) -> Targets | None:
        """None, ever."""
        del step
        return None


@dataclass(frozen=True)
class OneShot:
    """One drop to ``density`` at ``step_of_drop`` (SNIP)."""

    density: float
    step_of_drop: int = 1

    def at(self, step: int) -> Targets | None:
        """The one drop."""
        return Targets(self.density) if step == self.step_of_drop else None


@dataclass(frozen=True)
class Replace:
    """Drop a share of the active weights that decays by a cosine from ``high`` to ``low``, and grow as many.

    With ``start = 0``, ``low = 0``: f_decay of RigL (arXiv 1911.11134).
    """

    density: float
    interval: int
    start: int
    end: int
    high: float
    low: float = 0.0

    def at(self, step: int) -> Targets | None:
        """Targets every ``interval`` steps up to ``end``, while there is a share to drop."""
        share = cosine(step, self.start, self.end, self.high, self.low)
        if step % self.interval or not self.start < step <= self.end or share <= 0:
            return None
        return Targets(self.density, drop=self.density * (1 - share))


@dataclass(frozen=True)
class SoftBound:
    """Drop to ``density``, then grow beyond it by a surplus that decays to nothing at ``end``.

    Growth to ``density + delta / 2 * (1 + cos(pi t / end))`` (Yin et al., arXiv 2305.19454, section 3.3). There is an
    update at ``end`` itself, whatever the interval, so that no surplus outlives the schedule.
    """

    density: float
    delta: float
    interval: int
    end: int

    def at(self, step: int) -> Targets | None:
        """Targets every ``interval`` steps up to ``end``, and there."""
        if step > self.end or (step % self.interval and step != self.end):
            return None
        surplus = cosine(step, 0, self.end, self.delta)
        return Targets(min(1.0, self.density + surplus), drop=self.density)


@dataclass(frozen=True)
class Gradual:
    """A density that falls along a cubic from ``initial`` to ``final``; with ``rate``, weights are replaced on the way.

    ``rate = 0`` is gradual magnitude pruning (arXiv 1710.01878). GraNet (arXiv 2106.10404) prunes globally, then drops
    a share ``rate``, decaying by a cosine, and grows as many.
    """

    initial: float
    final: float
    interval: int
    start: int
    end: int
    rate: float = 0.0

    def at(self, step: int) -> Targets | None:
        """Targets every ``interval`` steps from ``start`` to ``end``, and at both."""
        if not self.start <= step <= self.end or ((step - self.start) % self.interval and step != self.end):
            return None
        density = self.initial + (self.final - self.initial) * cubic(step, self.start, self.end)
        share = cosine(step, self.start, self.end, self.rate)
        return Targets(density, drop=density * (1 - share), prune=density if self.rate else None)


@dataclass(frozen=True)
class Elastic:
    """Drop and grow with a share that shrinks in steps (Yuan et al., "MEST", arXiv 2110.14032).

    rates: (share of the run, share of the weights) pairs: until that part of ``end``, that share is replaced. ``soft``
    grows beyond the budget and drops back to it (EM&S); otherwise it drops below and grows back (EM).
    """

    density: float
    interval: int
    end: int
    rates: tuple[tuple[float, float], ...]
    soft: bool = False

    def at(self, step: int) -> Targets | None:
        """Targets every ``interval`` steps up to ``end``, and there, where the bound has shrunk to nothing."""
        if step > self.end or (step % self.interval and step != self.end):
            return None
        rate = next((rate for until, rate in self.rates if step < until * self.end), 0.0)
        if self.soft:
            return Targets(min(1.0, self.density * (1 + rate)), drop=self.density)
        return Targets(self.density, drop=self.density * (1 - rate))


@dataclass(frozen=True)
class Alternating:
    """Dense and sparse phases in turn, dense first, sparse last (Peste et al., "AC/DC", arXiv 2106.12379)."""

    density: float
    phase: int
    warmup: int
    end: int

    def at(self, step: int) -> Targets | None:
        """Targets where a phase begins."""
        if step == self.end:
            return Targets(self.density)
        if step > self.end or step < self.warmup or (step - self.warmup) % self.phase:
            return None
        sparse = (step - self.warmup) // self.phase % 2 == 0
        return Targets(self.density if sparse else 1.0)


@dataclass(frozen=True)
class Phases:
    """One schedule after another: each is asked up to and including its last step."""

    parts: tuple[tuple[int, Schedule], ...]

    def at(self, step: int) -> Targets | None:
        """What the schedule in charge of ``step`` says."""
        return next((part.at(step) for last, part in self.parts if step <= last), None)


@dataclass(frozen=True)
class Refill:
    """Fill ``share`` of the empty places of the kept channels from ``start``, when the channel set is final, on.

    Stock hardware does not reward zeros inside a kept channel. Before ``start`` the ``base`` schedule is in charge.
    """

    base: Schedule
    density: float
    share: float
    interval: int
    start: int
    end: int

    def at(self, step: int) -> Targets | None:
        """Targets every ``interval`` steps from ``start`` to ``end``, and there."""
        if step < self.start:
            return self.base.at(step)
        if step > self.end or (step % self.interval and step != self.end):
            return None
        fill = self.share * min(1.0, (step - self.start + 1) / (self.end - self.start + 1))
        return Targets(self.density, fill=fill)
