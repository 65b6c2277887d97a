"""The fair comparison: accuracy of small ResNet-20s of equal cost on Fashion-MNIST, after equal epochs.

Every run is a process of its own with one thread and leaves a record in ``--folder``; a benchmark that was stopped goes
on where it was. Choices are made by 5,000 images held out of the training images. The test images are only read
when docs/accuracy.json, docs/accuracy.md and docs/accuracy.svg are written, at the end.

Run: make bench-accuracy, or python -m benchmarks.accuracy [--epochs 2] [--workers 2] [--only REGEX]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.accuracy.page import write_page
from benchmarks.accuracy.records import Folder
from benchmarks.accuracy.runs import Run, all_runs
from chase_fx.data import Dataset, load_images

HELD_OUT = 5000


def main() -> int:
    """Train what has no record yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--only", default="", help="train only runs whose name this regular expression finds")
    parser.add_argument("--folder", type=Path, default=Path(".accuracy"))
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST files")
    parser.add_argument("--page", action="store_true", help="write the page of the runs that are there, train nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Folder(options.folder, options.epochs)
    if options.one:
        torch.set_num_threads(1)
        [run] = [run for run in all_runs() if run.name == options.one]
        folder.train(run, images(options.data))
        return 0
    if not options.page:
        images(options.data)  # fetch them, if need be, before several processes would
        chosen = [run for run in all_runs() if re.search(options.only, run.name)]
        if not train(chosen, folder, options):
            return 1
    write_page(folder, images(options.data), Path("docs"))
    return 0


def images(path: Path | None) -> Dataset:
    """Fashion-MNIST with HELD_OUT of the training images held out."""
    data = load_images(path, validation=HELD_OUT)
    if data.name != "Fashion-MNIST":
        sys.exit(f"this benchmark needs Fashion-MNIST, found {data.source}; name its folder with --data")
    return data


def train(runs: list[Run], folder: Folder, options: argparse.Namespace) -> bool:
    """Train the runs that have no record, several at a time; whether all succeeded."""
    waiting = [run for run in runs if folder.record(run) is None]
    print(f"{len(runs)} runs, {len(waiting)} to train", flush=True)
    names = {run.name: run for run in all_runs()}
    at_work: dict[str, subprocess.Popen[bytes]] = {}
    start, failed = time.perf_counter(), []
    while waiting or at_work:
        for name, process in list(at_work.items()):
            if process.poll() is not None:
                del at_work[name]
                record = folder.record(names[name]) if process.returncode == 0 else None
                if record is None:
                    failed.append(name)
                print(f"{time.perf_counter() - start:6.0f} s  {name}: {summary(record)}", flush=True)
        ready = [run for run in waiting if run.cost_of is None or folder.record(names[run.cost_of]) is not None]
        while ready and len(at_work) < options.workers:
            run = ready.pop(0)
            waiting.remove(run)
            at_work[run.name] = worker(run, options)
        if not at_work and waiting:
            print(f"{[run.name for run in waiting]} need the cost of runs that are not there", flush=True)
            return False
        time.sleep(0.2)
    return not failed


def worker(run: Run, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process that trains ``run``."""
    command = [sys.executable, "-m", "benchmarks.accuracy", "--one", run.name, "--epochs", str(options.epochs)]
    command += ["--folder", str(options.folder), *(["--data", str(options.data)] if options.data else [])]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603 - this very module


def summary(record: dict[str, object] | None) -> str:
    """One line for the console; no word of the test images."""
    if record is None:
        return "FAILED"
    return f"validation {record['validation']:.4f}, {record['flops']:,} FLOPs, {record['cpu_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
