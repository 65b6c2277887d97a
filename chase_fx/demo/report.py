"""The demo's result: one table for a reader, one JSON file for a program."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from chase_fx.version import __version__

__all__ = ["Column", "Report"]


@dataclass(frozen=True)
class Column:
    """What was measured of one model.

    Attributes:
        accuracy: share of the test images classified correctly.
        parameters: values in the parameters, zeros included.
        nonzero: parameters that are not zero.
        flops: of one image, a multiply-add as two.
        eager_seconds: median of a forward of ``Report.latency_batch`` images.
        compiled_seconds: likewise after torch.compile; ``None`` where it cannot compile.
        training_seconds: of the training loop.
    """

    accuracy: float
    parameters: int
    nonzero: int
    flops: int
    eager_seconds: float
    compiled_seconds: float | None
    training_seconds: float


@dataclass(frozen=True)
class Report:
    """Dense against slim, and the conditions of the measurement."""

    dense: Column
    slim: Column
    data: str
    steps: int
    batch: int
    seed: int
    latency_batch: int
    no_compiler: str | None

    def table(self) -> Table:
        """Dense against slim, with the ratio that favours slim where it is above 1."""
        table = Table(title=f"dense against slim, {self.steps} training steps each", title_justify="left")
        for heading in ("", "dense", "slim", "ratio"):
            table.add_column(heading, justify="right" if heading else "left")
        dense, slim = self.dense, self.slim
        points = 100 * (slim.accuracy - dense.accuracy)
        table.add_row("test accuracy", f"{dense.accuracy:.2%}", f"{slim.accuracy:.2%}", f"{points:+.2f} points")
        for label, before, after in (
            ("parameters", dense.parameters, slim.parameters),
            ("  of them not zero", dense.nonzero, slim.nonzero),
            ("FLOPs, one image", dense.flops, slim.flops),
        ):
            table.add_row(label, f"{before:,}", f"{after:,}", f"{before / after:.2f}x")
        images = f"{self.latency_batch} images"
        table.add_row(*_seconds_row(f"latency eager, {images}", dense.eager_seconds, slim.eager_seconds))
        table.add_row(*_seconds_row(f"latency compiled, {images}", dense.compiled_seconds, slim.compiled_seconds))
        ratio = dense.training_seconds / slim.training_seconds
        table.add_row("training", f"{dense.training_seconds:.1f} s", f"{slim.training_seconds:.1f} s", f"{ratio:.2f}x")
        return table

    def write(self, path: Path) -> None:
        """Write everything as JSON, with the versions and the machine's threads."""
        machine = {
            "chase-fx": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        path.write_text(json.dumps({**asdict(self), "machine": machine}, indent=2) + "\n")


def _seconds_row(label: str, dense: float | None, slim: float | None) -> tuple[str, str, str, str]:
    if dense is None or slim is None:
        return label, "n/a", "n/a", ""
    return label, f"{1e3 * dense:.2f} ms", f"{1e3 * slim:.2f} ms", f"{dense / slim:.2f}x"
