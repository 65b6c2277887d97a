"""What a run leaves behind: a record in JSON and its slim module, so that a benchmark that was stopped goes on."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import chase_fx
from benchmarks.accuracy.contestants import EXAMPLE, Contest
from benchmarks.accuracy.runs import Run
from chase_fx.data import Dataset, Split
from chase_fx.demo.measure import count_flops, count_parameters
from chase_fx.demo.train import BATCH, accuracy
from chase_fx.graphs.traced import TracedModule
from chase_fx.models import resnet20

__all__ = ["Folder"]


@dataclass(frozen=True)
class Folder:
    """Records and modules of the runs of one setting.

    Attributes:
        path: of the folder; it is made when something is written.
        epochs: passes over the training images. A record of another number counts as not there.
    """

    path: Path
    epochs: float

    def record(self, run: Run) -> dict[str, Any] | None:
        """The record of ``run``, or ``None`` where it must be trained (again)."""
        file = self.path / f"{run.name}.json"
        if not file.exists():
            return None
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record if record["setting"] == self._setting(run) else None

    def module(self, run: Run) -> TracedModule:
        """The trained module, in eval mode."""
        return self._load(run.name).eval()

    def train(self, run: Run, data: Dataset) -> dict[str, Any]:
        """Train ``run``, write its module and then its record."""
        steps = round(self.epochs * len(data.train) / BATCH)
        contest = Contest(data.train, steps, run.seed)
        like = None if run.cost_of is None else self._load(run.cost_of)
        cpu, wall = time.process_time(), time.perf_counter()
        model = run.train(contest, like)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        record = {
            **dataclasses.asdict(run),
            "setting": self._setting(run),
            "steps": steps,
            "validation": accuracy(model, data.validation),
            "validation_loss": _loss(model, data.validation),
            "flops": count_flops(model.eval(), EXAMPLE[:1]),
            "parameters": count_parameters(model),
            "nonzero": sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
            "widths": [len(p) for name, p in model.named_parameters() if p.dim() == 4],
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "torch": torch.__version__,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        chase_fx.save(model, self.path / f"{run.name}.safetensors")
        (self.path / f"{run.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def _load(self, name: str) -> TracedModule:
        return chase_fx.load(self.path / f"{name}.safetensors", resnet20())

    def _setting(self, run: Run) -> str:
        return json.dumps([self.epochs, dataclasses.asdict(run)], sort_keys=True)


@torch.inference_mode()
def _loss(model: TracedModule, data: Split) -> float:
    """Mean cross-entropy, in eval mode: it tells small differences apart sooner than accuracy does."""
    return float(cross_entropy(model.eval()(data.images), data.labels))
