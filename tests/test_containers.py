"""Containers of all classes among inputs and results: what they hold besides their items, and under which keys."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError, CaptureError
from chase_fx.graphs.described import described
from tests.test_inputs import Given, images
from tests.test_results import Returning


class Slotted(list[Any]):
    """A list with a slot."""

    __slots__ = ("k",)

    def __init__(self, k: Any) -> None:
        super().__init__([1])
        self.k = k


class Named(set[int]):
    """A set with an attribute."""

    def __init__(self, k: Any) -> None:
        super().__init__([1])
        self.k = k


class Counted(tuple[Any, ...]):
    """A tuple that is made of something else than its items."""

    k: Any

    def __new__(cls, first: Any) -> Self:
        found = super().__new__(cls, (first, 1))
        found.k = first
        return found


@dataclasses.dataclass(frozen=True)
class Key:
    """A key that no code is written for."""

    k: int


class Colour(enum.Enum):
    """An enum as a key."""

    RED = 1


Value = tuple[Callable[[Tensor, Any], Tensor], Callable[[int], Any]]
VALUES: dict[str, Value] = {
    "length of a deque": (lambda y, o: y * o.maxlen, lambda k: collections.deque([1], maxlen=k)),
    "default of a dict": (lambda y, o: y * o.default_factory(), lambda k: collections.defaultdict(lambda: k)),
    "slot of a list": (lambda y, o: y * o.k, Slotted),
    "attribute of a set": (lambda y, o: y * o.k, Named),
    "attribute of a tuple": (lambda y, o: y * o.k, Counted),
    "stop of a range": (lambda y, o: y * o.stop, lambda k: range(0, k + 2, 2)),
    "true in a slice": (lambda y, o: -y if o.start is True else y, lambda k: slice((1, True)[k - 1], 2)),
    "sign in a complex number": (lambda y, o: y * math.copysign(1, o.imag), lambda k: complex(1, (0.0, -0.0)[k - 1])),
    "true as a key": (lambda y, o: -y if next(iter(o)) is True else y, lambda k: {(1, True)[k - 1]: 1}),
    "object as a key": (lambda y, o: y * next(iter(o)).k, lambda k: {Key(k): 1}),
    "class as a key": (lambda y, o: y * next(iter(o))(2.5), lambda k: {(float, int)[k - 1]: 1}),
    "no number as a key": (lambda y, o: y if math.isnan(next(iter(o))) else -y, lambda k: {(math.nan, 1.0)[k - 1]: 1}),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_containers_hold_besides_items(name: str) -> None:
    """An equal one runs; where it differs in what is no item, the graph refuses it."""
    between, make = VALUES[name]
    model, x = Given(between), images(1)
    traced = chase_fx.trace(model, (images(), make(1)))
    assert torch.equal(model(x, make(1)), traced(x, make(1)))
    assert not torch.equal(model(x, make(1)), model(x, make(2)))
    with pytest.raises(ArgumentError, match=r"given.* was .* when the graph was captured"):
        traced(x, make(2))


def test_tensors_under_other_keys_and_in_slots() -> None:
    """They are found by their places, and taken from each call."""

    def make(k: float) -> Any:
        scale = torch.full((8,), k, dtype=torch.float64)
        return [{None: scale, (1, 2): scale, Colour.RED: scale, Key(1): scale, torch.int: scale}, Slotted(scale)]

    model, x = Given(lambda y, o: y * o[0][None] * o[0][1, 2] * o[0][Key(1)] * o[1].k), images(1)
    traced = chase_fx.trace(model, (images(), make(1)))
    assert torch.equal(model(x, make(3)), traced(x, make(3)))


def test_keys_that_have_code_are_compiled() -> None:
    """A text of their values would not be."""
    scale = torch.full((8,), 2.0, dtype=torch.float64)
    model = Given(lambda y, o: y * o[1, (2.5, None)] * o[Colour.RED])
    traced = chase_fx.trace(model, (images(), {(1, (2.5, None)): scale, Colour.RED: scale}))
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    given = {(1, (2.5, None)): scale, Colour.RED: scale * 2}
    assert torch.equal(compiled(images(1), given), model(images(1), given))
    with pytest.raises(ArgumentError, match=r"list\(given\)"):
        traced(images(1), {(True, (2.5, None)): scale, Colour.RED: scale})


def test_sets_inside_of_objects_are_told_in_other_processes() -> None:
    """Their order depends on the process."""
    words = {f"word {k}" for k in range(20)}
    code = "import types; from chase_fx.graphs.described import described as d; "
    code += "print(d(types.SimpleNamespace(k={f'word {k}' for k in range(20)})))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert found.stdout.strip() == described(types.SimpleNamespace(k=words))
    assert found.stdout.strip() != described(types.SimpleNamespace(k={*words, "another"}))


class Attributes(dict[str, Any]):
    """A dict with attributes."""


class Doubling(dict[str, Any]):
    """A dict that makes something else of what it is given."""

    def __init__(self, items: Any) -> None:
        super().__init__({key: item * 2 for key, item in dict(items).items()})


@dataclasses.dataclass
class Computed:
    """A dataclass that changes what it is given."""

    a: Tensor
    n: int = 1
    late: Any = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        self.a = self.a * 2
        self.n += 1


@dataclasses.dataclass
class Initial:
    """A dataclass made of what it does not hold."""

    a: Tensor
    scale: dataclasses.InitVar[float]

    def __post_init__(self, scale: float) -> None:
        self.a = self.a * scale


@dataclasses.dataclass(init=False)
class Own:
    """A dataclass with a constructor of its own."""

    a: Tensor

    def __init__(self, given: Tensor) -> None:
        self.a = given * 2


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A dataclass without ``__dict__``."""

    a: Tensor
    n: int = 1


