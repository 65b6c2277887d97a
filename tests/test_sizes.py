"""Sizes in Python code: what stays free, and what the graph refuses because its code would take another path."""

from __future__ import annotations

import builtins
import copy
import functools
import itertools
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, gcd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherSizeError
from chase_fx.graphs.traced import TracedModule


class Between(nn.Module):
    """Two linear layers with a function of the hidden features between them."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def length(function: Callable[[int], Any]) -> Callable[[Tensor], Tensor]:
    """A step that adds as many ones as ``function`` says for the length of its input."""
    return lambda x: x + torch.ones(int(function(x.shape[1])), 8).sum(0)


def half(n: int) -> int:
    return n // 2


cached_half = functools.lru_cache(half)


RATIO = 0.5


@dataclass
class Options:
    share: float


def scaled(n: int, ratio: float = 0.75) -> float:
    return ratio * n + RATIO * n


def remember(function: Callable[[int], int]) -> Callable[[int], int]:
    kept = functools.lru_cache(function)
    return lambda n: kept(n) + 1


remembered_half = remember(half)


def nested(n: int) -> int:
    def inner(k: int) -> int:
        return sum(int(k * 0.5) for _ in range(2))

    return inner(n)


FREE: dict[str, Callable[[int], Any]] = {
    "int": lambda n: int(n * 0.7),
    "float": lambda n: float(n) * 0.7,
    "min": lambda n: min(n, 9),
    "max of a list": lambda n: max([1, n - 3]),
    "max of one": lambda n: max(m for m in [n - 3]),
    "sum": lambda n: sum([0.5, n]),
    "abs": lambda n: abs(5 - n),
    "round": lambda n: round(n * 0.3, 1) + round(n * 0.3),
    "divmod": lambda n: divmod(n, 4)[0] + divmod(n, 4)[1],
    "bits": lambda n: (n & 6) + (n | 1) + (n ^ 3) + (n << 1) + (n >> 1) + n.bit_length(),
    "math": lambda n: math.sqrt(n) + math.gcd(n, 6) + math.prod([n, 2]) + math.log2(n),
    "names of math": lambda n: ceil(n / 4) + gcd(n, 6),
    "numpy": lambda n: np.prod([n, 2]) + np.sqrt(n) + np.ceil(n / 4),
    "map": lambda n: sum(map(int, [n, n / 2])),
    "a float on the left": lambda n: 0.5 * n + 1.0 / n + 2.0**n,
    "a float by default": scaled,
    "cached": lambda n: cached_half(n) + 1,
    "cached in a closure": remembered_half,
    "nested": nested,
}


@pytest.mark.parametrize("name", FREE)
def test_functions_of_sizes_stay_free(name: str) -> None:
    """The graph computes the number anew at every length, with nothing refused."""
    model = Between(length(FREE[name]))
    traced = chase_fx.trace(model, torch.randn(2, 12, 4))
    for n in (12, 5, 16, 27):
        x = torch.randn(3, n, 4)
        assert torch.equal(traced(x), model(x)), n


def test_strides_follow_the_sizes() -> None:
    """Overlapping chunks by ``as_strided`` are laid out for the sizes that are there."""

    def chunks(x: Tensor) -> Tensor:
        size, stride = list(x.shape), list(x.stride())
        return x.as_strided((size[0], 2, size[1] // 2, size[2]), (stride[0], stride[1] * 2, *stride[1:])).sum(1)

    model = Between(chunks)
    traced = chase_fx.trace(model, torch.randn(2, 12, 4))
    x = torch.randn(3, 8, 4)
    assert torch.equal(traced(x), model(x))


def test_a_float_attribute_times_a_size_stays_free() -> None:
    """``self.ratio * n`` with a plain float on the left follows the size."""

    class Net(Between):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.ratio = 0.5
            self.options = Options(0.25)

        def forward(self, x: Tensor) -> Tensor:
            n = self.ratio * x.shape[1] + self.options.share * x.shape[1]
            return self.b(self.a(x) + torch.ones(int(n), 8).sum(0))

    model = Net()
    traced = chase_fx.trace(model, torch.randn(2, 12, 4))
    x = torch.randn(2, 7, 4)
    assert torch.equal(traced(x), model(x))
    assert type(model.ratio) is float
    assert type(model.options.share) is float


def test_len_stays_free() -> None:
    """``len(x)`` is the size of the first dim."""
    model = Between(lambda x: x.view(len(x), 8))
    traced = chase_fx.trace(model, torch.ones(3, 4))
    assert traced(torch.ones(5, 4)).shape == (5, 2)


FIXED: dict[str, Callable[[int], Any]] = {
    "comparison": lambda n: 3 if n > 10 else 2,
    "equality": lambda n: 3 if n == 12 else 2,
    "truth": lambda n: n % 7 or 9,
    "membership": lambda n: 3 if n in (4, 12) else 2,
    "membership in a set": lambda n: 3 if n in {7, 9} else 2,
    "loop": lambda n: sum(1 for _ in range(n)),
    "repeated list": lambda n: len([0] * n),
    "numpy array": lambda n: np.asarray([n, 1]).sum(),
    "integral float": lambda n: 3 if (n / 3).is_integer() else 2,
    "predicate of math": lambda n: 3 if math.isclose(n / 12, 1.0) else 2,
    "a float compared": lambda n: 3 if 10.5 < n else 2,  # noqa: SIM300  (asks the float)
    "hidden call": lambda n: functools.partial(int, n)() + 1,
}


def refused(traced: TracedModule, x: Tensor) -> str:
    """What the module's own graph says where it does not hold: the module then gets another one."""
    traced = copy.deepcopy(traced)
    traced.variants.recapture = None
    with pytest.raises(OtherSizeError) as found:
        traced(x)
    return str(found.value)


