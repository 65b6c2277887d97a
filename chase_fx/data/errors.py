"""What can go wrong with data files."""

from __future__ import annotations

from chase_fx.errors import ChaseError

__all__ = ["DataError", "DataUnavailableError"]


class DataError(ChaseError):
    """A data file is missing, damaged or of another format."""


class DataUnavailableError(DataError):
    """No source has the data set: it is neither on this machine nor to be fetched."""
