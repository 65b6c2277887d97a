"""Inputs besides tensors: a graph holds for their values in the example, and refuses others."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import math
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError, CaptureError, ChaseError, OtherSizeError
from chase_fx.graphs.expected import numbers_of
from tests.oracle import assert_exact


def images(seed: int = 0) -> Tensor:
    """(4, 4) of float64."""
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Given(nn.Module):
    """Two layers with a function of theirs and of one more input in between."""

    def __init__(self, between: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8).double()
        self.c = nn.Linear(8, 3).double()
        self.between = (between,)

    def forward(self, x: Tensor, given: Any) -> Tensor:
        """(N, 4) to (N, 3)."""
        return self.c(self.between[0](self.a(x), given))


class Slots:
    """An object without ``__dict__``."""

    __slots__ = ("k",)

    def __init__(self, k: Any) -> None:
        self.k = k


class Holder:
    """An object with an attribute."""

    def __init__(self, k: Any) -> None:
        self.k = k

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.k


@dataclasses.dataclass
class Options:
    """A dataclass with an attribute that is no field."""

    k: Any = 1.0


class Mode(enum.Enum):
    """Two of them."""

    ONE = 1
    TWO = 2


class Flags(enum.IntFlag):
    """Which can be both."""

    ONE = 1
    TWO = 2


class Listed(list[Any]):
    """A list with attributes."""


def _listed(k: float) -> Listed:
    found = Listed()
    vars(found)["k"] = k
    return found


def _closure(k: Any) -> Callable[[Tensor], Tensor]:
    return lambda y: y * k


VALUES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[int], Any]]] = {
    "array": (lambda y, o: y * torch.from_numpy(o), lambda k: np.full(1, float(k))),
    "array in a list": (lambda y, o: y * torch.from_numpy(o[0]), lambda k: [np.full(1, float(k))]),
    "array in a dataclass": (lambda y, o: y * torch.from_numpy(o.k), lambda k: Options(np.full(1, float(k)))),
    "float64": (lambda y, o: y * float(o), np.float64),
    "float32": (lambda y, o: y * float(o), np.float32),
    "int64": (lambda y, o: y * int(o), np.int64),
    "bool_": (lambda y, o: y if o else -y, lambda k: np.bool_(k == 1)),
    "slots": (lambda y, o: y * o.k, Slots),
    "object": (lambda y, o: y * o.k, Holder),
    "object in an object": (lambda y, o: y * o.k.k, lambda k: Holder(Slots(k))),
    "callable": (lambda y, o: o(y), Holder),
    "closure": (lambda y, o: o(y), _closure),
    "partial": (lambda y, o: o(y), lambda k: functools.partial(torch.mul, other=k)),
    "method": (lambda y, o: o(y), lambda k: Holder(k).__call__),
    "layer": (lambda y, o: o(y), lambda k: (nn.ReLU(), nn.Tanh())[k - 1]),
    "deque": (lambda y, o: y * o[0], lambda k: collections.deque([k])),
    "set": (lambda y, o: y * len(o), lambda k: set(range(k))),
    "user dict": (lambda y, o: y * o["k"], lambda k: collections.UserDict(k=k)),
    "namespace": (lambda y, o: y * o.k, lambda k: types.SimpleNamespace(k=k)),
    "local class": (lambda y, o: y * o.k, lambda k: type("Local", (), {"k": k})()),
    "property": (lambda y, o: y * o.k, lambda k: type("Local", (), {"k": property(lambda _: k)})()),
    "enum": (lambda y, o: y if o is Mode.ONE else -y, Mode),
    "flags": (lambda y, o: y if Flags.TWO in o else -y, lambda k: Flags(3 if k == 1 else 1)),
    "dtype": (lambda y, o: y.to(o).double(), lambda k: (torch.float64, torch.float32)[k - 1]),
    "range": (lambda y, o: y * len(o), range),
    "slice": (lambda y, o: y[o], lambda k: slice(0, k + 1)),
    "bytes": (lambda y, o: y * len(o), lambda k: b"ab"[:k]),
    "complex": (lambda y, o: y * o.real, complex),
    "attribute of a list": (lambda y, o: y * o.k, _listed),
    "signs of zero": (lambda y, o: y * math.copysign(1, o), lambda k: (0.0, -0.0)[k - 1]),
    "no number": (lambda y, o: y if math.isnan(o) else -y, lambda k: (float("nan"), 1.0)[k - 1]),
    "true and one": (lambda y, o: -y if o is True else y, lambda k: (True, 1)[k - 1]),
    "one and 1.0": (lambda y, o: -y if isinstance(o, float) else y, lambda k: (1, 1.0)[k - 1]),
    "list and tuple": (lambda y, o: -y if isinstance(o, list) else y, lambda k: ([1], (1,))[k - 1]),
}


@pytest.mark.parametrize("name", VALUES)
def test_other_values_are_refused(name: str) -> None:
    """The value of the example runs, also an equal one, in slim modules and in copies; another one is refused."""
    between, made = VALUES[name]
    model, x = Given(between).eval(), images()
    traced = chase_fx.trace(model, (x, made(1)))
    slim = chase_fx.prune(model, (x, made(1)))
    assert_exact(model, slim, (images(1), made(1)))
    for module in (traced, slim, copy.deepcopy(traced)):
        module(x, made(1))
        with pytest.raises(ArgumentError, match=r"'given.*' was .* when the graph was captured.*trace again"):
            module(x, made(2))
    assert torch.equal(traced(images(1), made(1)), model(images(1), made(1)))


def test_values_are_known_after_pickling() -> None:
    """What a graph compares with is in its code."""
    for made in (VALUES["array"][1], VALUES["slots"][1], VALUES["enum"][1]):
        traced = chase_fx.trace(Second(), (images(), made(1)))
        loaded = pickle.loads(pickle.dumps(traced))
        assert torch.equal(loaded(images(), made(1)), traced(images(), made(1)))
        with pytest.raises(ArgumentError):
            loaded(images(), made(2))


class Second(nn.Module):
    """Ignores its second input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, given: Any) -> Tensor:
        """(N, 4) to (N, 3)."""
        return self.a(x)


ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Slots(ONE), "a Slots that holds tensors"),
        (Holder(Holder(Holder(Holder(Holder(Holder(ONE)))))), "a Holder that holds tensors"),
        (Options(Holder(ONE)), "'given.k' is a Holder that holds tensors"),
        (frozenset({ONE}), "a frozenset that holds tensors"),
        (iter([ONE]), "holds tensors"),
        (lambda y: y * ONE, None),
        (_closure(ONE), "a function that holds tensors"),
        (functools.partial(torch.mul, ONE), "a partial that holds tensors"),
        (nn.Linear(8, 8), "a Linear that holds tensors.*layers as part of the model"),
        (type("Local", (), {"k": ONE}), "holds tensors"),
        ((y for y in range(2)), "a generator, which a graph can neither take nor compare"),
        (torch.Generator(), "Generator"),
    ],
)
def test_what_has_no_value_is_refused(given: Any, reason: str | None) -> None:
    """Tensors that nobody takes out would be constants; what can't be compared might be another."""
    if reason is None:  # a global variable of a module is nobody's value
        chase_fx.trace(Second(), (images(), given))
        return
    with pytest.raises(CaptureError, match=reason):
        chase_fx.trace(Second(), (images(), given))


