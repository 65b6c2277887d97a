"""How sparse training spreads its weights over channels: the observation that Chase is built on, as a plot.

Trains a ResNet-20 on Fashion-MNIST (scikit-learn's digits where it cannot be had) at 90 % weight sparsity with RigL or
SET, and follows the density of every filter relative to the density of its layer. Yin et al. (arXiv 2305.19454, section
3.1) report that early in training a large share of channels becomes much sparser than the rest: the "sparse amenable
channels". Needs ``pip install matplotlib``.

Run it with ``python examples/channel_density.py --method RigL --epochs 10``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chase_fx.data import Dataset, load_digits, load_images
from chase_fx.models import ResNet20
from chase_fx.sparse import SET, RigL, SparseTrainer

METHODS: dict[str, type[RigL | SET]] = {"RigL": RigL, "SET": SET}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
AMENABLE = 0.5  # a filter with less than half of its layer's density counts as sparse


@dataclass
class Spread:
    """Density of filters over their layer's density, through training.

    Attributes:
        steps: when it was looked at.
        quantiles: per look one number per QUANTILES, over the filters of all layers.
        amenable: per look the share of filters below AMENABLE.
        layers: layer -> per look the standard deviation over its filters.
    """

    steps: list[int] = field(default_factory=list)
    quantiles: list[list[float]] = field(default_factory=list)
    amenable: list[float] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)

    def look(self, step: int, trainer: SparseTrainer) -> None:
        """Add what the masks are like now."""
        relative = {name: density(mask) for name, mask in trainer.masks.items() if 0 < mask.float().mean() < 1}
        together = torch.cat(list(relative.values()))
        self.steps.append(step)
        self.quantiles.append(together.quantile(torch.tensor(QUANTILES)).tolist())
        self.amenable.append(float((together < AMENABLE).float().mean()))
        for name, values in relative.items():
            self.layers.setdefault(name, []).append(float(values.std(correction=0)))


def density(mask: Tensor) -> Tensor:
    """Density of each filter over that of the layer; (O, I, *kernel) -> (O,), 1 on average."""
    filters = mask.flatten(1).float().mean(1)
    return filters / filters.mean()


def train(data: Dataset, method: str, *, steps: int, batch: int, looks: int, sparsity: float, seed: int) -> Spread:
    """Train for ``steps`` steps and look ``looks`` times, the first and the last mask included."""
    torch.manual_seed(seed)
    model = ResNet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trainer = METHODS[method](model, optimizer, total_steps=steps, sparsity=sparsity, seed=seed)
    spread, due = Spread(), {round(i * steps / looks) for i in range(looks + 1)}
    spread.look(0, trainer)
    order = torch.randperm(len(data.train))
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(data.train))
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss = cross_entropy(model(data.train.images[rows]), data.train.labels[rows])
        loss.backward()
        optimizer.step()
        trainer.step()
        schedule.step()
        if step in due:
            spread.look(step, trainer)
            print(
                f"step {step}: loss {loss.item():.3f}, {spread.amenable[-1]:.1%} of the filters below half the density "
                f"of their layer",
                flush=True,
            )
    return spread


def draw(spreads: dict[str, Spread], path: Path, title: str) -> None:
    """Bands of quantiles per method, the share of sparse filters, and the spread per layer."""
    import matplotlib as mpl

    mpl.use("Agg")  # a file is all that is wanted; no display is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(spreads), 3, figsize=(15, 4 * len(spreads)), squeeze=False, layout="constrained")
    for (method, spread), (left, middle, right) in zip(spreads.items(), axes, strict=True):
        low, lower, median, upper, high = zip(*spread.quantiles, strict=True)
        left.fill_between(spread.steps, low, high, alpha=0.2, label="5 to 95 %")
        left.fill_between(spread.steps, lower, upper, alpha=0.4, label="25 to 75 %")
        left.plot(spread.steps, median, label="median")
        left.set(title=f"{method}: density of filters", ylabel="over their layer's density", xlabel="step")
        left.legend()
        middle.plot(spread.steps, [100 * share for share in spread.amenable])
        middle.set(title=f"filters below {AMENABLE} of it", ylabel="%", xlabel="step", ylim=(0, None))
        for name, values in spread.layers.items():
            right.plot(spread.steps, values, label=name, linewidth=0.8)
        right.set(title="standard deviation in each layer", xlabel="step")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train with each method asked for, and write the plot and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=sorted(METHODS), default=["RigL", "SET"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--looks", type=int, default=60, help="how often the masks are looked at")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", action="store_true", help="train on scikit-learn's digits")
    parser.add_argument("--output", type=Path, default=Path("channel_density.png"))
    options = parser.parse_args(arguments)
    data = load_digits() if options.digits else load_images()
    steps = options.steps or options.epochs * (len(data.train) // options.batch)
    print(f"{data.name} ({data.source}), {steps} steps")
    spreads = {
        method: train(
            data, method, steps=steps, batch=options.batch, looks=options.looks, sparsity=options.sparsity,
            seed=options.seed,
        )
        for method in options.method
    }  # fmt: skip
    draw(spreads, options.output, f"ResNet-20 on {data.name}, {options.sparsity:.0%} of the weights zero")
    numbers = {method: vars(spread) for method, spread in spreads.items()}
    options.output.with_suffix(".json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    print(f"plot in {options.output}, numbers in {options.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
