"""Wall time of a Chase run with live shrink over the dense run of the same epochs.

ResNet-20 at the shape of Fashion-MNIST; the numbers in the images do not matter for time. A dense step and a Chase
step are taken in turn in one process. Channels go by score per multiplication saved, since time is what is wanted.
Everything that Chase needs counts: capture, analysis, masks, updates, channel events, cuts and the final ``finalize``.
Goal at 70 % channel sparsity on 2 cores: at most 0.65.

Run: python benchmarks/training_shrink.py [--steps 600] [--batch 128] [--channel-sparsity 0.7] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import chase_fx
from chase_fx.models import ResNet20


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    """SGD with Nesterov momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def timed(action: Callable[[], object]) -> float:
    """Wall time of ``action``."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    """Forward, backward, step; gradients stay."""
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def race(options: argparse.Namespace) -> dict[str, float]:
    """One dense and one Chase run, interleaved: seconds of each, and of the parts of the latter."""
    torch.manual_seed(0)
    batches = [(torch.randn(options.batch, 1, 28, 28), torch.randint(10, (options.batch,))) for _ in range(8)]
    model, dense = ResNet20(width=options.width), ResNet20(width=options.width)
    dense_optimizer = optimizer_of(dense)
    start = time.perf_counter()
    traced = chase_fx.trace(model, batches[0][0][:2])
    optimizer = optimizer_of(traced)
    trainer = chase_fx.Chase(
        traced, optimizer, total_steps=options.steps, sparsity=options.sparsity,
        channel_sparsity=options.channel_sparsity, live_shrink=True, round_to=options.round_to,
        channel_cost=None if options.cost == "none" else options.cost, channel_ranking=options.ranking,
        channels_until=options.channels_until,
    )  # fmt: skip
    build = time.perf_counter() - start
    for _ in range(2):  # threads and allocator
        step(dense, dense_optimizer, batches[0])
    totals = {"dense_s": 0.0, "train_s": 0.0, "trainer_s": 0.0}
    for number in range(options.steps):
        batch = batches[number % len(batches)]
        totals["dense_s"] += timed(lambda b=batch: step(dense, dense_optimizer, b))
        totals["train_s"] += timed(lambda b=batch: step(traced, optimizer, b))
        totals["trainer_s"] += timed(trainer.step)
    finish = timed(trainer.finalize)
    slim = statistics.median(timed(lambda: step(traced, optimizer, batches[0])) for _ in range(9))
    whole = statistics.median(timed(lambda: step(dense, dense_optimizer, batches[0])) for _ in range(9))
    chase = build + totals["train_s"] + totals["trainer_s"] + finish
    totals["last_step_over_dense"] = slim / whole
    return {**totals, "build_s": build, "finalize_s": finish, "chase_s": chase, "ratio": chase / totals["dense_s"]}


def main() -> None:
    """Race, print, write the numbers beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--channel-sparsity", type=float, default=0.7)
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--cost", choices=["none", "parameters", "flops"], default="flops", help="of a channel")
    parser.add_argument("--ranking", choices=["global", "normalised", "group"], default="global")
    parser.add_argument("--channels-until", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"cpu, float32, ResNet-20 of width {options.width}, batch {options.batch}, {options.steps} steps, "
        f"{options.threads} threads, {options.repetitions} repetitions"
    )
    races = []
    for _ in range(options.repetitions):
        races.append(race(options))
        parts = ", ".join(f"{key[:-2]} {value:.2f}" for key, value in races[-1].items() if key.endswith("_s"))
        print(f"seconds: {parts}; last step over dense {races[-1]['last_step_over_dense']:.2f}", flush=True)
    ratio = statistics.median(row["ratio"] for row in races)
    print(f"Chase with live shrink over dense: {ratio:.3f} (median)")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result = {
        "torch": torch.__version__, "device": "cpu", "dtype": "float32", **settings, "ratio": ratio, "races": races,
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