def test_objects_that_the_forward_changes_are_refused() -> None:
    """A graph would leave them as they are."""

    class Counting(Second):
        def forward(self, x: Tensor, given: Any) -> Tensor:
            given.k += 1
            return super().forward(x, given)

    with pytest.raises(CaptureError, match="the forward changes its argument 'given', a Holder"):
        chase_fx.trace(Counting(), (images(), Holder(0)))


class Optional(nn.Module):
    """What a missing input means is up to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8).double()
        self.c = nn.Linear(8, 3, bias=False).double()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, 4) to (N, 3)."""
        y = self.a(x)
        return nn.functional.linear(y if bias is None else -y, self.c.weight, bias)


def test_tensors_that_are_left_out_are_refused() -> None:
    """The graph of a call with a tensor may run without it, and mean something else."""
    bias = images()[0, :3]
    traced = chase_fx.trace(Optional(), (images(), bias))
    for call in (lambda: traced(images()), lambda: traced(images(), None), lambda: traced(images(), 1.0)):
        with pytest.raises(ArgumentError, match="'bias' was a tensor when"):
            call()
    nested = chase_fx.trace(Given(lambda y, o: y if o["k"] is None else -y).eval(), (images(), {"k": ONE}))
    with pytest.raises(ArgumentError, match=r"'given\['k'\]' was a tensor when"):
        nested(images(), {"k": None})


CONSTANT = torch.full((8,), 2.0, dtype=torch.float64)


