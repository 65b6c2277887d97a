"""Parameters, FLOPs and latency of two models, measured side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["compiled", "count_flops", "count_parameters", "median_latencies", "why_no_compiler"]


def count_parameters(model: nn.Module) -> int:
    """Number of values in the model's parameters, zeros included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward, a multiply-add as two, by ``torch.utils.flop_counter``."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def why_no_compiler() -> str | None:
    """``None`` if torch.compile can build and run a kernel on this machine, else why not, in one line.

    On CPU it needs a C++ compiler and Python's headers. A one-line function is compiled to find out: if that works, an
    error of the real model is the model's.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except RuntimeError as error:  # the base class of everything that dynamo and inductor raise
        return str(error).strip().splitlines()[0]
    return None


def compiled(model: nn.Module, x: Tensor) -> nn.Module:
    """``torch.compile(fullgraph=True)``, with the first, compiling call behind it."""
    module: nn.Module = torch.compile(model, fullgraph=True)  # type: ignore[assignment]  # a module in, a module out
    with torch.inference_mode():
        module(x)
    return module


@torch.inference_mode()
def median_latencies(models: Sequence[nn.Module], x: Tensor, rounds: int = 60) -> list[float]:
    """Median seconds of a forward of each model; the models take turns, so that a busy machine hits all alike.

    Args:
        models: in eval mode.
        x: the batch, (B, C, H, W).
        rounds: how often each one runs after a warm-up.
    """
    for model in models:
        for _ in range(5):
            model(x)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, seconds in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]