@pytest.mark.parametrize("name", FIXED)
def test_decisions_by_sizes_are_guarded(name: str) -> None:
    """At a length for which Python decides otherwise, the graph refuses and names the line; another one serves it."""
    model = Between(length(FIXED[name]))
    traced = chase_fx.trace(model, torch.randn(2, 12, 4))
    x, other = torch.randn(5, 12, 4), torch.randn(2, 7, 4)
    assert torch.equal(traced(x), model(x))
    assert re.search(r"test_sizes.py:\d+.*trace again", refused(traced, other))
    assert torch.equal(traced(other), model(other))


def test_a_loop_in_steps_is_guarded_by_its_count() -> None:
    """Another length with as many chunks runs, one with more needs another graph."""
    model = Between(lambda x: torch.cat([x[:, i : i + 4].cumsum(1) for i in range(0, x.shape[1], 4)], 1))
    traced = chase_fx.trace(model, torch.randn(2, 12, 4))
    for n, graphs in ((10, 0), (13, 1), (16, 1)):
        x = torch.randn(2, n, 4)
        assert torch.equal(traced(x), model(x))
        assert len(traced.variants.others) == graphs
    assert "4 == 3" in refused(chase_fx.trace(model, torch.randn(2, 12, 4)), x)


def test_live_steps_of_a_range() -> None:
    """Two halves are the halves of any even length."""
    model = Between(lambda x: sum(x[:, i : i + x.shape[1] // 2] for i in range(0, x.shape[1], x.shape[1] // 2)))
    traced = chase_fx.trace(model, torch.randn(2, 12, 4))
    x, odd = torch.randn(2, 8, 4), torch.randn(2, 9, 4)
    assert torch.equal(traced(x), model(x))
    assert "3 == 2" in refused(traced, odd)
    assert torch.equal(traced(odd), model(odd))


@pytest.mark.parametrize(
    "parts",
    [lambda x: [*x], lambda x: x.unbind(0), lambda x: x.split(1), lambda x: [x[0], *itertools.islice(x, 1, None)]],
    ids=["iteration", "unbind", "split", "islice"],
)
def test_as_many_tensors_as_a_size_says_are_guarded(parts: Callable[[Tensor], Any]) -> None:
    """Samples that the graph has no nodes for are not ignored."""
    model, x = Between(lambda x: sum(parts(x))), torch.randn(5, 4)
    traced = chase_fx.trace(model, torch.randn(3, 4))
    traced(torch.randn(3, 4))
    assert "5 == 3" in refused(traced, x)
    assert torch.equal(traced(x), model(x))


def test_the_first_part_is_the_first_at_any_number() -> None:
    """Taking one part by its place depends on no other."""
    model = Between(lambda x: x.unbind(0)[0] + x.split(1)[1])
    traced = chase_fx.trace(model, torch.randn(3, 4))
    x = torch.randn(5, 4)
    assert torch.equal(traced(x), model(x))


def test_another_rank_is_another_graph_where_the_forward_looks_at_shapes() -> None:
    """A dim is read by its place, which means something else in a tensor of another rank."""
    model, x = Between(lambda x: x * x.shape[-1] * x.shape[0]), torch.randn(2, 3, 4)
    traced = chase_fx.trace(model, torch.randn(3, 4))
    assert "3 == 2" in refused(traced, x)
    assert torch.equal(traced(x), model(x))
    plain = Between(torch.relu)
    assert torch.equal(chase_fx.trace(plain, torch.randn(3, 4))(x), plain(x))


def test_sizes_of_parameters_need_no_guard() -> None:
    """What is compared with the shape of a weight is no decision by an input."""

    class Net(Between):
        def forward(self, x: Tensor) -> Tensor:
            if self.a.weight.shape[0] != 8 or self.a.weight.numel() < 3:
                raise RuntimeError
            return super().forward(x)

    traced = chase_fx.trace(Net(torch.relu), torch.randn(3, 4))
    assert sum(n.name.startswith("check") for n in traced.graph.nodes) == 0


def test_one_guard_for_one_decision() -> None:
    """A decision that is taken many times is checked once."""

    def between(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 2 if x.shape[0] > 1 else x
        return x

    def once(x: Tensor) -> Tensor:
        return x * 2 if all(x.shape[0] > 1 for _ in range(5)) else x

    for function, number in ((between, 5), (once, 1)):
        traced = chase_fx.trace(Between(function), torch.randn(3, 4))
        assert sum(n.name.startswith("check") for n in traced.graph.nodes) == number + 1  # and that of the rank


def test_classes_keep_their_meaning() -> None:
    """Only calls of int, float and type are replaced; the classes themselves are what they were."""
    seen: list[Any] = []

    def between(x: Tensor) -> Tensor:
        n = x.shape[0]
        seen.extend([isinstance(n, int), type(n) is int, {int: 1}[type(n)], issubclass(bool, int), np.dtype(int)])
        return x + torch.ones(2, dtype=int).sum()

    chase_fx.trace(Between(between), torch.randn(3, 4))
    assert seen[:4] == [True, True, 1, True]
    assert seen[4] == np.dtype("int64")


def test_code_is_put_back() -> None:
    """After a capture, also one that fails, functions and builtins are as they were."""

    def between(x: Tensor) -> Tensor:
        if int(x.shape[0]) == 2:
            raise RuntimeError("no")
        return x

    code, names = between.__code__, set(vars(builtins))
    model = Between(between)
    chase_fx.trace(model, torch.randn(3, 4))
    with pytest.raises(chase_fx.errors.CaptureError):
        chase_fx.trace(model, torch.randn(2, 4))
    assert between.__code__ is code
    assert hasattr(cached_half, "cache_clear")
    assert set(vars(builtins)) == names


def between_padded(x: Tensor) -> Tensor:
    """Padding to a multiple of 4."""
    n = x.shape[1]
    pad = (4 - n % 4) % 4
    return F.pad(x, (0, 0, 0, pad)) if pad > 0 else x


def test_guards_survive(tmp_path: Path) -> None:
    """Copies, pickles, slim modules, saved and compiled ones tell the same sizes apart."""
    model = Between(between_padded)
    fits, wrong = torch.randn(2, 10, 4), torch.randn(2, 8, 4)
    traced = chase_fx.trace(model, fits)
    slim = chase_fx.prune(model, fits)
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    modules = [
        copy.deepcopy(traced),
        pickle.loads(pickle.dumps(traced)),
        slim,
        chase_fx.load(tmp_path / "slim.safetensors", model),
    ]
    for module in modules:
        assert module(torch.randn(3, 9, 4)).shape == (3, 12, 2)
        assert "0 > 0" in refused(module, wrong)
        assert module(wrong).shape == (2, 8, 2)
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    for n in (10, 9, 13):
        x = torch.randn(2, n, 4)
        assert torch.equal(compiled(x), model(x))
    with pytest.raises(Exception, match="decides by a size"):
        compiled(wrong)


def test_guards_on_pruned_dims_compare_dense_sizes() -> None:
    """A slim graph has fewer channels, and the decisions of the dense model."""
    model = Between(lambda x: x * 2 if x.shape[-1] == 8 else x)
    x = torch.randn(3, 4)
    slim = chase_fx.prune(model, x)
    assert slim.get_submodule("a").out_features == 4
    assert slim(torch.randn(5, 4)).shape == (5, 2)


@pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")
def test_the_smaller_of_a_tensor_and_a_size_is_what_the_data_says() -> None:
    """``min(tensor, size)`` gives the tensor or the size itself, as where a mask is pasted into a box of an image."""

    class Crop(Between):
        def forward(self, x: Tensor, box: Tensor) -> Tensor:
            return self.b(self.a(x)[max(box[0], 0) : min(box[1], x.shape[0])])

    model, x = Crop(torch.relu), torch.randn(6, 4)
    for box in (torch.tensor([1, 4]), torch.tensor([-1, 9])):
        traced = chase_fx.trace(model, (x, box))
        assert torch.equal(traced(x, box), model(x, box))
        assert torch.equal(traced(x[:5], box), model(x[:5], box))