class Defaults(nn.Module):
    """Defaults that no code is written with."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8).double()
        self.c = nn.Linear(8, 3).double()

    def forward(  # noqa: PLR0917
        self,
        x: Tensor,
        act: Callable[[Tensor], Tensor] = torch.tanh,
        scale: Any = np.float64(2.0),  # noqa: B008
        options: Options = Options(3.0),  # noqa: B008
        by: Tensor = CONSTANT,
        mode: Mode = Mode.ONE,
        size: Any = (np.int64(2),),  # noqa: B008
    ) -> Tensor:
        """(N, 4) to (N, 3)."""
        y = act(self.a(x)) * float(scale) * options.k * by * int(size[0])
        return self.c(y if mode is Mode.ONE else -y)


def test_defaults_of_any_class() -> None:
    """They hold where nothing is given; an equal value may be, but no other one."""
    model = Defaults().eval()
    traced, slim = chase_fx.trace(model, images()), chase_fx.prune(model, images())
    assert_exact(model, slim, (images(1),))
    assert torch.equal(traced(images(1)), model(images(1)))
    assert torch.equal(traced(images(1), scale=np.float64(2.0)), model(images(1)))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(images(1)), model(images(1)))
    for other in (
        {"act": torch.relu},
        {"scale": np.float64(3.0)},
        {"options": Options(2.0)},
        {"by": CONSTANT + 1},
        {"mode": Mode.TWO},
        {"size": (np.int64(3),)},
    ):
        for module in (traced, slim):
            with pytest.raises(ArgumentError):
                module(images(1), **other)


def test_given_instead_of_defaults() -> None:
    """What the example gave is not what a call without it means."""
    model = Defaults().eval()
    traced = chase_fx.trace(model, images(), {"by": CONSTANT + 1, "options": Options(2.0), "scale": np.float64(1.0)})
    given = {"by": CONSTANT + 3, "options": Options(2.0), "scale": np.float64(1.0)}
    assert torch.equal(traced(images(1), **given), model(images(1), **given))
    for name in given:
        with pytest.raises(ArgumentError, match=f"'{name}.*' was .* when the graph was captured"):
            traced(images(1), **{k: v for k, v in given.items() if k != name})


class Pairs(nn.Module):
    """Tensors that may be one object in the example and two at another call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8).double()
        self.c = nn.Linear(8, 3).double()

    def forward(self, given: Any) -> Tensor:
        """Two of (N, 4) to (N, 3)."""
        one, two = given.values() if isinstance(given, dict) else (given.one, given.two)
        return self.c(self.a(one).relu() - self.a(two).tanh())


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two tensors."""

    one: Tensor
    two: Tensor


@pytest.mark.parametrize("made", [Pair, lambda one, two: collections.OrderedDict(one=one, two=two)])
def test_one_tensor_twice(made: Callable[[Tensor, Tensor], Any]) -> None:
    """Each place is an input of its own."""
    model = Pairs().eval()
    traced = chase_fx.trace(model, (made(images(), images()),))
    same = images()
    again = chase_fx.trace(model, (made(same, same),))
    for module in (traced, again):
        given = made(images(1), images(2))
        assert torch.equal(module(given), model(given))


def test_keyword_arguments_in_another_order() -> None:
    """A forward may go through them in their order, so there is a graph for each order."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8).double()
            self.c = nn.Linear(8, 3).double()

        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            y = self.a(x)
            for k in more.values():
                y = (y * k).tanh()
            return self.c(y)

    model = Through().eval()
    traced = chase_fx.trace(model, images(), {"p": ONE * 2, "q": ONE * 3})
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))
    for given in ({"q": ONE * 3, "p": ONE * 2}, {"p": ONE * 5, "q": ONE * 7}):
        assert torch.equal(traced(images(), **given), model(images(), **given))
        assert_exact(model, slim, (images(),), given)
    with pytest.raises(ChaseError, match=r"'more' was \('p', 'q'\) when"):
        traced(images(), p=ONE, q=ONE, r=ONE)


KINDS = {
    "bool": torch.ones(8, dtype=torch.bool),
    "whole": torch.ones(8, dtype=torch.int64),
    "short": torch.ones(8, dtype=torch.int32),
    "floating": torch.ones(8, dtype=torch.float64) * 2,
}


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize(
    "decides",
    [lambda o: o.dtype == torch.bool, lambda o: o.dtype == torch.int64, lambda o: not o.is_floating_point()],
    ids=["bool", "int64", "floating"],
)
def test_other_kinds_of_numbers(decides: Callable[[Tensor], bool], first: str) -> None:
    """A forward may tell masks of one type from those of another: they get a graph of their own, or are refused."""
    model = Given(lambda y, o: y * o if decides(o) else y + o).eval()
    traced = chase_fx.trace(model, (images(), KINDS[first]))
    for given in KINDS.values():
        try:
            found = traced(images(1), given)
        except OtherSizeError:
            assert numbers_of(given) != numbers_of(KINDS[first])
        else:
            assert torch.equal(found, model(images(1), given))


@pytest.mark.parametrize("made", [np.float64, np.float32, np.int64, np.int8, np.bool_])
def test_numbers_of_numpy_as_arguments(made: Callable[[int], Any]) -> None:
    """They become Python's: code knows no names of NumPy."""
    number = made(1)
    for between in (lambda y, _: y * number, lambda y, _: torch.vmap(lambda row: row * number)(y)):
        model = Given(between).eval()
        traced = chase_fx.trace(model, (images(), None))
        assert torch.equal(traced(images(1), None), model(images(1), None))
    text = Given(lambda y, _: nn.functional.pad(y, (0, 0), mode=np.str_("constant"))).eval()
    assert torch.equal(chase_fx.trace(text, (images(), None))(images(), None), text(images(), None))
