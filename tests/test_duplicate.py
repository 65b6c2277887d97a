"""Copies of modules are what ``copy.deepcopy`` gives, and a write to one side never reaches the other."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import chase_fx
from chase_fx.graphs.duplicate import duplicate


class Odd(nn.Module):
    """State of every kind: ties, cycles, plain tensors, containers, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("counts", torch.zeros(3))
        self.register_buffer("part", self.get_buffer("counts")[:2], persistent=False)
        self.table = {"a": [1, (2, torch.ones(2))], "parent": [self]}
        self.handle = self.first.register_forward_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 4) -> (N, 4)."""
        return self.second(self.first(x).relu())


class OwnWay(nn.Linear):
    """A class with a way of its own to be copied."""

    def __deepcopy__(self, memo: Any) -> OwnWay:
        """Marks the copy."""
        new = OwnWay(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict())
        new.marked = True
        return new


class WithGetstate(nn.Linear):
    """A class whose state is not its ``__dict__``."""

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the cache out."""
        return {k: v for k, v in self.__dict__.items() if k != "cache"}


def test_ties_cycles_and_containers_are_as_deepcopy_makes_them() -> None:
    """The identities inside the copy are those inside the original, and no object is shared."""
    model = Odd()
    copied, wanted = duplicate(model, {}), copy.deepcopy(model)
    assert list(copied.__dict__) == list(wanted.__dict__)
    assert copied.first is copied.again
    assert copied.first is not model.first
    assert copied.first.weight is copied.second.weight
    assert copied.first.weight is not model.first.weight
    assert copied.table["parent"][0] is copied
    assert copied.table["a"][1][1] is not model.table["a"][1][1]
    assert len(copied.first._forward_hooks) == 1
    assert copied.first._forward_hooks is not model.first._forward_hooks
    copied.counts += 1
    assert copied.part.tolist() == [1, 1]
    assert model.part.tolist() == [0, 0]


@pytest.mark.parametrize("written", ["copy", "original"])
def test_a_write_to_one_side_does_not_reach_the_other(written: str) -> None:
    """In-place operations, ``.data``, numpy views and optimizers write to one side only."""
    model = nn.Linear(4, 4)
    copied = duplicate(model, {})
    change, keep = (copied, model) if written == "copy" else (model, copied)
    before = keep.weight.detach().numpy().copy()
    with torch.no_grad():
        change.weight.add_(1)
    change.weight.data[0] = 7
    change.weight.detach().numpy()[1] = 8
    change(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(change.parameters(), lr=1.0).step()
    assert (keep.weight.detach().numpy() == before).all()
    assert keep.weight.grad is None
    assert not torch.equal(change.weight, keep.weight)


def test_memory_that_others_hold_is_copied_at_once() -> None:
    """A numpy array, a view or another process that writes to the model's memory does not write to the copy."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(4)) for name in ("numpy", "view", "process")})
    model.share_memory()
    array, view = model["numpy"].detach().numpy(), model["view"].detach()
    copied = duplicate(model, {})
    array[:], view[:] = 1, 1
    model["process"].data.fill_(1)
    assert all(p.tolist() == [0, 0, 0, 0] for p in copied.values())
    assert all(p.tolist() == [1, 1, 1, 1] for p in model.values())
    alone = nn.ParameterDict({name: nn.Parameter(torch.zeros(4)) for name in ("numpy", "view")})
    array, view = alone["numpy"].detach().numpy(), alone["view"].detach()
    copied = duplicate(alone, {})
    array[:], view[:] = 1, 1
    assert all(p.tolist() == [0, 0, 0, 0] for p in copied.values())
    assert all(p.tolist() == [1, 1, 1, 1] for p in alone.values())


def test_classes_with_a_way_of_their_own_keep_it() -> None:
    """``__deepcopy__`` and ``__getstate__`` decide where they are defined."""
    model = nn.Sequential(OwnWay(4, 4), WithGetstate(4, 4))
    model[1].cache = weakref.ref(model)  # can't be copied
    copied = duplicate(model, {})
    assert copied[0].marked
    assert not hasattr(copied[1], "cache")
    assert torch.equal(copied[1].weight, model[1].weight)


def test_the_weights_take_no_memory_until_they_are_written_to() -> None:
    """``trace`` reads the weights of a model and copies none of them."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    traced = chase_fx.trace(model, torch.zeros(2, 8))
    assert torch._C._is_cow_tensor(traced.get_submodule("0").weight)
    model[0].weight.data.zero_()
    assert traced.get_submodule("0").weight.abs().sum() > 0
