"""The page of the comparison: reads the test images once, measures latencies, writes tables, a plot and the records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plot import draw
from benchmarks.accuracy.records import Folder
from benchmarks.accuracy.runs import CHASE, REFILLED, RIVALS, SPARSITIES, VARIANTS_AT, Run, all_runs
from chase_fx.data import Dataset
from chase_fx.demo.measure import compiled, median_latencies, why_no_compiler
from chase_fx.demo.train import accuracy

__all__ = ["write_page"]

CONTESTANTS = ("Chase + refill", "Chase", *RIVALS)
LATENCY_BATCH = 64
Records = dict[str, dict[str, Any]]

INTRODUCTION = """# Accuracy at equal cost

Written by `make bench-accuracy` (`python -m benchmarks.accuracy --epochs {epochs:g}`); do not edit. ResNet-20 with
a stride-2 stem on Fashion-MNIST, {epochs:g} epochs of 55,000 images for everybody, batch 128, SGD with Nesterov
momentum, one-cycle learning rate. 5,000 training images are held out for every choice; the 10,000 test
images are read only when this page is written, and nothing is chosen by them. CPU, float32, one thread a run,
torch {torch}.

- **Chase + refill**: channels go during training, with live shrink; those that are left are dense in the end.
  Options: `{refilled}`.
- **Chase**: the same with sparse weights from the start. Options: `{chase}`.
- **uniform**: (a) the same share of every width, trained from scratch.
- **random**: (b) these widths; the initial weights are those of channels of the dense network, drawn at random.
- **fine-tuned**: (c) dense for half of the epochs, pruned by magnitude to these widths, fine-tuned for the rest.
- **same widths**: (d) the very widths that Chase + refill came to, trained from scratch.

