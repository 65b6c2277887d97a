"""Decisions by data of which the graph has both ways: it decides again in every call, as the model does."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherPathError
from chase_fx.graphs.branches import follow
from tests.oracle import assert_exact, randomise
from tests.test_draws import same

pytestmark = pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")


class Net(nn.Module):
    """Layers of which subclasses say when they run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)
        self.other = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)

    def layer(self, y: Tensor) -> Tensor:
        return y + self.down(self.drop(F.relu(self.norm(self.up(y)))))


class Left(Net):
    """A layer is left out."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if x.sum() > 0:
            y = self.layer(y)
        return self.last(y)


class Either(Net):
    """One layer or another one, and tensors that only one of them makes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        mask = None
        if (x > 0).all():
            y = self.layer(y)
            mask = x[:, 2:3] > 1
        else:
            y = y + F.relu(self.other(y))
        if mask is not None:
            y = y.masked_fill(mask, 0.5)
        return self.last(y)


class Nested(Net):
    """Decisions inside of others, after them, and by what they made."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if x[0, 0] > 0:
            y = self.layer(y)
            if x[0, 1] > 0:
                y = y + self.other(y)
        else:
            y = y * 0.5
        if (y.mean() > 0) and bool(x[1, 0] < 1):
            y = F.relu(y)
        return self.last(y)


class Written(Net):
    """One way writes in place, to a view and to a buffer; the truth is asked for again after it changed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        positive = x.sum() > 0
        if positive:
            y[:, :3].mul_(2)
            self.seen.add_(1)
            positive.logical_not_()
        if positive:
            y = self.layer(y)
        return self.last(y)


class Asked(Net):
    """The same truth several times, one line that is asked often, and two values from one decision."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        positive = (x > 0).all()
        a, b = (self.layer(y), y) if positive else (y, self.other(y))
        if positive:
            a = a + 1
        return self.last(a), self.last(b).view(x.shape[0], -1)


KINDS = [Left, Either, Nested, Written, Asked]


def signs(a: float, b: float, c: float) -> Tensor:
    x = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 0.1
    x[0, 0], x[0, 1], x[1, 0] = a, b, c
    return x


DATA = [signs(1, 1, 0.5), signs(1, -1, 0.5), signs(-1, 1, 2.0), -signs(1, 1, 1), -signs(1, -1, -1)]


def model_of(kind: Callable[[], nn.Module]) -> nn.Module:
    model = kind().double()
    return randomise(model, (DATA[0],))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("example", [0, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_decide(kind: Callable[[], nn.Module], example: int) -> None:
    """Whatever the example decides; in train mode with the gradients and the statistics of the model."""
    model = model_of(kind)
    traced = chase_fx.trace(model, DATA[example])
    for x in DATA:
        assert_same(copy.deepcopy(model), copy.deepcopy(traced), x)
        same(model, traced, x, range(2))


def assert_same(model: nn.Module, traced: nn.Module, x: Tensor) -> None:
    want, have = model.eval()(x), traced.eval()(x)
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (want, have)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_slim_graphs_decide(kind: Callable[[], nn.Module]) -> None:
    """Both ways are those of the model without the removed channels; other copies of the slim module decide too."""
    model = model_of(kind)
    slim = chase_fx.prune(model, DATA[0], channel_sparsity=0.5)
    assert slim.get_submodule("first").out_features == (5 if kind is Written else 4)
    assert slim.get_submodule("other").out_features == (4 if kind is not Left and kind is not Written else 8)
    again = pickle.loads(pickle.dumps(slim))
    for x in DATA:
        assert_exact(copy.deepcopy(model), copy.deepcopy(slim), (x,))
        assert_same(copy.deepcopy(slim), copy.deepcopy(again), x)


def test_saved_graphs_decide(tmp_path: Path) -> None:
    model = model_of(Nested)
    slim = chase_fx.prune(model, DATA[0], channel_sparsity=0.5)
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    loaded = chase_fx.load(tmp_path / "slim.safetensors", model)
    for x in DATA:
        assert_same(slim, loaded, x)


@pytest.mark.parametrize("kind", [Left, Either, Nested])
@pytest.mark.parametrize("example", [0, 3])
def test_compiled_graphs_go_the_way_of_the_example(kind: Callable[[], nn.Module], example: int) -> None:
    """Without a break: that the data decide as the example did is asserted."""
    model = model_of(kind)
    slim = chase_fx.prune(model, DATA[example], channel_sparsity=0.5)
    torch.compiler.reset()
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    assert torch.equal(compiled(DATA[example]), slim(DATA[example]))
    with pytest.raises(Exception):  # noqa: B017, PT011  (of torch, depending on the backend)
        compiled(DATA[3 - example])


class Raising(Net):
    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError
        return self.last(self.layer(self.first(x)))


class Shaped(Net):
    """What is returned has another form, or another shape."""

    def forward(self, x: Tensor) -> Any:
        y = self.layer(self.first(x))
        return self.last(y) if x.sum() > 0 else (self.last(y), y)


class Cut(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.layer(self.first(x))
        return self.last(y[:2] if x.sum() > 0 else y)


class Often(Net):
    """A loop of decisions."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for row in x.T.flatten():
            if row > 0:
                y = y + self.other(y)
        return self.last(self.layer(y))


