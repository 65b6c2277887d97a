"""Layers that random draws leave out in train mode: the graph decides again in every call, as the model does."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from random import random as number
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from chase_fx.graphs.branches import begin
from tests.oracle import randomise
from tests.test_draws import SEEDS, run, same

Draw = Callable[[], Any]
DRAWS: dict[str, Draw] = {
    "torch": lambda: torch.rand([]),
    "item": lambda: torch.rand(1).item(),
    "python": lambda: random.random() * 1.0,
    "numpy": lambda: 1.0 * np.random.random(),
    "rand": lambda: float(np.random.rand()),
    "sample": lambda: np.random.random_sample(),  # noqa: PLW0108 - looked up when it is called
    "uniform": lambda: random.uniform(0, 1),
    "imported": number,
    "name": lambda: 1 - number(),
}


class Block(nn.Module):
    """A residual layer with dropout and a batch norm, which train mode moves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, 12), nn.BatchNorm1d(12), nn.Linear(12, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.relu(self.norm(self.up(x)))))


class Stack(nn.Module):
    """Subclasses say how the layers are run."""

    def __init__(self, draw: Draw = DRAWS["torch"], depth: int = 4, p: float = 0.4) -> None:
        super().__init__()
        self.draw, self.p = draw, p
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Block(8) for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        for layer in self.layers:
            if self.training and self.draw() < self.p:
                continue
            y = layer(y)
        return self.last(y)


def batch() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", list(DRAWS))
def test_layers_left_out(draw: str) -> None:
    model = randomise(Stack(DRAWS[draw]))
    traced = chase_fx.trace(model, batch())
    assert torch.equal(traced.eval()(batch()), model.eval()(batch()))
    same(model, traced, batch())


class Asked(Stack):
    """As the encoders of transformers ask, twice and with the outcome in a variable; results for every layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        states: tuple[Tensor, ...] = (y,)
        weights: tuple[Tensor | None, ...] = ()
        for layer in self.layers:
            skip = self.training and self.draw() <= self.p
            outputs: tuple[Any, Any]
            if not skip:
                z = layer(y)
                outputs = z, z.softmax(-1)
            if skip:
                outputs = y, None
            y = outputs[0]
            states += (y,)
            weights += (outputs[1],)
        return self.last(y), *states, *weights


class Nested(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            if self.training and self.draw() < self.p:
                if self.draw() < 0.5:
                    y = y * 0.9
                continue
            y = layer(y)
            if self.training and self.draw() < self.p:
                y = y + torch.randn_like(y)
        return self.last(y)


class EitherWay(Stack):
    """One layer or another one, of which each has its own statistics; a number and a size are drawn too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for a, b in zip(self.layers[::2], self.layers[1::2], strict=True):
            if not self.training:
                y = a(y) + b(y)
            elif self.draw() < 0.5:
                y = a(y).view(x.shape[0], -1)
            else:
                y = b(y) * (1 + self.draw())
        return self.last(y)


