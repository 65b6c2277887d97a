"""Sizes in code that a forward reaches on the way of an object, a table or a library: live or guarded, no constants."""

from __future__ import annotations

import functools
import statistics
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.oracle import assert_exact, randomise


def per(n: int) -> float:
    return 0.5 / n


class Scales:
    """Neither a module nor callable."""

    def __init__(self) -> None:
        self.table = {"per": per}

    def per(self, n: int) -> float:
        return 0.5 / n

    @property
    def double(self) -> Callable[[int], float]:
        return lambda n: 1.0 / n

    def __getitem__(self, n: int) -> float:
        return 0.5 / n


class Strict:
    """Has no attributes, and fails with an error of its own where it is asked for one."""

    __slots__ = ()

    def per(self, n: int) -> float:
        return 0.5 / n

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


STRICT = Strict()


@dataclass
class Config:
    scale: Callable[[int], float]

    def per(self, n: int) -> float:
        return 0.5 / n


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 / x.shape[2])


@functools.singledispatch
def chosen(n: int) -> float:
    return 0.5 / n


@functools.cache
def cached(n: int) -> float:
    return 0.5 / n


class Holder(nn.Module):
    def __init__(self, held: Any, number: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.held, self.number, self.kind = held, number, "scale"

    def scale_of(self, n: int) -> float:
        return 0.5 / n

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        found = self.number(self, x.shape)
        return self.b(found(y) if isinstance(found, nn.Module) else y * found).mean((2, 3))


HELD: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "method": (Scales(), lambda m, s: m.held.per(s[2])),
    "property": (Scales(), lambda m, s: m.held.double(s[2])),
    "subscript": (Scales(), lambda m, s: m.held[s[2]]),
    "table of an object": (Scales(), lambda m, s: m.held.table["per"](s[2])),
    "dict of functions": ({"per": lambda n: 0.5 / n}, lambda m, s: m.held["per"](s[2])),
    "ordered dict": (OrderedDict(per=per), lambda m, s: m.held["per"](s[2])),
    "set": ({per}, lambda m, s: next(iter(m.held))(s[2])),
    "object that is not to be asked": (None, lambda m, s: STRICT.per(s[2])),
    "dict of objects": ({"a": [Scales()]}, lambda m, s: m.held["a"][0].per(s[2])),
    "list of modules": ([Layer()], lambda m, s: m.held[0]),
    "dataclass": (Config(lambda n: 0.5 / n), lambda m, s: m.held.scale(s[2]) + m.held.per(s[3])),
    "namespace": (types.SimpleNamespace(per=lambda n: 0.5 / n), lambda m, s: m.held.per(s[2])),
    "bound": (Scales().per, lambda m, s: m.held(s[2])),
    "partial": (functools.partial(lambda fn, n: fn(n), lambda n: 0.5 / n), lambda m, s: m.held(s[2])),
    "cache": (cached, lambda m, s: m.held(s[2])),
    "dispatch": (None, lambda m, s: chosen(s[2])),
    "attribute by name": (None, lambda m, s: getattr(m, "scale_of")(s[2])),  # noqa: B009
    "attribute by a made name": (None, lambda m, s: getattr(m, f"{m.kind}_of")(s[2])),
    "window": (None, lambda m, s: torch.signal.windows.hann(s[2] + 1, dtype=torch.float64).square().sum()),
    "distribution": (
        None,
        lambda m, s: torch.distributions.MultivariateNormal(*normal(s[2]), validate_args=False).entropy(),
    ),
    "divergence": (None, lambda m, s: torch.distributions.kl_divergence(*two_normals(s[2]))),
    "gain": (None, lambda m, s: nn.init.calculate_gain("leaky_relu", s[2])),
    "divmod": (None, lambda m, s: divmod(7.5, s[2])[1] + divmod(29, s[3])[0]),
    "divmod of a computed float": ((7.5,), lambda m, s: divmod(m.held[0], s[2])[1]),
    "pow of three": (None, lambda m, s: pow(s[2], 2, 5) + pow(s[2], 1, None)),
    "mean": (None, lambda m, s: statistics.mean([s[2], s[3]])),
    "last ones": (None, lambda m, s: sum(deque(range(10), maxlen=s[2]))),
}