@pytest.mark.parametrize("kind", [Raising, Shaped, Cut, Often])
def test_guards_where_both_ways_do_not_fit(kind: Callable[[], nn.Module]) -> None:
    model = model_of(kind)
    traced, slim = chase_fx.trace(model, DATA[0]), chase_fx.prune(model, DATA[0], channel_sparsity=0.5)
    assert_same(model, traced, DATA[0])
    assert_same(model, traced, DATA[0] * 2)
    for module in (traced, slim):
        assert not any(node.target is follow for node in module.graph.nodes)
        with pytest.raises(OtherPathError, match=r"test_both_ways\.py:\d+"):
            module(DATA[3])


def test_guards_and_decisions() -> None:
    """A check that raises stays a guard beside a decision with two ways."""

    class Checked(Left):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise ValueError
            return super().forward(x)

    model = model_of(Checked)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        traced = chase_fx.trace(model, DATA[0])
    assert len(found) == len(traced.info.specialised) == 1
    for x in DATA:
        assert_same(model, traced, x)
    with pytest.raises(OtherPathError):
        traced(DATA[0] * float("nan"))


def test_a_decision_about_nothing_is_none() -> None:
    """Where both ways do the same, nothing is asked."""

    class Idle(Left):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if x.sum() > 0:
                self.where = "positive"
            return self.last(self.layer(y))

    traced = chase_fx.trace(model_of(Idle), DATA[0])
    assert traced.info.specialised == ()
    assert not any(node.op == "call_method" and node.target == "sum" for node in traced.graph.nodes)


def test_data_and_draws() -> None:
    """A layer that a draw leaves out in train mode, in a net that data decide about."""

    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if not self.training or torch.rand(()) < 0.6:
                y = self.layer(y)
            if x.sum() > 0:
                y = y + self.other(y)
            return self.last(y)

    model = model_of(Both)
    for example in (0, 3):
        traced = chase_fx.trace(model, DATA[example])
        for x in DATA:
            assert_same(model, traced, x)
            same(model, traced, x)


class Equal(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = x[:, :1].sqrt()  # NaN for negative numbers, and no NaN equals another one
        return self.last(self.other(y) if torch.equal(z, z.clone()) else y)


class Data(Net):
    def forward(self, x: Tensor) -> Tensor:
        y, positive = self.first(x), x[0, 0] > 0
        if positive:
            y = self.other(y)
        positive.data.logical_not_()  # a write that torch's version of a tensor leaves out
        return self.last(F.relu(y) if positive else y)


@pytest.mark.parametrize("kind", [Equal, Data])
def test_truths_are_those_of_the_model(kind: Callable[[], nn.Module]) -> None:
    model = model_of(kind)
    traced = chase_fx.trace(model, DATA[0])
    for x in DATA:
        assert_same(model, traced, x)


class Flags(Net):
    """Python remembers what was decided: something happens for some combinations only."""

    def forward(self, x: Tensor) -> Tensor:
        y, found = self.first(x), ""
        for number, truth in enumerate((x[0, 0] > 0, x[0, 1] > 0)):
            found += str(number) if truth else ""
        if found == "01" and x.shape[0] > 5:
            y = self.other(y)
        return self.last(y)


class Apart(Flags):
    """Likewise, with a line for each decision."""

    def forward(self, x: Tensor) -> Tensor:
        y, a, b = self.first(x), False, False
        if x[0, 0] > 0:
            a = True
        if x[0, 1] > 0:
            b = True
        if a and b and x.shape[0] > 5:
            y = self.other(y)
        return self.last(y)


class Four(Net):
    """As many decisions as are captured in all combinations, each at a place of its own."""

    wanted = (0, 1)

    def decide(self, x: Tensor) -> list[int]:
        found = []
        if x[0, 0] > 0:
            found.append(0)
        if x[0, 1] > 0:
            found.append(1)
        if x[1, 0] > 0:
            found.append(2)
        if x[1, 1] > 0:
            found.append(3)
        return found

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.other(y) if tuple(self.decide(x)) == self.wanted else y)


class Six(Four):
    """More of them."""

    wanted = (0, 1, 4)

    def decide(self, x: Tensor) -> list[int]:
        found = super().decide(x)
        if x[0, 2] > 0:
            found.append(4)
        if x[1, 2] > 0:
            found.append(5)
        return found


@pytest.mark.parametrize("kind", [Flags, Apart, Four, Six])
def test_what_combinations_decide_is_never_left_out(kind: Callable[[], nn.Module]) -> None:
    """Also where they only ask for a size, and where no two decisions show it."""
    model = model_of(kind)
    traced = chase_fx.trace(model, -DATA[0])
    assert_same(model, traced, -DATA[0])
    for a, b in ((1, 1), (1, -1), (-1, 1)):
        x = signs(a, b, -1).repeat(2, 1)
        x[1, :3], x[0, 2] = -1, 1
        try:
            assert_same(model, traced, x)
        except OtherPathError:
            continue


class ByChannels(Net):
    """The channels decide: without some of them, others would."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.max() < -1:
            y = F.relu(self.other(y))
        return self.last(y)


def test_channels_that_decide_stay() -> None:
    model = model_of(ByChannels)
    traced = chase_fx.trace(model, DATA[0])
    channels = chase_fx.analyze(traced)
    assert "max" in channels.frozen["first.weight", 0]
    assert not any(member.tensor == "first.weight" for group in channels.groups for member in group.members)
