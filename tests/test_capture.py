"""Capture of forwards that do more than call layers."""

from __future__ import annotations

import builtins
import copy
import functools
import math
import runpy
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import EXACT, difference, masked_copy, randomise

EXAMPLES = Path(__file__).parent.parent / "examples"


class Body(nn.Module):
    """Two linear layers; subclasses say what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 2)


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    module.zero_grad()
    module(x).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same_gradients(model: nn.Module, x: Tensor) -> None:
    traced = chase_fx.trace(model, x)
    ours, theirs = gradients(traced, x), gradients(model, x)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        have = ours[name]
        assert (have is None) == (want is None), name
        assert want is None or torch.equal(have, want), name


def test_gradients_stop_where_the_forward_disables_them() -> None:
    """A parameter that is only read under no_grad gets no gradient from the traced module either."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.a(x).sigmoid()
            return self.b(gate * self.a.weight.sum(1))

    assert_same_gradients(Net().double(), torch.randn(3, 4, dtype=torch.float64))


def test_a_write_without_gradients_cuts_nothing_off() -> None:
    """A parameter that is clamped in place under no_grad still gets its gradient."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.a.weight.clamp_(-0.1, 0.1)
            return self.b(F.linear(x, self.a.weight))

    assert_same_gradients(Net().double(), torch.randn(3, 4, dtype=torch.float64))


class Halved(torch.autograd.Function):
    """Identity whose gradient is halved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5


def test_custom_backward_is_kept() -> None:
    """A custom autograd function keeps its own backward, and its channels are pruned."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(Halved.apply(self.a(x)))

    net, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    assert_same_gradients(net, x)
    assert chase_fx.prune(net, x).get_submodule("a").out_features == 4


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


def test_train_mode_that_fails_is_refused_in_train_mode_only() -> None:
    """Where the model can't run in train mode, the graph works in eval mode and says why it does not train."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("no labels")
            return self.b(self.a(x))

    net, x = Net().eval(), torch.randn(3, 4)
    traced = chase_fx.trace(net, x)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(CaptureError, match="no labels"):
        traced.train()(x)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """A model that holds what can't be copied gives a clear error."""
    net = nn.Linear(4, 2)
    net.extra = threading.Lock()
    with pytest.raises(CaptureError, match="can't be copied"):
        chase_fx.trace(net, torch.zeros(1, 4))


class _Stale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.extra = self.a.weight * 2

    def forward(self, x: Tensor, use: bool) -> Tensor:
        return F.linear(self.a(x), self.extra if use else self.a.weight)


def test_a_tensor_computed_before_the_capture_is_no_constant() -> None:
    """What was computed from parameters may be there; a forward that uses it as it is would not follow them."""
    net, x = _Stale(), torch.ones(1, 4)
    assert torch.equal(chase_fx.trace(net, (x, False))(x, False), net(x, False))
    with pytest.raises(CaptureError, match=r"'extra' .*computed from parameters before"):
        chase_fx.trace(net, (x, True))


def test_a_spread_keeps_two_units() -> None:
    """A dim whose variance is taken keeps two units at any sparsity: of one there is none."""

    class Standardised(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
            )
            return F.conv1d(x, weight.reshape_as(self.weight), self.bias)

    net = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), Standardised(8, 6, 1), nn.ReLU(), nn.Conv1d(6, 2, 1)).double()
    slim = chase_fx.prune(net, torch.randn(2, 3, 5, dtype=torch.float64), channel_sparsity=0.9)
    assert slim.get_parameter("0.weight").shape[0] == 2
    assert slim.get_parameter("2.weight").shape[0] == 1


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


def test_a_custom_backward_compiles() -> None:
    """A graph with an autograd function compiles without a break."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(Halved.apply(self.a(x)))

    x = torch.randn(3, 4)
    slim = chase_fx.prune(Net(), x)
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), slim(x))


class Counted(nn.Module):
    """Sizes that are computed from an image's, in ways that Python code does."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) * self.scale(y)


