"""The main job in order: capture, explain, train twice, verify, compile, compare, save."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import chase_fx
from chase_fx.data import Dataset, load_images
from chase_fx.demo.measure import compiled, count_flops, count_parameters, median_latencies, why_no_compiler
from chase_fx.demo.report import Column, Report
from chase_fx.demo.train import BATCH, Recipe, accuracy, fit, make_optimizer, step_seconds
from chase_fx.graphs.channels import ChannelGraph
from chase_fx.graphs.traced import TracedModule
from chase_fx.inspection import frozen_table, group_table
from chase_fx.models import resnet20

__all__ = ["DemoOptions", "run_demo"]

WEIGHT_SPARSITY = 0.9
CHANNEL_SPARSITY = 0.5
LATENCY_BATCH = 64
_COUPLED = (("layer1.0.conv2.weight", 0), ("layer1.2.conv2.weight", 0))


@dataclass(frozen=True)
class DemoOptions:
    """What a user can change.

    Attributes:
        output: folder for the graph, the slim model and the report.
        data: folder with the Fashion-MNIST files; ``None``: find or fetch them.
        epochs: passes over the training images, for each model.
        training_seconds: fewer steps are taken if training both models would take longer than this.
        seed: of weights, masks and the order of images.
    """

    output: Path
    data: Path | None = None
    epochs: float = 3.0
    training_seconds: float = 210.0
    seed: int = 0


def run_demo(options: DemoOptions, console: Console | None = None) -> Report:
    """Run the whole demo and return what it measured.

    Raises:
        ChaseError: no data, or the slim model differs from the masked one.
        OSError: the output folder cannot be written.
    """
    console = console or Console()
    options.output.mkdir(parents=True, exist_ok=True)
    console.rule("data")
    data = load_images(options.data)
    console.print(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images")
    console.print(f"from {data.source}", markup=False)

    torch.manual_seed(options.seed)
    dense = resnet20().to(memory_format=torch.channels_last)
    example = data.test.images[:2]
    traced = chase_fx.trace(dense, (example,))
    console.rule("1. channel groups of a ResNet-20")
    _show_channels(chase_fx.analyze(traced), options.output, console)

    console.rule(
        f"2. training, dense and with Chase: {WEIGHT_SPARSITY:.0%} of weights, {CHANNEL_SPARSITY:.0%} of channels"
    )
    recipe = _fit_to_budget(data, dense, options, console)
    dense_seconds = fit(dense, make_optimizer(dense), data.train, recipe, label="dense", console=console)
    masked, slim, slim_seconds = _train_slim(traced, data, recipe, options.seed, console)

    console.rule("3. the slim model")
    verified = chase_fx.verify(masked, slim)
    console.print(f"verified against the masked model, {verified}", markup=False)
    no_compiler = why_no_compiler()
    if no_compiler is not None:
        console.print(
            f"torch.compile works on no model here, so the compiled rows say n/a: {no_compiler}", markup=False
        )

    console.rule("4. dense against slim")
    report = _measure(dense, slim, (dense_seconds, slim_seconds), data=data, recipe=recipe, no_compiler=no_compiler)
    console.print(report.table())
    chase_fx.save(slim, options.output / "slim.safetensors")
    report.write(options.output / "report.json")
    files = ", ".join(sorted(path.name for path in options.output.iterdir()))
    console.print(f"in {options.output}: {files}", markup=False)
    return report


def _show_channels(channels: ChannelGraph, folder: Path, console: Console) -> None:
    console.print(group_table(channels))
    console.print(frozen_table(channels))
    first, second = _COUPLED
    console.print(f"why {first[0]}:{first[1]} and {second[0]}:{second[1]} go together:", markup=False)
    console.print(str(channels.explain(first, second)), markup=False)
    channels.draw(folder / "channels.dot")
    if shutil.which("dot") is None:
        console.print("no channels.svg: Graphviz's `dot` is not on this machine (Debian: apt-get install graphviz)")
    else:
        channels.draw(folder / "channels.svg")


def _fit_to_budget(data: Dataset, model: nn.Module, options: DemoOptions, console: Console) -> Recipe:
    """As many steps as ``epochs`` asks for, or as many as two trainings can take in ``training_seconds``."""
    wanted = max(1, round(options.epochs * len(data.train) / BATCH))
    seconds = step_seconds(copy.deepcopy(model), data.train)
    affordable = max(1, int(options.training_seconds / (2 * seconds)))
    if affordable < wanted:
        console.print(
            f"this machine takes {1e3 * seconds:.0f} ms a step: {affordable} steps instead of {wanted}, "
            f"to train both models within {options.training_seconds:.0f} s (--training-seconds)"
        )
    return Recipe(steps=min(wanted, affordable), seed=options.seed)


def _train_slim(
    traced: TracedModule, data: Dataset, recipe: Recipe, seed: int, console: Console
) -> tuple[TracedModule, TracedModule, float]:
    """Train the captured model with Chase; returns the masked model, the slim one, and the seconds spent training."""
    optimizer = make_optimizer(traced)
    trainer = chase_fx.Chase(
        traced,
        optimizer,
        total_steps=recipe.steps,
        sparsity=WEIGHT_SPARSITY,
        channel_sparsity=CHANNEL_SPARSITY,
        seed=seed,
    )

    def after_step() -> str:
        trainer.step()
        return f"nnz {trainer.nnz:,} channels {sum(trainer.channels_left.values())}"

    seconds = fit(traced, optimizer, data.train, recipe, label="Chase", console=console, after_step=after_step)
    slim = trainer.finalize()
    assert isinstance(slim, TracedModule)
    return traced, slim, seconds


def _measure(
    dense: nn.Module,
    slim: nn.Module,
    seconds: tuple[float, float],
    *,
    data: Dataset,
    recipe: Recipe,
    no_compiler: str | None,
) -> Report:
    batch, models = data.test.images[:LATENCY_BATCH], (dense.eval(), slim.eval())
    eager = median_latencies(models, batch)
    fast: list[float] | tuple[None, None] = (None, None)
    if no_compiler is None:
        fast = median_latencies([compiled(model, batch) for model in models], batch)
    columns = [
        Column(
            accuracy=accuracy(model, data.test),
            parameters=count_parameters(model),
            nonzero=sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
            flops=count_flops(model, batch[:1]),
            eager_seconds=eager[i],
            compiled_seconds=fast[i],
            training_seconds=seconds[i],
        )
        for i, model in enumerate(models)
    ]
    return Report(
        dense=columns[0],
        slim=columns[1],
        data=data.source,
        steps=recipe.steps,
        batch=BATCH,
        seed=recipe.seed,
        latency_batch=len(batch),
        no_compiler=no_compiler,
    )