class Slots:
    """An object without ``__dict__``."""

    __slots__ = ("a",)

    def __init__(self, a: Any) -> None:
        self.a = a


def _with(value: Any, **attributes: Any) -> Any:
    for name, item in attributes.items():
        setattr(value, name, item)
    return value


def _parts(value: Any) -> Any:
    """What is in a result, with its classes."""
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    attributes = {name: _parts(getattr(value, name)) for name in names}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return type(value), [(key, _parts(item)) for key, item in value.items()], attributes
    if isinstance(value, (tuple, list, collections.deque)):
        return type(value), list(map(_parts, value)), attributes
    return (type(value), attributes) if names else value


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "largest": lambda y, _: y.topk(2),
    "largest along a dim": lambda y, _: {"max": y.max(1)},
    "subclass of list": lambda y, _: _with(Slotted(y), k=y * 2),
    "subclass of tuple": lambda y, _: Counted(y),
    "attribute of a dict": lambda y, _: _with(Attributes(a=y), k=y * 2),
    "dict that computes": lambda y, _: Doubling({"a": y}),
    "dataclass that computes": lambda y, _: Computed(y),
    "field set later": lambda y, _: _with(Computed(y), late=y * 3),
    "attribute of a dataclass": lambda y, _: _with(Computed(y), other=y * 3),
    "parameter of a constructor": lambda y, _: Initial(y, 3.0),
    "constructor": lambda y, _: Own(y),
    "dataclass with slots": lambda y, x: Frozen(y, x.shape[0]),
    "slots": lambda y, _: [Slots(y)],
    "containers in an object": lambda y, x: Slots([Counted(y), collections.deque([y], maxlen=3), x.shape, y.min(1)]),
    "sizes": lambda _, x: x.shape,
    "packed": lambda y, _: nn.utils.rnn.pack_sequence([y]),
    "keys": lambda y, x: {Colour.RED: y, (1, 2): 1.5, None: x.shape[0], torch.int: 1, Key(1): 2, int: y},
    "class": lambda *_: int,
    "number of numpy": lambda *_: np.float32(1.5),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_any_class(name: str) -> None:
    """They are built again as the model makes them: of the same class, with the same in them."""
    model = Returning(RESULTS[name])
    traced = chase_fx.trace(model, images())
    for x in (images(), images(1)[:3]):
        assert _parts(traced(x)) == _parts(model(x))


def test_arrays_in_results() -> None:
    """They were tensors; each call has one of its own."""
    traced = chase_fx.trace(Returning(lambda *_: np.arange(3)), images())
    traced(images())[1][:] = 0
    assert type(traced(images())[1]) is np.ndarray
    assert list(traced(images())[1]) == [0, 1, 2]


def test_results_that_hide_tensors_are_refused() -> None:
    """They would be those of the example."""

    with pytest.raises(CaptureError, match="the forward returns a mappingproxy, which a graph can't build again"):
        chase_fx.trace(Returning(lambda y, _: types.MappingProxyType({"a": y})), images())