def normal(n: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)


def two_normals(n: int) -> list[Any]:
    return [
        torch.distributions.MultivariateNormal(mean + i, i * cov, validate_args=False)
        for i in (1, 2)
        for mean, cov in [normal(n)]
    ]


@pytest.mark.parametrize("name", HELD)
def test_reached(name: str) -> None:
    """The slim module is exact at other sizes than those of the example."""
    held, number = HELD[name]
    torch.manual_seed(0)
    model = Holder(held, number)
    randomise(model)
    slim = chase_fx.prune(model, torch.randn(2, 3, 7, 5).double(), channel_sparsity=0.5).eval()
    for height, width in ((7, 5), (9, 5), (6, 8)):
        assert_exact(model, slim, (torch.randn(2, 3, height, width).double(),))


def code_that_reads(kind: str) -> Callable[[Any, Any], Any]:
    """A function of a module that imports others as a whole, as most do."""
    scope: dict[str, Any] = {"__name__": __name__}
    source = {
        "struct": "struct.unpack('i', struct.pack('i', s[2]))[0]",
        "json": "json.loads(json.dumps({'n': s[2]}))['n']",
        "array": "array.array('l', [s[2]])[0]",
        "decimal": "float(decimal.Decimal(s[2]) + decimal.Decimal.from_float(0.5))",
        "fractions": "float(fractions.Fraction(s[2], 3))",
        "collections": "sum(collections.deque(range(20), s[2])) * isinstance(collections.OrderedDict(), dict)",
        "random": "random.Random(s[2]).random() * isinstance(random.Random(1), random.Random)",
    }[kind]
    exec(f"import {kind}\ndef number(m, s):\n    return {source}", scope)
    number: Callable[[Any, Any], Any] = scope["number"]
    return number


@pytest.mark.parametrize("kind", ["struct", "json", "array", "decimal", "fractions", "collections", "random"])
def test_c_code_that_reads_numbers(kind: str) -> None:
    """The standard library reads an int in C without asking it, so the size is a decision."""
    model = randomise(Holder(None, code_that_reads(kind)))
    slim = chase_fx.prune(model, torch.randn(2, 3, 7, 5).double(), channel_sparsity=0.5).eval()
    for height in (7, 9):
        assert_exact(model, slim, (torch.randn(2, 3, height, 5).double(),))


EXTENSIONS = {
    "name of a module": ("from scipy.fftpack import next_fast_len", "next_fast_len(s[2])"),
    "module": ("from scipy.fft._pocketfft import pypocketfft", "pypocketfft.good_size(s[2], real=True)"),
    "part": ("import scipy.fft._pocketfft", "scipy.fft._pocketfft.pypocketfft.good_size(s[2])"),
    "function": ("from scipy.fft._pocketfft.pypocketfft import good_size", "good_size(s[2])"),
    "value": ("from scipy.fft._pocketfft.pypocketfft import good_size", "[f(s[2]) for f in [good_size]][0]"),
    "under a cache": ("import scipy.fft", "scipy.fft.next_fast_len(s[2])"),
}


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_extensions_read_numbers(kind: str) -> None:
    """So does a function in C of another package, wherever its name comes from."""
    scope: dict[str, Any] = {"__name__": __name__}
    exec("{}\ndef number(m, s):\n    return {}".format(*EXTENSIONS[kind]), scope)
    model = randomise(Holder(None, scope["number"]))
    slim = chase_fx.prune(model, torch.randn(2, 3, 7, 5).double(), channel_sparsity=0.5).eval()
    for height in (7, 11, 13):
        assert_exact(model, slim, (torch.randn(2, 3, height, 5).double(),))
