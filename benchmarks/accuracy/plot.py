"""Test accuracy over measured FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(records: Mapping[str, Mapping[str, Any]], contestants: Sequence[str], path: Path) -> None:
    """One line per contestant with the seeds as points, in ``path``."""
    mpl.rcParams["svg.hashsalt"] = "chase-fx"  # the same picture from the same numbers
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for contestant in contestants:
        group = [r for r in records.values() if r["contestant"] == contestant and r["table"] == "main"]
        sparsities = sorted({r["channel_sparsity"] for r in group})
        if not sparsities:
            continue
        points = [[r for r in group if r["channel_sparsity"] == sparsity] for sparsity in sparsities]
        flops = [statistics.mean(r["flops"] for r in p) / 1e6 for p in points]
        line = axes.plot(flops, [100 * statistics.mean(r["test"] for r in p) for p in points], "-", label=contestant)
        axes.plot([r["flops"] / 1e6 for r in group], [100 * r["test"] for r in group], ".", color=line[0].get_color())
    for r in (r for r in records.values() if r["contestant"] == "dense"):
        axes.axhline(100 * r["test"], color="grey", linewidth=0.6)
    axes.set(xscale="log", xlabel="million FLOPs of a forward", ylabel="test accuracy in %")
    axes.set_title("Fashion-MNIST, ResNet-20, equal epochs (grey: dense)")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
