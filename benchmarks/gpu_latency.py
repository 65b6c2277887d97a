"""Latency of dense and slim models on a GPU, eager and compiled, side by side in one process.

Every model has a process of its own, which compiles while the others do; then they are timed one after the other. Dense
and slim calls are taken in turn, and times are medians by CUDA events. Widths are measured as they come, and rounded to
multiples of 16, which tensor cores ask for; cuDNN picks the fastest kernels for either. Compiled calls are CUDA graphs
(``mode="reduce-overhead"``), for otherwise the time that Python takes to start kernels hides what the GPU gains. Single
precision is TF32. Compile times are those of first calls while the other models compile too. Weights are random, which
changes no time.

Run: python benchmarks/gpu_latency.py [--seconds 240] [--models resnet50 decoder ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.multiprocessing as mp
import torchvision
from torch import Tensor, nn
from torch._dynamo import config as dynamo

import chase_fx

VOCABULARY, LENGTH = 32000, 1024
# name -> (share of the channels that go, widths are multiples of)
VARIANTS: Mapping[str, tuple[float, int]] = {
    "dense": (0.0, 1), "half": (0.5, 1), "half, by 16": (0.5, 16), "two thirds, by 16": (2 / 3, 16),
}  # fmt: skip


class Block(nn.Module):
    """A layer as Llama has it: x (N, L, C) -> (N, L, C); rotations (L, E / 2) each."""

    def __init__(self, width: int, heads: int, groups: int, wide: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        size = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.q = nn.Linear(width, heads * size, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * size, width, bias=False)
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention, then a gated layer, each added to ``x``."""
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        y = nn.functional.scaled_dot_product_attention(
            _rotated(q, cos, sin), _rotated(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Decoder(nn.Module):
    """A language model in the shape of Llama: tokens (N, L) -> logits (N, L, VOCABULARY)."""

    def __init__(self, layers: int = 8, width: int = 2048, heads: int = 16, groups: int = 4, wide: int = 5632) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, heads, groups, wide) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, 1e-6), nn.Linear(width, VOCABULARY, bias=False)
        half = width // heads // 2
        self.register_buffer("rates", 10000.0 ** (-torch.arange(half) / half))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every place."""
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.rates
        x = self.embed(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Subject:
    """A model, and the batch sizes at which it is timed: the large one, and one."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int = 64
    image: bool = True


def _of_torchvision(name: str) -> Subject:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None)

    return Subject(build, lambda batch: torch.randn(batch, 3, 224, 224))


SUBJECTS: Mapping[str, Subject] = {
    **{
        name: _of_torchvision(name)
        for name in ("resnet50", "convnext_tiny", "vit_b_16", "mobilenet_v3_large", "efficientnet_b0", "densenet121")
    },
    "decoder": Subject(Decoder, lambda batch: torch.randint(VOCABULARY, (batch, LENGTH)), batch=8, image=False),
    "small": Subject(lambda: Decoder(1, 64, 4, 2, 96), lambda batch: torch.randint(99, (batch, 16)), 4, image=False),
}
DEFAULT = tuple(name for name in SUBJECTS if name != "small")


@dataclass
class Prepared:
    """One variant of a model in one precision at one batch size."""

    variant: str
    module: nn.Module
    inputs: Tensor
    row: dict[str, Any]
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)


def milliseconds(calls: Mapping[Any, Callable[[], Any]], device: str, seconds: float) -> dict[Any, float]:
    """Medians of calls that are taken in turn for about ``seconds``, five times each at least."""
    found: dict[Any, list[float]] = {key: [] for key in calls}
    end = time.monotonic() + seconds
    for round_ in range(60):
        for key, call in calls.items():
            if device == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                stop.record()
                stop.synchronize()
                passed = start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                call()
                passed = (time.perf_counter() - begin) * 1e3
            if round_ >= 3:  # the first ones warm up
                found[key].append(passed)
        if round_ >= 7 and time.monotonic() > end:
            break
    return {key: statistics.median(times) for key, times in found.items()}


def slims(subject: Subject, device: str) -> dict[str, nn.Module]:
    """The dense model, and slim ones by magnitude; rounded widths only where they differ."""
    model = subject.build().eval().to(device)
    traced = chase_fx.trace(model, subject.inputs(2).to(device))
    channels = chase_fx.analyze(traced)
    plans: dict[str, chase_fx.PruningPlan] = {}
    for name, (share, by) in VARIANTS.items():
        if share and (plan := channels.plan(share, round_to=by)) not in plans.values():
            plans[name] = plan
    return {"dense": model, **{name: chase_fx.rewrite(traced, plan) for name, plan in plans.items()}}


def prepared(subject: Subject, device: str) -> list[Prepared]:
    """Everything to time, in the order in which it counts."""
    variants = slims(subject, device)
    found = []
    for precision, batch in (("bfloat16", subject.batch), ("float32", subject.batch), ("bfloat16", 1)):
        dtype = getattr(torch, precision)
        inputs = subject.inputs(batch).to(device)
        if subject.image:
            inputs = inputs.to(dtype).to(memory_format=torch.channels_last)
        for variant, module in variants.items():
            if variant not in ("dense", "half") and (precision, batch) != ("bfloat16", subject.batch):
                continue
            own = copy.deepcopy(module).to(dtype)
            own = own.to(memory_format=torch.channels_last) if subject.image else own
            row = {
                "dtype": precision, "batch": batch, "variant": variant,
                "parameters": sum(p.numel() for p in own.parameters()),
            }  # fmt: skip
            found.append(Prepared(variant, own, inputs, row))
    return found


