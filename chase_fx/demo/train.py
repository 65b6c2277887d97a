"""One training loop for the dense and the sparse run, so that both see the same images, steps and learning rates.

Shape legend: B images of a batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every PyTorch program uses

from chase_fx.data import Split

__all__ = ["BATCH", "Recipe", "accuracy", "fit", "make_optimizer", "step_seconds"]

BATCH = 128
_SMOOTHING = 0.98
_REFRESH_STEPS = 5


@dataclass(frozen=True)
class Recipe:
    """How both models are trained: SGD with Nesterov momentum and a one-cycle learning rate.

    Attributes:
        steps: optimizer steps.
        seed: of the order of the images.
        max_lr: the learning rate at its highest.
        memory_format: of the batches.
    """

    steps: int
    seed: int = 0
    max_lr: float = 0.2
    memory_format: torch.memory_format = torch.channels_last


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Split,
    recipe: Recipe,
    *,
    label: str,
    console: Console,
    after_step: Callable[[], str] = lambda: "",
) -> float:
    """Train ``model`` in place behind a progress bar.

    Args:
        model: maps (B, 1, 28, 28) to logits (B, classes).
        optimizer: holds the model's parameters; its learning rate is scheduled here.
        data: the training images.
        recipe: steps, seed and learning rate.
        label: the name beside the bar.
        console: where the bar is drawn.
        after_step: runs after each optimizer step; what it returns is shown behind loss and accuracy.

    Returns:
        Seconds spent training.
    """
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.max_lr, total_steps=recipe.steps, pct_start=0.3, cycle_momentum=False
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(6, min(30, console.width - 76))),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    model.train()
    loss_mean, right_mean = Running(), Running()
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=recipe.steps, status="")
        for step, (images, labels) in enumerate(_batches(data, recipe), start=1):
            loss, right = _train_step(model, optimizer, images, labels)
            extra = after_step()
            schedule.step()
            loss_mean.add(loss)
            right_mean.add(right)
            if step % _REFRESH_STEPS == 0 or step == recipe.steps:
                status = f"loss {loss_mean.value:.3f} accuracy {right_mean.value:.1%} {extra}"
                progress.update(task, completed=step, status=status)
    return time.perf_counter() - start


def step_seconds(model: nn.Module, data: Split, steps: int = 8) -> float:
    """Seconds that one training step takes, the median of a few, on a model that is thrown away."""
    optimizer = make_optimizer(model)
    times = []
    model.train()
    for images, labels in _batches(data, Recipe(steps)):
        start = time.perf_counter()
        _train_step(model, optimizer, images, labels)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of the images that ``model`` classifies correctly, in eval mode."""
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True)
    )
    return right / len(data)


class Running:
    """A mean that forgets: each new value weighs 2 %, without the bias of its start."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        """Take in a value."""
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * value
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)

    @property
    def value(self) -> float:
        """The mean so far."""
        return self._sum / self._weight


def _train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """One step of cross-entropy; returns the loss and the share of the batch that was right."""
    optimizer.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.item(), (logits.detach().argmax(1) == labels).float().mean().item()


def _batches(data: Split, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``recipe.steps`` shuffled batches, each epoch in a new order; the last, smaller one is left out."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = min(BATCH, len(data))
    left = recipe.steps
    while left > 0:
        order = torch.randperm(len(data), generator=generator)
        for rows in order[: len(data) // size * size].split(size)[:left]:
            left -= 1
            yield data.images[rows].contiguous(memory_format=recipe.memory_format), data.labels[rows]
