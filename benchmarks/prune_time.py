"""Time of trace + analyze + rewrite against Torch-Pruning's init + step, side by side in one process.

Both prune half of the channels at batch 1, 224 x 224, float32, by weight magnitude; scoring is part of the time on
both sides, verification is not. Needs ``pip install torch-pruning==1.6.1``; without it only our times are shown.

Run: python benchmarks/prune_time.py [--repetitions 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

import chase_fx

COMPARED = ("resnet50", "densenet121", "mobilenet_v3_large", "convnext_tiny", "vit_b_16", "efficientnet_b0")
DEPTHS = {
    "resnet": (("resnet18", 18), ("resnet34", 34), ("resnet50", 50), ("resnet101", 101), ("resnet152", 152)),
    "densenet": (("densenet121", 121), ("densenet169", 169), ("densenet201", 201)),
}


def ours(model: nn.Module, images: torch.Tensor) -> None:
    """Capture, analyse, score and rewrite."""
    traced = chase_fx.trace(model, images)
    chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))


def theirs(model: nn.Module, images: torch.Tensor) -> None:
    """Torch-Pruning with the classifier ignored and the heads of attention layers named, as its documentation asks."""
    import torch_pruning as tp

    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        model, images, importance=importance, pruning_ratio=0.5, ignored_layers=ignored, num_heads=heads
    ).step()


def seconds(run: Callable[[nn.Module, torch.Tensor], None], model: nn.Module, images: torch.Tensor) -> float:
    """Wall time of one run on a fresh copy of the model; what earlier runs left is collected before."""
    fresh = copy.deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    run(fresh, images)
    return time.perf_counter() - start


def build(name: str) -> nn.Module:
    """The model of torchvision, with random weights."""
    return torchvision.models.get_model(name, weights=None).eval()


def interleaved(
    runs: dict[str, tuple[Callable[[nn.Module, torch.Tensor], None], nn.Module]], images: torch.Tensor, repetitions: int
) -> dict[str, float]:
    """Median wall time of each run, one after the other in every round; the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, (run, model) in runs.items():
            times[name].append(seconds(run, model, images))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def exponent(times: list[float], depths: list[int]) -> float:
    """Slope of log time over log depth."""
    x, y = torch.tensor(depths, dtype=torch.float64).log(), torch.tensor(times, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def main() -> None:
    """Measure, print a table, write the numbers beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        import torch_pruning  # noqa: F401  (only whether it is there)

        peers: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {"chase_fx": ours, "torch_pruning": theirs}
    except ImportError:
        peers = {"chase_fx": ours}
    images = torch.randn(1, 3, 224, 224)
    rows: dict[str, dict[str, float]] = {}
    for name in COMPARED:
        rows[name] = interleaved({peer: (run, build(name)) for peer, run in peers.items()}, images, options.repetitions)
        both = rows[name].get("torch_pruning")
        ratio = f"  ratio {rows[name]['chase_fx'] / both:.2f}" if both else ""
        print(f"{name:20} " + "  ".join(f"{p} {t:.3f} s" for p, t in rows[name].items()) + ratio, flush=True)
    growth: dict[str, dict[str, float]] = {}
    slopes: dict[str, float] = {}
    for family, members in DEPTHS.items():
        times = interleaved({name: (ours, build(name)) for name, _ in members}, images, options.repetitions)
        growth[family] = times
        slopes[family] = exponent(list(times.values()), [depth for _, depth in members])
        print(f"{family}: " + ", ".join(f"{name} {t:.3f} s" for name, t in times.items()))
        print(f"{family}: time grows with depth to the power {slopes[family]:.2f}", flush=True)
    result = {
        "torch": torch.__version__,
        "threads": options.threads,
        "repetitions": options.repetitions,
        "device": "cpu",
        "dtype": "float32",
        "seconds": rows,
        "growth": growth,
        "exponents": slopes,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
