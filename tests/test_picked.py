"""Channels in another order, chosen, or read twice by an index that is the same in every call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import PlanMismatchError
from chase_fx.graphs.axes import Axis, Cat, Cause, Prod, atoms_of, keep_mask, kept_count, resolve
from chase_fx.graphs.elements import digits
from chase_fx.graphs.unification import Axes
from tests.nets import conv
from tests.oracle import EXACT, assert_exact, randomise

CAUSE = Cause("node", "op")
ORDER = [5, 2, 7, 0, 3, 6, 1, 4]
SHUFFLED = [0, 4, 1, 5, 2, 6, 3, 7]


class Flow(nn.Module):
    """Two convolutions whose channels ``step`` puts in another order, and layers that read them as they are."""

    def __init__(self, step: Callable[[Any, Tensor, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.step = step
        self.a, self.c, self.also, self.tail = conv(3, 8), conv(3, 8), conv(8, 2), conv(8, 2)
        self.four, self.two, self.norm = conv(8, 8, groups=4), conv(8, 8, groups=2), nn.BatchNorm2d(8)
        self.out = conv(width, 2)
        self.register_buffer("order", torch.tensor(ORDER))
        self.register_buffer("scores", torch.rand(8))
        self.register_buffer("mask", torch.tensor(ORDER) > 2)
        self.hidden = torch.tensor(ORDER[::-1])
        self.array = np.array(ORDER)
        self.places = nn.Parameter(torch.tensor(ORDER, dtype=torch.int32), requires_grad=False)
        self.learned = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.c(x)
        return self.out(self.step(self, y, z)) + self.also(y) + self.tail(z)


def flow(step: Callable[[Any, Tensor, Tensor], Tensor], width: int = 8) -> tuple[Any, tuple[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = (torch.randn(2, 3, 4, 4, dtype=torch.float64),)
        return randomise(Flow(step, width), x), x


def slims(traced: Any) -> list[Any]:
    """Pruned by several plans, each of them verified."""
    channels, found = chase_fx.analyze(traced), []
    for sparsity, seed in itertools.product((0.3, 0.6, 0.8), (0, 1)):

        def score(group: chase_fx.Group, seed: int = seed) -> Tensor:
            generator = torch.Generator().manual_seed(seed + group.size + len(group.name))
            return torch.rand(group.size, generator=generator, dtype=torch.float64)

        slim = chase_fx.rewrite(traced, channels.plan(sparsity, score=score)).eval()
        assert chase_fx.verify(traced, slim).difference <= EXACT
        found.append(slim)
    return found


def _written(m: Any, y: Tensor) -> Tensor:
    m.order.add_(0)
    return y[:, m.order]


def _put(y: Tensor, index: Any, values: Tensor) -> Tensor:
    y[:, index] = values
    return y


PRUNED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int]] = {
    "buffer": (lambda m, y, z: y[:, m.order], 8),
    "list": (lambda m, y, z: y[:, [3, 2, 1, 0, 4, -1, 6, 5]], 8),
    "attribute": (lambda m, y, z: y[:, m.hidden], 8),
    "array": (lambda m, y, z: y[:, m.array], 8),
    "inverse": (lambda m, y, z: y.index_select(1, m.order.argsort()), 8),
    "32 bits": (lambda m, y, z: torch.index_select(y, 1, m.places), 8),
    "counted": (lambda m, y, z: y[:, torch.arange(y.shape[1] - 1, -1, -1, device=y.device)], 8),
    "from the end": (lambda m, y, z: y[..., m.order.flip(0) - 8, :, :], 8),
    "ranked": (lambda m, y, z: y[:, m.scores.topk(4).indices], 4),
    "mask": (lambda m, y, z: y[:, m.mask], 5),
    "mask of numbers": (lambda m, y, z: y[:, [True, False, True, True, False, False, True, True]], 5),
    "chosen": (lambda m, y, z: y[:, [0, 2, 5, 7]] + z[:, [1, 2, 3, 6]], 4),
    "twice": (lambda m, y, z: y[:, [0, 0, 1, 1, 2, 2, 3, 3, 7, 7]], 10),
    "some twice": (lambda m, y, z: y[:, [0, 0, 1, 2, 3, 3, 4, 6]], 8),
    "again": (lambda m, y, z: y[:, m.order][:, m.hidden].flip(1), 8),
    "with itself": (lambda m, y, z: y[:, [1, 0, 3, 2, 5, 4, 7, 6]] + y, 8),
    "groups": (lambda m, y, z: m.four(y[:, m.order]), 8),
    "of groups": (lambda m, y, z: m.four(y)[:, m.order], 8),
    "shuffled groups": (lambda m, y, z: m.two(m.four(y)[:, SHUFFLED]), 8),
    "whole groups": (lambda m, y, z: m.four(y[:, [2, 3, 0, 1, 6, 7, 4, 5]]), 8),
    "in every group": (lambda m, y, z: m.four(y[:, [1, 0, 3, 2, 5, 4, 7, 6]]), 8),
    "of both": (lambda m, y, z: torch.cat([y, z], 1)[:, [0, 8, 1, 9, 2, 10, 3, 11]], 8),
    "cut": (lambda m, y, z: y[:, m.order][:, 2:7], 5),
    "split": (lambda m, y, z: torch.cat(y[:, m.order].split([3, 5], 1)[::-1], 1), 8),
    "normed": (lambda m, y, z: m.norm(y[:, m.order]), 8),
    "flat": (lambda m, y, z: y[:, m.order].flatten(1).view(y.shape), 8),
    "a weight's": (lambda m, y, z: F.conv2d(y, m.tail.weight.repeat(4, 1, 1, 1)[:, m.order]), 8),
    "mapped": (lambda m, y, z: torch.vmap(lambda t: t[m.order])(y), 8),
    "with dropout": (lambda m, y, z: F.dropout(y[:, m.order], 0.5, m.training), 8),
    "put back": (lambda m, y, z: _put(y.new_zeros(y.shape), m.order, y), 8),
    "put in part": (lambda m, y, z: _put(y + 0, [6, 0, 3], z[:, 2:5]), 8),
    "put by mask": (lambda m, y, z: _put(y + 0, m.mask, 0.5), 8),
    "added to": (lambda m, y, z: y.index_add(1, m.order[:3], z[:, 5:]), 8),
    "copied into": (lambda m, y, z: torch.zeros_like(y).index_copy_(1, m.order, z), 8),
    "filled": (lambda m, y, z: y.index_fill(1, m.order[2:5], 2.0) + z, 8),
    "put by name": (lambda m, y, z: y.transpose(0, 1).index_put((m.order[:2],), z.new_ones(())).transpose(0, 1), 8),
    "rolled": (lambda m, y, z: y.roll(-3, 1) + z, 8),
    "rolled twice": (lambda m, y, z: y.roll((3, 1), (1, 2)), 8),
    "flipped": (lambda m, y, z: torch.cat([y, z], 1).flip(1, 2), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
def test_channels_in_another_order_are_pruned(name: str) -> None:
    """Exact by both oracles at another batch size and in another image, and nothing is frozen but what nobody reads."""
    model, x = flow(*PRUNED[name])
    traced = chase_fx.trace(model, x)
    assert chase_fx.analyze(traced).frozen.get(("c.weight", 0)) is None
    for slim in slims(traced):
        assert slim.get_parameter("a.weight").shape[0] < 8
        for batch, size in ((2, 4), (5, 4), (3, 6)):
            assert_exact(model, slim, (torch.randn(batch, 3, size, size, dtype=torch.float64),))


FROZEN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "learned": lambda m, y, z: y[:, m.learned.argsort()],
    "data": lambda m, y, z: y[:, z[0, :, 0, 0].argsort()],
    "drawn": lambda m, y, z: y[:, torch.randperm(8)],
    "written": lambda m, y, z: _written(m, y),
    "statistics": lambda m, y, z: m.norm(z) + y[:, m.norm.running_var.argsort()],
    "put by weights": lambda m, y, z: _put(y + 0, m.learned.argsort(), z),
    "pixels": lambda m, y, z: y[:, torch.arange(y.shape[2]).repeat(2)],
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_an_index_that_may_change_freezes(name: str) -> None:
    """What weights, data, draws, statistics, space or the forward itself decide is no order of channels."""
    model, x = flow(FROZEN[name])
    channels = chase_fx.analyze(chase_fx.trace(model, x))
    assert " by index" in channels.frozen["a.weight", 0]


def test_an_orbit_goes_together() -> None:
    """Where a permuted tensor is added to itself, channels that reach each other are one unit."""
    model, x = flow(lambda m, y, z: y[:, [1, 2, 0, 4, 5, 3, 6, 7]] + y)
    groups = {group.name: group for group in chase_fx.analyze(chase_fx.trace(model, x)).groups}
    triples, fixpoints = groups["a.weight:0"], groups["a.weight:0#1"]
    assert triples.members[0].positions.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert fixpoints.members[0].positions.tolist() == [[6], [7]]


def test_another_order_is_another_structure() -> None:
    """A plan holds for the order that it was made for; a copy of the module with another one refuses it."""
    model, x = flow(lambda m, y, z: y[:, m.order])
    traced = chase_fx.trace(model, x)
    plan = chase_fx.analyze(traced).plan(0.5)
    assert chase_fx.rewrite(traced, plan).plan is plan
    traced.order.copy_(torch.arange(8))
    with pytest.raises(PlanMismatchError, match="coupled in another way"):
        chase_fx.rewrite(traced, plan)
    for slim in slims(traced):
        assert slim.order.tolist() == list(range(8))


def test_an_order_that_is_loaded_later_is_followed_or_out_of_range() -> None:
    """The slim graph reads the buffer: removed channels are in no other order."""
    model, x = flow(lambda m, y, z: y[:, m.order])
    traced = chase_fx.trace(model, x)
    keep = torch.tensor([True, True, False, True, True, False, False, True])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan_keeping({"a.weight:0": keep})).eval()
    moved = torch.tensor(ORDER)
    moved[[3, 4]] = moved[[4, 3]]  # both of them stay
    slim.order.copy_(moved)
    model.order.copy_(moved)
    assert_exact(model, slim, x)
    slim.order.copy_(torch.arange(7, -1, -1))
    with pytest.raises(IndexError, match="out of bounds"):
        slim(*x)


def test_a_saved_order_is_loaded_into_a_model_with_another(tmp_path: Path) -> None:
    """A permutation that each model draws for itself is the saved one in the loaded module."""
    model, x = flow(lambda m, y, z: y[:, m.order])
    slim = chase_fx.prune(model, x, channel_sparsity=0.5).eval()
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    other = Flow(model.step).double()
    other.order.copy_(torch.arange(8))
    loaded = chase_fx.load(tmp_path / "slim.safetensors", other).eval()
    assert torch.equal(loaded(*x), slim(*x))
    assert other.order.tolist() == list(range(8))


def test_live_shrink_and_finalize_agree() -> None:
    """Channels in another order are cut while the module trains, as they are at the end."""
    model, x = flow(lambda m, y, z: y[:, m.order] + z)
    found = []
    for live in (False, True):
        traced = chase_fx.trace(model.train(), x)
        optimizer = torch.optim.SGD(traced.parameters(), 0.01)
        trainer = chase_fx.Chase(
            traced, optimizer, total_steps=20, sparsity=0.6, channel_sparsity=0.5, live_shrink=live
        )
        for _ in range(20):
            optimizer.zero_grad()
            traced(*x).square().mean().backward()
            optimizer.step()
            trainer.step()
        found.append(trainer.finalize().eval())
    assert found[0].get_parameter("a.weight").shape[0] < 8
    assert torch.allclose(found[0](*x), found[1](*x), rtol=1e-9, atol=1e-12)


def test_digits() -> None:
    """A transposition of dims is told from any other order."""
    assert digits(np.arange(24).reshape(2, 3, 4).transpose(2, 1, 0).reshape(-1)) == [(4, 1), (3, 4), (2, 12)]
    assert digits(np.array([0, 4, 1, 5, 2, 6, 3, 7])) == [(4, 1), (2, 4)]
    for other in ([1, 0, 3, 2], [0, 2, 1, 3, 4, 5], [0, 2, 4], [0, 3, 1, 2], [0, 2, 0, 2], [1, 2, 3, 4]):
        assert digits(np.array(other)) is None


def _mask(axis: Axis, kept: dict[Any, np.ndarray]) -> np.ndarray:
    found = keep_mask(axis, kept)
    return np.ones(axis.size, dtype=bool) if found is None else found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_picked_axes_keep_what_they_read(data: st.DataObject) -> None:
    """Whatever stays: indices that were equated stay together, each index with what it picks, and no axis is empty."""
    axes = Axes()
    pool = [axes.atom(n, (f"w{i}", 0)) for i, n in enumerate(data.draw(st.lists(st.integers(2, 6), min_size=2)))]
    claims: list[Callable[[dict[Any, np.ndarray]], bool]] = []
    for _ in range(data.draw(st.integers(1, 6))):
        axis = data.draw(st.sampled_from(pool))
        action = data.draw(st.sampled_from(["pick", "permute", "take", "cat", "split", "product", "unify"]))
        places = st.integers(0, axis.size - 1)
        if action in ("pick", "permute"):
            some = st.lists(places, min_size=1, max_size=8) if action == "pick" else st.permutations(range(axis.size))
            index = np.array(data.draw(some))
            pool.append(found := axes.pick(axis, index, CAUSE))
            claims.append(lambda k, a=axis, f=found, i=index: bool((_mask(f, k) == _mask(a, k)[i]).all()))
        elif action == "take":
            start = data.draw(places)
            stop = data.draw(st.integers(start + 1, axis.size))
            pool.append(found := axes.take(axis, start, stop, CAUSE))
            claims.append(lambda k, a=axis, f=found, s=start, e=stop: bool((_mask(f, k) == _mask(a, k)[s:e]).all()))
        elif action in ("cat", "product") and axis.size < 10:
            other = data.draw(st.sampled_from(pool))
            pool.append(Cat((axis, other)) if action == "cat" else Prod((axis, axes.atom(2, ("p", 0)))))
        elif action == "split":
            p = data.draw(st.sampled_from([p for p in range(1, axis.size + 1) if axis.size % p == 0]))
            one, two = axes.split(axis, p, axis.size // p, CAUSE)
            pool += [one, two]
            claims.append(
                lambda k, a=axis, o=one, t=two: bool((_mask(a, k) == np.outer(_mask(o, k), _mask(t, k)).ravel()).all())
            )
        elif action == "unify":
            other = data.draw(st.sampled_from([b for b in pool if b.size == axis.size]))
            axes.unify(axis, other, CAUSE)
            claims.append(lambda k, a=axis, b=other: bool((_mask(a, k) == _mask(b, k)).all()))
    atoms = list(dict.fromkeys(atom for axis in pool for atom in atoms_of(axis)))
    for _ in range(3):
        kept = {}
        for atom in atoms:
            mask = np.array(data.draw(st.lists(st.booleans(), min_size=atom.size, max_size=atom.size)))
            mask[data.draw(st.integers(0, atom.size - 1))] = True
            kept[atom] = mask
        assert all(claim(kept) for claim in claims)
        for axis in pool:
            assert _mask(axis, kept).any()
            assert kept_count(axis, {atom: int(mask.sum()) for atom, mask in kept.items()}) == _mask(axis, kept).sum()
            assert resolve(resolve(axis)) is resolve(axis)


class WrittenInAList(nn.Module):
    """An order that an operator on lists of tensors writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("order", torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._foreach_mul_([self.order], 1)
        return self.b(self.a(x)[:, self.order])


def test_an_order_that_is_written_as_one_of_a_list_freezes() -> None:
    """The forward may change it, so it is no constant."""
    channels = chase_fx.analyze(chase_fx.trace(WrittenInAList(), torch.randn(1, 3, 4, 4)))
    assert not channels.groups
    assert "looked up by index" in channels.frozen["a.weight", 0]
