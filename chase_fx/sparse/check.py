"""Checks of arguments, with messages that say what would be right."""

from __future__ import annotations

from collections.abc import Collection

from chase_fx.errors import ArgumentError

__all__ = ["check_choice", "check_count", "check_order", "check_share"]


def check_share(name: str, value: float, *, closed: bool = False) -> None:
    """Raise ArgumentError unless ``value`` is in [0, 1), or in [0, 1] where ``closed``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{name}={value!r} is no number; it is a share, so 0.9 means 90 %")
    good = 0 <= value <= 1 if closed else 0 <= value < 1
    if not good:
        msg = f"{name}={value} is outside [0, 1{']' if closed else ')'}; it is a share, so 0.9 means 90 %"
        raise ArgumentError(msg)


def check_count(name: str, value: int | None) -> None:
    """Raise ArgumentError unless ``value`` is a whole number of at least 1, or ``None`` (a default)."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1):
        raise ArgumentError(f"{name}={value!r} must be a whole number of at least 1")
    if value is not None and (value != int(value) or value <= 0):
        msg = f"{name}={value} must be a whole number of at least 1"
        raise ArgumentError(msg)


def check_order(first: str, a: float, second: str, b: float) -> None:
    """Raise ArgumentError unless ``a`` is at most ``b``, both shares of the run."""
    check_share(first, a, closed=True)
    check_share(second, b, closed=True)
    if a > b:
        msg = f"{first}={a} comes after {second}={b}; both are shares of the run, the first must not exceed the second"
        raise ArgumentError(msg)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ArgumentError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(f"unknown {name} {value!r}: expected one of {sorted(choices)}")