The rivals have the FLOPs of Chase + refill with the same seed, or the next higher number that widths allow. Training
time is CPU time, capture and analysis included. Values are means over seeds, ± their standard deviation.
"""


def write_page(folder: Folder, data: Dataset, docs: Path) -> None:
    """Judge every run that has a record and write ``accuracy.json``, ``accuracy.md`` and ``accuracy.svg``."""
    runs = {run.name: run for run in all_runs() if folder.record(run) is not None}
    records: Records = {name: _judged(folder, run, data) for name, run in runs.items()}
    latencies = _latencies(folder, [run for run in runs.values() if run.seed == 0 and run.table == "main"], data)
    for name, measured in latencies.items():
        records[name].update(measured)
    docs.mkdir(exist_ok=True)
    (docs / "accuracy.json").write_text(json.dumps(list(records.values()), indent=1) + "\n", encoding="utf-8")
    missing = [run.name for run in all_runs() if run.name not in records]
    text = _page(records, missing, folder.epochs)
    (docs / "accuracy.md").write_text(text, encoding="utf-8")
    draw(records, CONTESTANTS, docs / "accuracy.svg")


def _judged(folder: Folder, run: Run, data: Dataset) -> dict[str, Any]:
    record = folder.record(run)
    assert record is not None
    del record["setting"]
    # Variants are what was chosen from: no test image for them.
    return record if run.table == "variants" else {**record, "test": accuracy(folder.module(run), data.test)}


def _latencies(folder: Folder, runs: Sequence[Run], data: Dataset) -> Records:
    """Seconds of a forward of LATENCY_BATCH images, the modules taking turns."""
    batch = data.test.images[:LATENCY_BATCH]
    modules = [folder.module(run) for run in runs]
    seconds = {"eager_seconds": median_latencies(modules, batch)}
    if why_no_compiler() is None:
        seconds["compiled_seconds"] = median_latencies([compiled(module, batch) for module in modules], batch)
    return {run.name: {key: values[i] for key, values in seconds.items()} for i, run in enumerate(runs)}


def _page(records: Records, missing: Sequence[str], epochs: float) -> str:
    parts = [
        INTRODUCTION.format(
            epochs=epochs,
            torch=next(iter(records.values()))["torch"],
            refilled=_options(REFILLED),
            chase=_options(CHASE),
        )
    ]
    if missing:
        parts.append(f"**{len(missing)} runs are missing:** {', '.join(missing)}.\n")
    parts.append("![Test accuracy over FLOPs](accuracy.svg)\n")
    parts += [
        _main_table(records),
        _differences(records),
        _others(records),
        *(_variants(records, at) for at in VARIANTS_AT),
    ]
    return "\n".join(part for part in parts if part)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _of(records: Records, contestant: str, sparsity: float) -> list[dict[str, Any]]:
    return [
        r for r in records.values()
        if r["table"] == "main" and r["contestant"] == contestant and r["channel_sparsity"] == sparsity
    ]  # fmt: skip


def _main_table(records: Records) -> str:
    dense = {r["seed"]: r for r in _of(records, "dense", 0.0)}
    rows = [
        "## Accuracy, cost and time\n",
        "Latency: a forward of 64 images, seed 0, in one process and in turn. Ratios are to the dense network.\n",
        "| channels removed | contestant | seeds | test accuracy | FLOPs | parameters | eager | compiled | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for sparsity in (0.0, *SPARSITIES):
        for contestant in ("dense",) if not sparsity else CONTESTANTS:
            group = [r for r in _of(records, contestant, sparsity) if r["seed"] in dense]
            rows += [f"| {sparsity:.0%} | {contestant} | {_row(group, dense)} |"] if group else []
    return "\n".join(rows) + "\n"


def _row(group: Sequence[dict[str, Any]], dense: dict[int, dict[str, Any]]) -> str:
    def ratio(key: str) -> str:
        values = [r[key] / dense[r["seed"]][key] for r in group if key in r and key in dense[r["seed"]]]
        return f"{statistics.mean(values):.3f}" if values else "n/a"

    columns = [ratio(key) for key in ("flops", "parameters", "eager_seconds", "compiled_seconds", "cpu_seconds")]
    return f"{len(group)} | {_mean([100 * r['test'] for r in group])} % | " + " | ".join(columns)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _differences(records: Records) -> str:
    rows = [
        "## Paired differences\n",
        "Test accuracy of Chase + refill minus that of the rival with the same seed, in percentage points.\n",
        "| channel sparsity | rival | mean ± standard deviation | each seed |",
        "|---|---|---|---|",
    ]
    for sparsity in SPARSITIES:
        ours = {r["seed"]: r for r in _of(records, "Chase + refill", sparsity)}
        for rival in CONTESTANTS[1:]:
            pairs = [
                100 * (ours[r["seed"]]["test"] - r["test"]) for r in _of(records, rival, sparsity) if r["seed"] in ours
            ]
            if pairs:
                each = ", ".join(f"{value:+.2f}" for value in pairs)
                rows.append(f"| {sparsity:.0%} | {rival} | {_mean(pairs)} | {each} |")
    return "\n".join(rows) + "\n"


def _others(records: Records) -> str:
    dense = {r["seed"]: r for r in _of(records, "dense", 0.0)}
    group = [r for r in records.values() if r["table"] == "others" and r["seed"] in dense]
    if not group:
        return ""
    rows = [
        "## The other methods with the channel rule\n",
        "One seed, 70 % of the channels, live shrink, no refill. `Chase` as above.\n",
        "| method | test accuracy | FLOPs | parameters | non-zero weights and biases | training time |",
        "|---|---|---|---|---|---|",
    ]
    for r in [*(r for r in _of(records, "Chase", 0.7) if r["seed"] == 0), *group]:
        d = dense[r["seed"]]
        rows.append(
            f"| {r['contestant']} | {100 * r['test']:.2f} % | {r['flops'] / d['flops']:.3f} | "
            f"{r['parameters'] / d['parameters']:.3f} | {r['nonzero'] / d['parameters']:.3f} | "
            f"{r['cpu_seconds'] / d['cpu_seconds']:.2f} |"
        )
    return "\n".join(rows) + "\n"


def _variants(records: Records, sparsity: float) -> str:
    group = [
        r for r in records.values()
        if r["table"] == "variants" and r["cost_of"] is None and r["channel_sparsity"] == sparsity
    ]  # fmt: skip
    if not group:
        return ""
    rivals = {r["cost_of"]: r for r in records.values() if r["contestant"] == "uniform"}
    chosen = [r for r in _of(records, "Chase + refill", sparsity) if r["seed"] == 0]
    rows = [
        f"## Variants tried at {sparsity:.0%}\n",
        "The options of Chase + refill were chosen by images held out. One seed: differences below 0.4 points of",
        "accuracy and 0.01 of the loss are noise.",
        "Variants differ from it as their names say; `uniform` is trained from scratch, with its FLOPs.\n",
        "| variant | FLOPs | held-out accuracy | held-out loss | accuracy of uniform | loss of uniform |",
        "|---|---|---|---|---|---|",
    ]
    for r in [*chosen, *group]:
        rival = rivals.get(r["name"]) or (rivals.get(chosen[0]["name"]) if chosen else None)
        name = "as chosen" if r in chosen else r["contestant"]
        rows.append(f"| {name} | {r['flops']:,} | {_held_out(r)} | {_held_out(rival)} |")
    return "\n".join(rows) + "\n"


def _held_out(record: dict[str, Any] | None) -> str:
    return "n/a | n/a" if record is None else f"{100 * record['validation']:.2f} % | {record['validation_loss']:.4f}"