@pytest.mark.parametrize(
    "scale",
    [
        lambda y: 100 / y.numel(),
        lambda y: y.numel() // y.shape[0] + 0.5,
        lambda y: math.sqrt(y.shape[2]),
        lambda y: math.ceil(y.shape[2] / 3) + math.floor(y.shape[3] / 3),
        lambda y: abs(y.shape[2] - 2 * y.shape[3]) + round(y.shape[2] * 0.3) + (y.shape[3] >> 1),
    ],
)
def test_computed_sizes_stay_live(scale: Any) -> None:
    """Counts and sizes keep their dense meaning in the slim graph, at every batch and image size."""
    net = Counted(scale).double()
    traced = chase_fx.trace(net, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    dense = Counted(scale).double()
    dense.load_state_dict(net.state_dict())
    kept = slim.plan.kept_indices()["b.weight"][1]
    with torch.no_grad():
        gone = [i for i in range(8) if i not in kept.tolist()]
        dense.b.weight[:, gone] = 0
    for shape in ((4, 3, 8, 8), (1, 3, 8, 8), (6, 3, 12, 10)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slim(x), dense(x), rtol=1e-9, atol=1e-9)


def test_computed_group_counts_scale() -> None:
    """A convolution with batch x channels groups works at another batch size after pruning."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.k = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(8, 72)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            b, c, h, w = y.shape
            kernels = self.k(y.mean((2, 3))).view(b * c, 1, 3, 3)
            return self.b(F.conv2d(y.reshape(1, b * c, h, w), kernels, padding=1, groups=b * c).view(b, c, h, w))

    slim = chase_fx.prune(Net().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert slim.get_submodule("a").out_channels == 4
    assert slim(torch.randn(5, 3, 6, 6, dtype=torch.float64)).shape == (5, 4, 6, 6)


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


def test_buffers_that_the_forward_assigns_are_written() -> None:
    """``self.buffer = value`` changes the state of the traced and the slim module as it changes the model's."""

    class Net(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            return self.b(y - self.mean)

    net = Net().double()
    traced = chase_fx.trace(net, torch.randn(3, 4, dtype=torch.float64))
    assert not traced.get_buffer("mean").any()
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    for _ in range(3):
        x = torch.randn(3, 4, dtype=torch.float64)
        assert torch.equal(traced(x), net(x))
        slim(x)
    assert torch.equal(traced.get_buffer("mean"), net.mean)
    kept = slim.plan.kept_indices()["mean"][0]
    torch.testing.assert_close(slim.get_buffer("mean"), net.mean[kept].detach(), rtol=1e-12, atol=1e-12)


@functools.lru_cache
def heads_of(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """Sizes that are computed once for each shape, as einops does."""
    return (*shape[:-1], heads, shape[-1] // heads)


def test_cached_functions_of_sizes_keep_them_live() -> None:
    """A cache of shapes that an earlier forward filled does not tie the graph to that forward's sizes."""

    class Net(Body):
        @functools.lru_cache  # noqa: B019
        def rows(self, shape: tuple[int, ...]) -> int:
            return shape[0] * shape[1]

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y.reshape(heads_of(y.shape, 2)).softmax(-2)
            return self.b(y.reshape(self.rows(y.shape), 8))

    model = Net().double()
    small, large = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 7, 4, dtype=torch.float64)
    model(small)
    slim = chase_fx.prune(model, small)
    assert torch.equal(chase_fx.trace(model, small)(large), model(large))
    assert slim(large).shape == (35, 2)
    assert all(type(size) is int for size in heads_of((2, 3, 8), 2))


class Doubled(torch.autograd.Function):
    """A custom function that ``vmap`` makes one of its own of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Mapped(nn.Module):
    """A mask made for one pair of places at a time, and a layer applied to one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[0])
        ahead = torch.vmap(torch.vmap(lambda i, j: j <= i, (None, 0)), (0, None))(places, places)
        x = torch.vmap(lambda row: Doubled.apply(self.middle(row)[:6].relu()) * row[2:].sum())(self.first(x))
        return self.last(F.pad(ahead.to(x.dtype) @ x, (0, 2)))


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
def test_what_the_torch_api_does_not_show_is_written_as_aten_calls() -> None:
    """Inside ``vmap`` channels shrink too, and where its views only insert dims the graph takes other sizes."""
    model = randomise(Mapped())
    x = torch.randn(4, 5, dtype=torch.float64)
    traced = chase_fx.trace(model, (x,))
    slim = chase_fx.prune(model, (x,))
    assert slim.plan.new_shape("middle.weight") == (5, 4)  # nothing reads the last two rows
    for batch in (4, 7):
        x = torch.randn(batch, 5, dtype=torch.float64)
        assert torch.equal(traced(x), model(x))
        assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
def test_a_dim_that_the_function_of_a_vmap_does_not_use() -> None:
    """It is added where the last vmap ends, by views that the torch API does not show either."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            allowed = x.sum(-1) > 0
            mask: Any = lambda sample, _head, place: allowed[sample, place]  # noqa: E731
            for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
                mask = torch.vmap(mask, in_dims=dims)
            found = mask(torch.arange(x.shape[0]), torch.arange(1), torch.arange(x.shape[1]))
            return self.last((self.first(x) * found[:, 0, :, None]).relu())

    model = Masked()
    traced = chase_fx.trace(model, torch.randn(2, 4, 5))
    for batch, places in ((2, 4), (3, 4), (2, 6), (1, 4)):
        x = torch.randn(batch, places, 5)
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_that_of_the_model(training: bool) -> None:
    """A feature extractor, whose copies come in train mode, is captured and given back in its own mode."""
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    net = create_feature_extractor(body, ["1", "2"]).train(training)
    x = torch.randn(3, 4)
    traced = chase_fx.trace(net, x)
    assert {m.training for m in traced.modules()} == {training}
    assert torch.equal(traced(x)["2"], net(x)["2"])


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


def test_types_of_python_are_dtypes() -> None:
    """``dtype=int`` can be written to generated code."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * torch.ones(1, dtype=float) + torch.ones(2, dtype=int)

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(chase_fx.trace(model, x)(x), model(x))


def test_a_forward_that_writes_to_its_input() -> None:
    """The example inputs are left as they were, and the graph writes to its own input as the model does."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            x *= 3
            return self.b(self.a(x))

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = x.clone()
    traced = chase_fx.trace(model, x)
    assert torch.equal(x, before)
    assert torch.equal(traced(x), model(before))
    assert torch.equal(x, before)


def test_tensors_as_bounds_of_slices() -> None:
    """Two halves that a tensor of one number tells apart keep the same channels."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            half = torch.tensor([4])
            x = self.a(x)
            return self.b(torch.cat([x[:, : half[0]].tanh() * x[:, half[0] :].sigmoid()] * 2, 1))

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    slim = chase_fx.prune(model, (x,))
    assert slim.plan.new_shape("a.weight") == (4, 4)
    assert difference(masked_copy(model, slim.plan.kept_indices())(x), slim(x)) <= EXACT


@pytest.mark.parametrize("name", ["code", "graph", "meta", "plan", "info", "recompile", "train_graph"])
def test_children_with_names_of_a_graph_module(name: str) -> None:
    """A layer or a parameter may be called what a GraphModule calls its source, and keeps its name in the state."""

    class Model(Body):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(getattr(self, name)(self.a(x)))

    class Bare(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(8)))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * getattr(self, name))

    x = torch.randn(3, 4, dtype=torch.float64)
    for model in (Model().double(), Bare().double()):
        slim = chase_fx.prune(model, x)
        assert set(slim.state_dict()) == set(model.state_dict())
        assert slim.a.out_features == 4
        again = copy.deepcopy(slim)
        assert torch.equal(again(x), slim(x))
        assert torch.equal(torch.compile(slim, backend="eager", fullgraph=True)(x), slim(x))


