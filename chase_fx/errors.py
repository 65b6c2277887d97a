"""Every error that Chase-FX raises on purpose.

Each message says what went wrong, where, what was expected against what was found, and what to do about it. Catch
:class:`ChaseError` to catch them all.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CaptureError",
    "ChaseError",
    "CheckpointError",
    "DeviceMismatchError",
    "GraphvizMissingError",
    "NothingToPruneError",
    "OptimizerMismatchError",
    "OtherPathError",
    "OtherSizeError",
    "PlanMismatchError",
    "RewriteError",
    "UnsupportedOpError",
    "VerificationError",
]


class ChaseError(Exception):
    """Base class of every error of Chase-FX."""


class ArgumentError(ChaseError, ValueError):
    """An argument has a value that no call could honour (``channel_sparsity=1.5``, an unknown score...)."""


class CaptureError(ChaseError):
    """The model could not be captured; the model's own exception, if there is one, is the ``__cause__``."""


class DeviceMismatchError(CaptureError):
    """The model and its example inputs are on different devices."""


class OtherPathError(ChaseError):
    """A graph was called with inputs for which the model's Python code takes another path than the captured one.

    Its arguments are the message and the line that decides (an exception with an ``__init__`` does not compile).
    """

    @property
    def where(self) -> str:
        """The line that decides."""
        return str(self.args[1]) if len(self.args) > 1 else ""

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0]) if self.args else ""


class OtherSizeError(OtherPathError):
    """The sizes of the inputs decide otherwise, and the graph for them could not be had either."""


class GraphvizMissingError(ChaseError):
    """Graphviz' ``dot`` program is not installed, so no SVG can be drawn."""


class UnsupportedOpError(ChaseError):
    """An operator has no channel rule and the caller asked to stop there instead of freezing its channels."""


class NothingToPruneError(ChaseError):
    """The model has no parameters, or every channel of it is frozen."""


class PlanMismatchError(ChaseError):
    """A plan was made for another structure than the one it is applied to."""


class RewriteError(ChaseError):
    """The rewrite met a node whose sizes it cannot replace."""


class VerificationError(ChaseError):
    """The slim graph differs from the masked dense graph.

    Attributes:
        node: name of the first FX node whose value differs, or ``None`` when only the final outputs were compared.
    """

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class OptimizerMismatchError(ChaseError):
    """The optimizer does not hold the parameters that are to be trained sparsely."""


class CheckpointError(ChaseError):
    """A file is truncated, tampered with, or of another format."""
