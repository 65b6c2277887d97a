"""The graph is called like the model: its hooks, its containers of inputs, its modules' own weights and modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError, CaptureError
from tests.nets import Net


def net(forward: Callable[..., Any]) -> Any:
    """Three linear layers a (6, 8), b (8, 8), c (8, 3) in double precision, and how they are called."""
    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)).double().eval()


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _merged(m: Any, x: Tensor) -> Tensor:
    weights = {"weight": m.b.weight * 3 + m.b.weight.T, "bias": m.b.bias}
    return m.c(torch.func.functional_call(m.b, weights, (m.a(x),)).relu())


def _swapped(m: Any, x: Tensor) -> Tensor:
    own = m.b._parameters["weight"]
    m.b._parameters["weight"] = own * 3
    y = m.b(m.a(x)).relu()
    m.b._parameters["weight"] = own
    return m.c(y)


@pytest.mark.parametrize("forward", [_merged, _swapped])
def test_layers_called_with_other_weights(forward: Callable[..., Any]) -> None:
    """A layer that is called with computed weights computes with them, in the traced and in the slim module."""
    model = net(forward)
    traced = chase_fx.trace(model, X)
    assert torch.allclose(traced(X), model(X), rtol=0, atol=1e-12)
    slim = chase_fx.prune(model, X)
    assert slim.get_parameter("b.weight").shape[0] < 8


@pytest.mark.parametrize(
    ("forward", "example", "more"),
    [
        (lambda m, xs: m.c(sum(m.b(m.a(x)) for x in xs)), ([X, X],), ([X, X, X],)),
        (lambda m, xs: m.c(sum(m.b(m.a(x)) for x in xs)), ((X, X),), ((X,),)),
        (lambda m, xs: m.c(sum(m.b(m.a(x)) for x in xs.values())), ({"k": X},), ({"k": X, "l": X},)),
        (lambda m, *xs: m.c(sum(m.b(m.a(x)) for x in xs)), (X, X), (X, X, X)),
    ],
)
def test_another_number_of_inputs_is_refused(
    forward: Callable[..., Any], example: tuple[Any, ...], more: tuple[Any, ...]
) -> None:
    """A list, a tuple, a dict or ``*args`` with more or fewer items than the example is no silent difference."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    Model.forward = forward
    traced = chase_fx.trace(Model().double(), example)
    assert torch.isfinite(traced(*example)).all()
    with pytest.raises(ArgumentError, match=r"len|list"):
        traced(*more)


@pytest.mark.parametrize("name", ["inf", "nan", "device", "torch", "pytree", "NoneType"])
def test_arguments_with_the_names_that_generated_code_has(name: str) -> None:
    """A graph means infinity by ``inf`` and the package by ``torch``, whatever the arguments are called."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 3)

    scope: dict[str, Any] = {}
    source = f"""
def forward(self, x, {name}=2.0):
    y = F.gelu(self.a(x))
    y = y.masked_fill(y < 0, float("-inf")).masked_fill(y < 0.1, float("nan")).nan_to_num(0.0, 0.0, 0.0)
    return self.c(y * {name})
"""
    exec(source, {"F": nn.functional}, scope)
    Model.forward = scope["forward"]
    model = Model().double()
    for second in (3.0, torch.full((1,), 3.0, dtype=torch.float64)):
        traced = chase_fx.trace(model, (X, second))
        assert torch.equal(traced(X, second), model(X, second))
        assert torch.equal(traced(X, **{name: second}), model(X, second))
        assert torch.equal(torch.compile(traced, backend="eager", fullgraph=True)(X, second), model(X, second))
        assert chase_fx.prune(model, (X, second)).get_submodule("a").out_features == 4


@pytest.mark.parametrize("star", ["*", "**"])
@pytest.mark.parametrize("name", ["inf", "torch", "list", "expect_tensor", "len"])
def test_further_arguments_with_the_names_that_generated_code_has(star: str, name: str) -> None:
    """These are read in the body of the generated code, where a name may mean something else already."""
    scope: dict[str, Any] = {}
    source = f"""
