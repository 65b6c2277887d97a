"""What sparse training costs: a masked step and an update step over a dense step, and memory over dense.

Dense and masked models train side by side in one process, step by step in turn, so that whatever else the machine does
meets both alike; times are medians. Goals, on 2 cores at batch 32: a masked step at most 1.05 dense steps, a whole
update step of ResNet-50 at most 3, and one byte per masked weight. On a GPU, convolutions are in TF32.

Run: python benchmarks/training_cost.py [--repetitions 9] [--threads 2] [--size 224] [--models resnet20 resnet50]
    [--device cpu]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from chase_fx.models import resnet20
from chase_fx.sparse import Chase

BATCH = 32
FAR = 10**9


class Trained:
    """A model with its optimizer, and perhaps a trainer. images: (BATCH, C, H, W)."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model.train(), images, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.trainer: Chase | None = None

    def sparsify(self, update_interval: int) -> None:
        """Mask 90 % of the weights from now on, with an update every ``update_interval`` steps."""
        self.trainer = Chase(
            self.model, self.optimizer, total_steps=FAR, sparsity=0.9, channel_sparsity=0.0,
            update_interval=update_interval,
        )  # fmt: skip

    def seconds(self) -> float:
        """Wall time of one step."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        if self.trainer is not None:
            self.trainer.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize()


def tensor_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), Tensor):  # isinstance would look into lazy modules, which warn
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(name: str, size: int, repetitions: int, device: str) -> dict[str, float]:
    """All numbers of one model."""
    torch.manual_seed(0)
    shape = (BATCH, 1, 28, 28) if name == "resnet20" else (BATCH, 3, size, size)
    build = resnet20 if name == "resnet20" else lambda: torchvision.models.get_model(name, weights=None)
    images, labels = torch.randn(shape).to(device), torch.randint(10, (BATCH,)).to(device)
    dense, masked, updated = (Trained(build().to(device), images, labels) for _ in range(3))
    for run in (dense, masked, updated):
        run.seconds()  # optimizer slots are there from now on
    before = tensor_bytes()
    masked.sparsify(FAR)
    assert masked.trainer is not None
    weights = sum(mask.numel() for mask in masked.trainer.masks.values())
    extra = tensor_bytes() - before
    updated.sparsify(1)
    times: dict[str, list[float]] = {"dense": [], "masked": [], "update": []}
    for repetition in range(repetitions + 1):
        for key, run in (("dense", dense), ("masked", masked), ("update", updated)):
            seconds = run.seconds()
            if repetition:  # the first one warms up
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "dense_step_s": medians["dense"],
        "masked_over_dense": medians["masked"] / medians["dense"],
        "update_over_dense": medians["update"] / medians["dense"],
        "bytes_per_masked_weight": extra / weights,
        "masked_weights": weights,
    }


def main() -> None:
    """Measure, print a table, write the numbers beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="side of the images of all but resnet20")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet50"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "dtype": "float32",
        "batch": BATCH,
        "image": options.size,
        "threads": options.threads,
        "repetitions": options.repetitions,
        "models": {},
    }
    where = f"{options.device}, float32, batch {BATCH}, {options.threads} threads"
    print(f"{where}, {options.repetitions} repetitions, medians")
    for name in options.models:
        # ResNet-20 steps take milliseconds: more of them cost nothing and steady the median.
        repetitions = options.repetitions * (10 if name == "resnet20" else 1)
        row = result["models"][name] = measure(name, options.size, repetitions, options.device)
        print(
            f"{name:10} dense step {row['dense_step_s']:.4f} s, masked {row['masked_over_dense']:.3f}, update "
            f"{row['update_over_dense']:.2f} dense steps, {row['bytes_per_masked_weight']:.3f} bytes per masked weight",
            flush=True,
        )
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
