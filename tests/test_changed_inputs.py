"""Lists, dicts and dataclasses that a forward changes: traced and slim modules change them likewise."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import EXACT, difference
from tests.test_inputs import images


class Changing(nn.Module):
    """Two layers; what is between them changes what it is given."""

    def __init__(self, change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(*sizes).double() for sizes in ((4, 8), (8, 8), (8, 3)))
        self.change = (change,)

    def forward(self, x: Tensor, given: Any) -> Any:
        """(N, 4) to (N, 3), or what ``change`` returns, if it does."""
        y = self.b(self.a(x).relu())
        other = self.change[0](given, y)
        return self.c(y), other


@dataclasses.dataclass
class State:
    """A dataclass that is changed."""

    k: Any = 1
    more: Any = None


def _returned(given: Any, y: Tensor) -> Any:
    given["late"] = y
    return given


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[], Any]]] = {
    "append": (lambda o, y: o.append(y), lambda: [images()]),
    "remove": (lambda o, _: o.pop(0), lambda: [images(), 2]),
    "sort": (lambda o, _: o.sort(), lambda: [3, 1, 2]),
    "item": (lambda o, y: o.__setitem__(0, y + o[0][0, 0]), lambda: [images(), abs]),
    "key": (lambda o, y: o.update(late=y, n=y.shape[0]), lambda: {"x": images(), "f": abs}),
    "keys in another order": (lambda o, _: o.update(x=o.pop("x")), lambda: {"x": 1, "y": 2}),
    "left of a deque": (lambda o, y: o.appendleft(y), lambda: collections.deque([1, 2], maxlen=2)),
    "default": (lambda o, y: o["late"].append(y), lambda: collections.defaultdict(list)),
    "inner": (lambda o, y: o["inner"][0].append(y), lambda: {"inner": ([],)}),
    "attribute": (lambda o, y: setattr(o, "k", y), State),
    "other attribute": (lambda o, y: setattr(o, "other", y * 2), State),
    "in an attribute": (lambda o, y: o.more.append(y), lambda: State(more=[])),
    "returned": (_returned, lambda: {"x": images()}),
}


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _parts(item)) for key, item in value.items()]
    if dataclasses.is_dataclass(value):
        return _parts(vars(value))
    return list(map(_parts, value)) if isinstance(value, (list, tuple, collections.deque)) else value


def assert_same(want: Any, have: Any) -> None:
    """The same in the same places, and tensors of the same values."""
    if isinstance(want, Tensor):
        assert difference(want, have) <= EXACT
    elif isinstance(want, (list, tuple)):
        assert len(want) == len(have)
        for a, b in zip(want, have, strict=True):
            assert_same(a, b)
    else:
        assert want == have


@pytest.mark.parametrize("name", CHANGES)
def test_containers_are_changed_by_graphs_too(name: str) -> None:
    """At another batch size; what is put in keeps its shape in the slim module."""
    change, make = CHANGES[name]
    model = Changing(change).eval()
    traced = chase_fx.trace(model, (images(), make()))
    slim = chase_fx.prune(model, (images(), make()))
    assert slim.a.out_features < 8
    masked = chase_fx.trace(model, (images(), make()))
    with torch.no_grad():
        for tensor, kept in slim.plan.kept_indices().items():
            for dim, index in enumerate(kept):
                if index is not None:
                    removed = torch.ones(masked.get_parameter(tensor).shape[dim], dtype=torch.bool)
                    removed[index] = False
                    masked.get_parameter(tensor).transpose(0, dim)[removed] = 0
    for module, reference in ((traced, model), (slim, masked)):
        for x in (images(1), images(2)[:2]):
            ours, theirs = make(), make()
            found, want = module(x, ours), reference(x, theirs)
            assert_same(_parts(want), _parts(found))
            assert_same(_parts(theirs), _parts(ours))
            assert (want[1] is theirs) == (found[1] is ours)


class Deciding(nn.Module):
    """What it changes depends on the mode, on data and on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """(N, 4) to (N, 3)."""
        y = self.a(x)
        if self.training:
            given["mode"] = y
        if x.sum() > 0:
            given["data"] = y * 2
        if x.shape[0] > 3:
            given["size"] = y * 3
        return self.c(y)


@pytest.mark.filterwarnings("ignore:the forward reads tensor data")
def test_what_is_changed_may_be_decided() -> None:
    """As in the model, whatever decides."""
    model = Deciding()
    traced = chase_fx.trace(model, (images(), {}))
    for x in (images().abs(), -images().abs(), images().abs()[:2], -images().abs()[:2]):
        for training in (True, False):
            ours, theirs = dict[str, Any](), dict[str, Any]()
            assert_same(model.train(training)(x, theirs), traced.train(training)(x, ours))
            assert_same(_parts(theirs), _parts(ours))


def test_deleted_attributes_are_refused() -> None:
    """No node deletes."""
    with pytest.raises(CaptureError, match="deletes attribute 'other' of its argument 'given'"):
        chase_fx.trace(Changing(lambda o, _: delattr(o, "other")), (images(), _other()))


def _other() -> State:
    found = State()
    vars(found)["other"] = 1
    return found