def forward(self, x, {star}{name}):
    y = self.a(x)
    return self.c(y.masked_fill(y < 0, float("-inf")).clamp(min=-1) * {name}[{0 if star == "*" else "'k'"}])
"""
    exec(source, {}, scope)

    class Model(nn.Module):
        forward = scope["forward"]

        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 3)

    model, second = Model().double(), torch.full((1,), 3.0, dtype=torch.float64)
    args, kwargs = ((X, second), {}) if star == "*" else ((X,), {"k": second})
    assert torch.equal(chase_fx.trace(model, args, kwargs)(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("name", ["list", "getattr", "len", "a"])
def test_containers_with_the_names_of_functions(name: str) -> None:
    """A graph asks for the keys of a dict by ``list``, whatever the dict is called."""
    scope: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}):\n    return self.c(self.a(x) * {name}['k'])", {}, scope)

    class Model(nn.Module):
        forward = scope["forward"]

        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 3)

    model, given = Model().double(), {"k": torch.full((1,), 3.0, dtype=torch.float64)}
    assert torch.equal(chase_fx.trace(model, (X, given))(X, given), model(X, given))


def test_hooks_of_the_model_itself() -> None:
    """Hooks on the root run in the capture and so are part of the graph."""
    model = net(lambda m, x: m.c(m.b(m.a(x)).relu()))
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, out: 2 * out)
    traced = chase_fx.trace(model, X)
    assert torch.equal(traced(X), model(X))
    assert torch.equal(chase_fx.prune(model, X, channel_sparsity=0.0)(X), model(X))


def test_inputs_that_hold_nothing_are_refused() -> None:
    """An empty batch shows nothing of what the model does."""
    with pytest.raises(CaptureError, match="no element"):
        chase_fx.trace(net(lambda m, x: m.c(m.b(m.a(x)))), X[:0])


def test_norm_of_an_unbatched_image() -> None:
    """The channels of an image without a batch are its first dim."""
    layers = [nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.Conv2d(12, 8, 1)]
    slim = chase_fx.prune(nn.Sequential(*layers).double().eval(), torch.randn(3, 9, 9, dtype=torch.float64))
    assert slim.get_submodule("1").num_features == 6


def test_weights_that_were_just_computed() -> None:
    """A model whose weight is a computed tensor, as ``weight_norm`` leaves it, can be captured at once."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        first = nn.utils.weight_norm(nn.Conv1d(3, 8, 3))
    model = nn.Sequential(first, nn.ReLU(), nn.Conv1d(8, 4, 1)).double().eval()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    assert torch.allclose(chase_fx.trace(model, x)(x), model(x), rtol=0, atol=1e-12)
    assert chase_fx.prune(model, x).get_parameter("0.weight_v").shape == (4, 3, 3)


def test_objects_that_hold_tensors_are_no_inputs() -> None:
    """Their tensors would be constants of the graph."""

    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.layers = [{"keys": keys}]

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            return torch.cat([cache.layers[0]["keys"], self.a(x)], 1)

    with pytest.raises(CaptureError, match="'cache' is a Cache that holds tensors"):
        chase_fx.trace(Cached(), (torch.randn(2, 4, 4), Cache(torch.randn(2, 5, 8))))


def test_the_order_of_a_dict_is_part_of_the_graph() -> None:
    """A forward may go through its values; one that takes keyword arguments gets them in any order."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, d: dict[str, Tensor], **more: Tensor) -> Tensor:
            return torch.cat([self.a(v) for v in d.values()], 1) + more["p"] - more["q"]

    x, y, p, q = torch.randn(4, 2, 3, 4).unbind()
    p, q = p.repeat(1, 1, 2)[:, :1], q.repeat(1, 1, 2)[:, :1]
    traced = chase_fx.trace(Joined(), ({"x": x, "y": y},), {"p": p, "q": q})
    assert torch.equal(traced({"x": x, "y": y}, q=q, p=p), traced({"x": x, "y": y}, p=p, q=q))
    for other in ({"y": y, "x": x}, {"x": x}, {"x": x, "z": y}):
        with pytest.raises(ArgumentError, match="trace again"):
            traced(other, p=p, q=q)