class EncoderDecoder(Stack):
    """States of an encoder that is cut short go into each layer of a decoder; parts of a layer are left out."""

    def __init__(self, draw: Draw = DRAWS["torch"]) -> None:
        super().__init__(draw, 2)
        self.attention = nn.ModuleList(nn.MultiheadAttention(8, 2, 0.1, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[:, None]
        memory = y * 2
        for layer in self.layers:
            if not self.training or self.draw() > self.p:
                memory = layer(memory[:, 0])[:, None]
        for attention in self.attention:
            if not (self.training and self.draw() < self.p):
                y = y + attention(y, memory, memory, need_weights=False)[0]
        return self.last(y.flatten(1))


class InPlace(Stack):
    """Layers write to their input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            if not self.training or self.draw() > self.p:
                y += layer(y.clone())
        return self.last(y)


class Ahead(Stack):
    """The draws of all layers are made first, so what they decide about lies across."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        runs = [not self.training or bool(self.draw() > self.p) for _ in self.layers]
        for layer, on in zip(self.layers, runs, strict=True):
            if on:
                y = layer(y)
        return self.last(y)


class Averaged(Stack):
    """How many layers ran is a plain number, so there are as many ways to the end as combinations."""

    def forward(self, x: Tensor) -> Tensor:
        y, runs = self.first(x), 0
        for layer in self.layers:
            if self.training and self.draw() < self.p:
                continue
            y, runs = layer(y), runs + 1
        return self.last(y) / (1 + runs)


class Counted(Stack):
    """What comes out depends on how many layers ran."""

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        states = []
        for layer in self.layers:
            if self.training and self.draw() < self.p:
                continue
            y = layer(y)
            states.append(y)
        return self.last(y), *states


class States:
    """What layers hand out, as the key-value caches of transformers."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []


class Cached(Stack):
    """Each layer that runs hands out what is made in its middle, so that two draws decide about the last one."""

    def forward(self, x: Tensor) -> Any:
        y, states = self.first(x), States()
        for layer in self.layers:
            if self.training and self.draw() < self.p:
                continue
            states.found.append(y.tanh())
            y = layer(y)
        return self.last(y), states


class Opened(nn.Module):
    """Gives the states as tensors."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, states = self.root(x)
        return y, *states.found


def test_overlaps() -> None:
    model = randomise(Cached())
    traced = chase_fx.trace(model, batch())
    same(Opened(model), Opened(traced), batch(), range(25))
    slim = chase_fx.prune(model, batch(), channel_sparsity=0.5).train()
    seen = {len(Opened(slim)(batch())) for _ in range(25)}
    assert len(seen) > 3
    assert slim.get_submodule("first").out_features == 4


@pytest.mark.parametrize("kind", [Asked, Nested, EitherWay, EncoderDecoder, InPlace, Ahead, Averaged, Counted])
@pytest.mark.parametrize("draw", ["torch", "python", "numpy"])
def test_forms_of_layerdrop(kind: type[Stack], draw: str) -> None:
    model = randomise(kind(DRAWS[draw]))
    traced = chase_fx.trace(model, batch())
    same(model, traced, batch(), range(25))
    same(model, traced, torch.cat([batch(), batch()]), range(5))


def test_copies_decide_too() -> None:
    """Copied, pickled, and in another precision."""
    model = randomise(Asked())
    traced = chase_fx.trace(model, batch())
    same(model, pickle.loads(pickle.dumps(traced)), batch())
    same(copy.deepcopy(model).float(), copy.deepcopy(traced).float(), batch().float())


def test_slim_graphs_decide() -> None:
    """Each outcome of a slim graph is that of a slim graph made from the model without the layers left out."""
    model = randomise(Stack(depth=3))
    slim = chase_fx.prune(model, batch(), channel_sparsity=0.5)
    seen = set()
    for seed in SEEDS:
        torch.manual_seed(seed)
        outputs, gradients, _, _ = run(slim.train(), batch(), seed)
        layers = frozenset(n.split(".")[1] for n in gradients if n.startswith("layers"))
        seen.add(layers)
        assert outputs[0].shape == (5, 3)
    assert len(seen) > 3
    assert slim.get_submodule("first").out_features == 4


def test_both_ways_couple_channels() -> None:
    """A layer that eval mode never runs goes with the stream that it writes to."""

    class Extra(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if self.training and self.draw() < 0.5:
                y = y + self.layers[0](y)
            return self.last(y)

    model = randomise(Extra())
    slim = chase_fx.prune(model, batch(), channel_sparsity=0.5)
    assert slim.get_submodule("layers.0.down").out_features == slim.get_submodule("first").out_features == 4
    for seed in SEEDS:
        run(slim.train(), batch(), seed)


def test_eval_mode_is_as_without() -> None:
    plain, dropped = randomise(Stack(p=-1.0)), randomise(Stack())
    plain, dropped = (chase_fx.trace(m, batch()) for m in (plain, dropped))
    assert [n.target for n in plain.graph.nodes] == [n.target for n in dropped.graph.nodes]
    groups = [[g.name for g in chase_fx.analyze(m).groups] for m in (plain, dropped)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("draw", ["torch", "item", "sample", "uniform", "imported"])
def test_layers_that_no_draw_leaves_out(draw: str) -> None:
    """With a chance of 0 there is nothing to decide; numbers are drawn all the same."""
    model = randomise(Stack(DRAWS[draw], depth=9, p=0.0))
    traced = chase_fx.trace(model, batch())
    assert not any(node.target is begin for node in traced.train_graph.nodes)
    same(model, traced, batch(), range(3))


class Negative(Stack):
    """Draws that can be below zero, or zero."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        number = torch.rand([])
        number -= 0.5
        for k, layer in enumerate(self.layers):
            drawn = (number, torch.rand([]) - 0.5, random.uniform(-1, 1), -random.random())[k]
            if self.training and drawn < (0.0, 0.0, 0.0, -0.5)[k]:
                continue
            y = layer(y)
        return self.last(y)


def test_draws_below_zero_decide() -> None:
    model = randomise(Negative())
    traced = chase_fx.trace(model, batch())
    assert sum(node.target is begin for node in traced.train_graph.nodes) == 4
    same(model, traced, batch(), range(25))


class Together(Stack):
    """At least one layer runs: what one draw decides depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        y, runs = self.first(x), 0
        for k, layer in enumerate(self.layers):
            if self.training and self.draw() < self.p and (k + 1 < len(self.layers) or runs):
                continue
            y, runs = layer(y), runs + 1
        return self.last(y)


@pytest.mark.parametrize("model", [Together(), Ahead(depth=7), Averaged(depth=7), Cached(depth=7), Counted(depth=7)])
def test_draws_that_decide_together_are_refused(model: Stack) -> None:
    randomise(model)
    torch.manual_seed(0)  # some draws of the example show fewer ways
    traced = chase_fx.trace(model, batch())
    traced.eval()(batch())
    with pytest.raises(
        CaptureError, match=r"no train mode: random draws decide which code runs.*test_layerdrop\.py:\d+"
    ):
        traced.train()(batch())