def compile_one(one: Prepared, device: str) -> None:
    """Compile and compare with the eager call."""
    compiled = torch.compile(one.module, fullgraph=True, dynamic=False, mode="reduce-overhead")
    start = time.perf_counter()
    found = compiled(one.inputs).float().clone()
    if device == "cuda":
        torch.cuda.synchronize()
    one.row["compile_s"] = time.perf_counter() - start
    want = one.module(one.inputs).float()
    one.row["difference"] = float((found - want).abs().max() / want.abs().max())
    one.calls["compiled"] = lambda: compiled(one.inputs)


@torch.no_grad()
def work(name: str, options: argparse.Namespace, end: float, shared: tuple[Any, Any, Any]) -> None:
    """Prepare and compile one model, wait for the others, time it, and send the rows."""
    ready, go, alone = shared  # a queue, an event, a lock
    device = options.device
    torch.manual_seed(0)
    torch.set_num_threads(2)  # of each process
    torch.backends.cudnn.benchmark = True  # the best kernel for each width
    torch.set_float32_matmul_precision("high")
    dynamo.recompile_limit = 64  # all variants have one forward
    rows: list[dict[str, Any]] = []
    try:
        everything = prepared(SUBJECTS[name], device)
        for one in everything:
            one.calls["eager"] = lambda one=one: one.module(one.inputs)
            if time.monotonic() < end - 0.35 * options.seconds:
                try:
                    compile_one(one, device)
                except Exception as e:  # noqa: BLE001 - the others are still worth their time
                    one.row["error"] = f"{type(e).__name__}: {e}"[:500]
        ready.put((name, None))
        go.wait()
        for key in dict.fromkeys((one.row["dtype"], one.row["batch"]) for one in everything):
            same = [one for one in everything if (one.row["dtype"], one.row["batch"]) == key]
            with alone:
                if time.monotonic() > end:
                    break
                for how in ("eager", "compiled"):
                    calls = {i: one.calls[how] for i, one in enumerate(same) if how in one.calls}
                    for i, median in milliseconds(calls, device, options.each).items():
                        same[i].row[f"{how}_ms"] = median
            rows += [{"model": name, **one.row} for one in same]
    except Exception as e:  # noqa: BLE001 - so that the other models are written
        ready.put((name, None))
        rows.append({"model": name, "error": f"{type(e).__name__}: {e}"[:500]})
    ready.put((name, rows))


def show(rows: list[dict[str, Any]]) -> None:
    """A table with the times of each variant, and how much faster than the dense model it is."""
    heads = ("param.", "eager", "compiled", "compile")
    print(
        f"{'model':20} {'dtype':9} {'batch':>5} {'variant':18} "
        f"{heads[0]:>7} {heads[1]:>17} {heads[2]:>17} {heads[3]:>8}"
    )
    dense: dict[str, Any] = {}
    for row in rows:
        if "dtype" not in row:
            print(f"{row['model']:20} {row['error']}")
            continue
        dense = row if row["variant"] == "dense" else dense
        cells = []
        for how in ("eager_ms", "compiled_ms"):
            both = how in row and how in dense
            cells.append(f"{row[how]:8.3f} ms {dense[how] / row[how]:4.2f}x" if both else f"{'-':>17}")
        took = f"{row['compile_s']:6.1f} s" if "compile_s" in row else f"{'-':>8}"
        print(
            f"{row['model']:20} {row['dtype']:9} {row['batch']:5} {row['variant']:18} {row['parameters'] / 1e6:6.1f}M "
            f"{cells[0]} {cells[1]} {took} {row.get('error', '')[:60]}"
        )


def main() -> None:
    """Measure, print a table, write the numbers beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="stop after about so many, with what there is")
    parser.add_argument("--each", type=float, default=0.6, help="seconds to time one setting, eager and compiled each")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=tuple(SUBJECTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that CUDA runs on: nothing measured")
        return
    end = time.monotonic() + options.seconds
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")  # of each process
    context = mp.get_context("spawn")
    ready, go, alone = context.Queue(), context.Event(), context.Lock()
    processes = {
        name: context.Process(target=work, args=(name, options, end, (ready, go, alone)), daemon=True)
        for name in options.models
    }
    for process in processes.values():
        process.start()
    results: dict[str, list[dict[str, Any]]] = {}
    waiting = set(processes)
    while len(results) < len(processes) and time.monotonic() < end + 40:
        if not waiting or time.monotonic() > end - 0.3 * options.seconds:
            go.set()
        try:
            name, rows = ready.get(timeout=1)
        except Empty:
            continue
        waiting.discard(name)
        if rows is not None:
            results[name] = rows
    rows = [row for name in options.models for row in results.get(name, [{"model": name, "error": "not finished"}])]
    show(rows)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result = {
        "torch": torch.__version__, "device": device, "seconds": options.seconds, "each": options.each,
        "compiled": "reduce-overhead", "rows": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for process in processes.values():
        process.kill()


if __name__ == "__main__":
    main()
