"""Capture of forwards that do more than call layers."""

from __future__ import annotations

import builtins
import functools
import runpy
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import EXACT, difference, masked_copy, randomise
from tests.two_layers import Body

EXAMPLES = Path(__file__).parent.parent / "examples"


class Store:
    """A result that is an object, as key-value caches are."""

    def __init__(self) -> None:
        self.items: list[Tensor] = []


def test_objects_are_rebuilt_and_freeze_nothing() -> None:
    """Tensors inside an object of the result shrink with the model and are new at every call."""

    class Net(Body):
        def forward(self, x: Tensor) -> dict[str, Any]:
            store = Store()
            store.items.append(self.a(x))
            return {"y": self.b(store.items[0]), "store": store}

    x = torch.randn(3, 4)
    net = Net()
    traced = chase_fx.trace(net, x)
    assert torch.equal(traced(x)["store"].items[0], net(x)["store"].items[0])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    chase_fx.verify(traced, slim)
    first, second = slim(x)["store"], slim(x)["store"]
    assert isinstance(first, Store)
    assert first is not second
    assert first.items[0].shape == (3, 4)


def test_arguments_reach_a_decorated_forward_as_they_were_given() -> None:
    """A decorator that looks at its keyword arguments sees those that were given, and no others."""

    def decorated(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            kwargs["scale"] = kwargs.get("scale") or 2.0
            return forward(self, *args, **kwargs)

        return wrapper

    class Net(Body):
        @decorated
        def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
            assert scale is not None
            return self.b(self.a(x)) * scale

    net, x = Net(), torch.randn(3, 4)
    for kwargs in ({}, {"scale": 3.0}):
        traced = chase_fx.trace(net, x, kwargs)
        assert torch.equal(traced(x, **kwargs), net(x, **kwargs))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """A model that holds what can't be copied gives a clear error."""
    net = nn.Linear(4, 2)
    net.extra = threading.Lock()
    with pytest.raises(CaptureError, match="can't be copied"):
        chase_fx.trace(net, torch.zeros(1, 4))


@pytest.mark.parametrize("example", ["custom_leaf", "custom_operator"])
def test_examples_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of extension run and end with an exact result."""
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert "exact: 1 outputs" in capsys.readouterr().out


def test_declared_leaf_stays_whole() -> None:
    """A class named in ``leaves`` is one node of the graph, and its size attributes follow its tensors."""
    names = runpy.run_path(str(EXAMPLES / "custom_leaf.py"))
    cosine, sizes = names["CosineLinear"], names["SIZES"]
    net = nn.Sequential(cosine(4, 8), nn.ReLU(), cosine(8, 2)).double()
    traced = chase_fx.trace(net, torch.randn(3, 4, dtype=torch.float64), leaves=sizes)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    chase_fx.verify(traced, slim)
    assert (slim.get_submodule("0").out_features, slim.get_submodule("2").in_features) == (4, 4)


def test_script_modules_are_refused() -> None:
    """A TorchScript module gives a clear error."""
    with pytest.warns(FutureWarning, match="deprecated"):
        script = torch.jit.trace(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(CaptureError, match="TorchScript"):
        chase_fx.trace(script, torch.zeros(1, 4))


RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers(kind: str, dtype: torch.dtype) -> None:
    """Hidden units of a recurrent layer go from every gate at once."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = RECURRENT[kind](4, 8, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    net, x = Net().to(dtype), torch.randn(3, 5, 4, dtype=dtype)
    traced = chase_fx.trace(net, x)
    torch.testing.assert_close(traced(x), net(x))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    assert chase_fx.verify(traced, slim).difference <= (1e-9 if dtype is torch.float64 else 1e-5)
    assert slim.get_submodule("rnn").hidden_size == 4
    assert slim(torch.randn(2, 5, 4, dtype=dtype)).shape == (2, 5, 2)


class Counting(nn.Module):
    """Rows are sorted by a router, and split into as many as it gave to each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(5, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen = self.router(x).argmax(-1)
        order = chosen.argsort(stable=True)
        parts = x[order].split(torch.bincount(chosen, minlength=2).tolist())
        y = torch.cat([layer(part) for layer, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(y).index_copy(0, order, y) * (chosen.max().item() + 1)


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
def test_numbers_read_from_data_are_read_again() -> None:
    """What the router of the slim module decides counts, not what that of the dense one did."""
    torch.manual_seed(3)
    model = randomise(Counting())
    x = torch.randn(40, 5, dtype=torch.float64)
    traced = chase_fx.trace(model, (x,))
    slim = chase_fx.prune(model, (x,))
    for rows in (x, torch.randn(30, 5, dtype=torch.float64)):
        assert torch.equal(traced(rows), model(rows))
        assert difference(masked_copy(model, slim.plan.kept_indices())(rows), slim(rows)) <= EXACT


class Spare(nn.Module):
    """A mask over more places than there are experts, looped over at the chosen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.experts = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen = self.router(x).argmax(-1)
        mask = F.one_hot(chosen, 4).T
        y = x.new_zeros(x.shape[0], 6)
        for place in mask.sum(-1).gt(0).nonzero():
            (rows,) = torch.where(mask[place[0]])
            y = y.index_add(0, rows, x[rows] @ self.experts[place[0]])
        return self.last(y)


def test_a_loop_is_unrolled_for_the_places_that_its_body_can_serve() -> None:
    torch.manual_seed(0)
    model = randomise(Spare())
    x = torch.randn(1, 5, dtype=torch.float64)  # a single row, which chooses a single expert
    traced = chase_fx.trace(model, (x,))
    slim = chase_fx.prune(model, (x,))
    rows = torch.randn(30, 5, dtype=torch.float64)
    assert torch.equal(traced(rows), model(rows))
    assert difference(masked_copy(model, slim.plan.kept_indices())(rows), slim(rows)) <= EXACT


def test_loops_are_unrolled_where_the_forward_asks_for_autocast() -> None:
    """Then a second capture runs inside a region, whose results are of another type."""

    class Asking(Spare):
        def forward(self, x: Tensor) -> Tensor:
            off = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
            with off:
                x = x * 2
            return super().forward(x)

    torch.manual_seed(0)
    model, rows = randomise(Asking()).float(), torch.randn(30, 5)
    traced = chase_fx.trace(model, rows[:1])
    assert torch.equal(traced(rows), model(rows))


def _backwards(items: list[int], entered: threading.Event, go_on: threading.Event) -> list[int]:
    entered.set()
    go_on.wait(60)
    return [max(item, 0) for item in items[::-1]]


def test_threads_may_leave_functions_of_the_forward_after_the_capture() -> None:
    """The functions are everybody's: a thread that is inside of one during a capture goes on as if there were none."""
    entered, go_on, found = threading.Event(), threading.Event(), []

    class Calling(Body):
        def forward(self, x: Tensor) -> Tensor:
            if not entered.is_set():
                thread.start()
                entered.wait(60)
            return self.b(self.a(x) * _backwards([1, 2], entered, after)[0])

    after = threading.Event()
    after.set()
    thread = threading.Thread(target=lambda: found.append(_backwards([1, 2, 3], entered, go_on)))
    original = builtins.__import__
    chase_fx.trace(Calling(), torch.randn(3, 4))
    go_on.set()
    thread.join()
    assert found == [[3, 2, 1]]
    chase_fx.trace(Calling(), torch.randn(3, 4))
    assert builtins.__import__ is original
    assert not any(name.startswith("_chase_live_") for name in vars(builtins))