def test_parameters_that_a_forward_writes_are_put_back() -> None:
    """A moving average that a training forward writes to a parameter's data is in neither the model nor its copies."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training:
                self.b.weight.data.mul_(0.9).add_(0.1 * y.detach().mean(0))
            return self.b(y)

    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    before = model.b.weight.clone()
    traced = chase_fx.trace(model, x)
    assert torch.equal(model.b.weight, before)
    assert torch.equal(traced.b.weight, before)
    assert torch.equal(traced.train()(x), model.train()(x))
    assert torch.equal(traced.b.weight, model.b.weight)


def test_a_function_that_holds_on_to_the_model() -> None:
    """A lambda of the model reads the copy's weights in a graph: they are tied, trained and pruned as in the model."""

    class Model(Body):
        def __init__(self) -> None:
            super().__init__()
            self.to_input = lambda y: y @ self.a.weight
            self.again = lambda y: self.b(y) * 2

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.again(y) + self.to_input(y).sum(-1, keepdim=True)

    model, x = Model().double(), torch.randn(3, 4, dtype=torch.float64)
    traced = chase_fx.trace(model, x)
    assert set(dict(traced.named_buffers())) == set()
    assert_same_gradients(model, x)
    slim = chase_fx.prune(model, x)
    assert slim.a.out_features == slim.b.in_features == 4
