"""Sizes that Python reads without asking them: they stay live, or the graph refuses other sizes; none is a constant."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherSizeError
from tests.oracle import assert_exact, randomise

LENGTH = 30


class Scaled(nn.Module):
    """A hidden activation times a number that ``number`` makes of the model and of the sizes of the images."""

    def __init__(self, number: Callable[[Any, torch.Size], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.scales = [0.5 * i + 1 for i in range(LENGTH)]
        self.pair = (0.75, 2.0)
        self.table = {i: i + 0.5 for i in range(LENGTH)}
        self.named = {f"s{i}": i + 0.25 for i in range(LENGTH)}
        self.places = np.arange(float(LENGTH))
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
        self.by_name = nn.ModuleDict({str(i): nn.Conv2d(8, 8, 1) for i in range(14)})
        self.layer1, self.layer2, self.layer3 = self.layers[:3]
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        found = self.number(self, x.shape)
        return self.b(found(y) if isinstance(found, nn.Module) else y * found).mean((2, 3))


def logarithm(m: Any, s: torch.Size) -> Any:
    from math import gcd as common
    from math import log2

    return log2(s[2]) + common(s[2], 12)


def places(m: Any, s: torch.Size) -> Any:
    import numpy as np

    return float(np.arange(s[2]).sum())


def constructors(m: Any, s: torch.Size) -> Any:
    import torch
    from torch import LongTensor as Numbers
    from torch import Tensor

    made = torch.Tensor(s[2], 3)
    assert isinstance(made, torch.Tensor)
    assert isinstance(made, Tensor)
    assert type(made) is Tensor
    made = torch.Tensor.add(made.zero_(), torch.LongTensor([s[2]]).type(torch.FloatTensor))
    return made.sum() * Numbers([[n] for n in s]).sum() * sum(Numbers(*[[n]]).sum() for n in s)


def import_by_other_name(m: Any, s: torch.Size) -> Any:
    import torch as th

    found = th.LongTensor if isinstance(m, nn.Module) else th.FloatTensor
    return th.FloatTensor(s[2], 3).fill_(0.1).sum() * found([s[2] if s[3] else 1])[0]


# What stays live: the graph serves other sizes.
LIVE: dict[str, Callable[[Any, torch.Size], Any]] = {
    "numel": lambda m, s: s.numel() * 0.01,
    "numel of a part": lambda m, s: s[1:].numel() * 0.01,
    "float of a tuple / size": lambda m, s: m.pair[0] / s[2],
    "float of a dict / size": lambda m, s: m.table[3] / s[2],
    "computed float / size": lambda m, s: (m.pair[0] * m.pair[1]) / s[2],
    "computed float ** size": lambda m, s: math.exp(m.pair[1]) ** s[2] * 1e-9,
    "float - size": lambda m, s: sum(m.scales) - s[2],
    "float of a text * size": lambda m, s: float("0.3") * s[2],
    "in place": lambda m, s: operator.iadd(m.pair[0], s[2]),
    "math": lambda m, s: math.log2(s[2]) + math.sqrt(s[2]) + math.pow(1.1, s[3]) + math.gcd(s[2], 12),
    "pow": lambda m, s: pow(m.pair[1], s[2]) * 1e-3,
    "old constructor": lambda m, s: torch.Tensor(s[2], 3).zero_().add(1).sum() * torch.FloatTensor(s[3], 1).fill_(0.1),
    "method of a constructor": lambda m, s: torch.Tensor.mul(torch.Tensor([0.1]), s[2]),
    "old constructor of numbers": lambda m, s: torch.Tensor([[s[2]], [0.1]]).sum() * torch.LongTensor([s[3]])[0],
    "old constructor by name": lambda m, s: Tensor(s[2], s[3]).fill_(0.1),
    "real": lambda m, s: s[2].real + s[2].numerator + s[2].conjugate(),
    "round": lambda m, s: round(s[2] / 3, 1),
    "torch's of numbers": lambda m, s: (
        torch.sym_int(s[2] / 3) + torch.sym_float(s[3]) + torch.sym_max(s[2], 7) + torch.sym_min(7, s[3])
    ),
    "index": lambda m, s: operator.index(s[2]) * 0.1,
    "enumerate": lambda m, s: next(iter(enumerate(m.scales, s[2])))[0] * 0.1,
    "copies": lambda m, s: copy.copy(s[2]) * 0.1 + copy.deepcopy([s[3]])[0],
    "number of bytes": lambda m, s: torch.empty(s[2], 3).nbytes * 0.01,
    "import inside": logarithm,
    "old constructors of an import inside": constructors,
    "old constructors of an import by another name": import_by_other_name,
}
# What Python decides by: the graph refuses other sizes.
DECIDED: dict[str, Callable[[Any, torch.Size], Any]] = {
    "list": lambda m, s: m.scales[s[2] // 2],
    "hash": lambda m, s: hash(s[2]) * 0.1,
    "torch's sum of numbers": lambda m, s: torch.sym_sum([s[2], 3]),
    "list from behind": lambda m, s: m.scales[-s[2]],
    "part of a list": lambda m, s: sum(m.scales[: s[2]]),
    "list of constants": lambda m, s: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0][s[2] // 2],
    "tuple": lambda m, s: m.pair[s[2] // 9],
    "dict": lambda m, s: m.table[s[2]],
    "get": lambda m, s: m.table.get(s[2], 1.0),
    "get what is not there": lambda m, s: m.table.get(62 - 4 * s[2], 1.0),
    "in": lambda m, s: 2.0 if 62 - 4 * s[2] in m.table else 1.0,
    "not in": lambda m, s: 2.0 if (62 - 4 * s[2], 3) not in {(14, 3), (10, 3)} else 1.0,
    "text in": lambda m, s: 2.0 if f"s{62 - 4 * s[2]}" in m.named else 1.0,
    "text not in": lambda m, s: 2.0 if str(s[2]) not in ("12", "13") else 1.0,
    "set": lambda m, s: len({s[2], 12}),
    "insert": lambda m, s: (found := [*m.scales]).insert(s[2], 0.0) or found[9],
    "indices": lambda m, s: len(range(*slice(s[2]).indices(20))),
    "padded text": lambda m, s: len("".zfill(s[2])),
    "submodule": lambda m, s: m.get_submodule(f"by_name.{s[2]}"),
    "plain": lambda m, s: s[2].__index__(),
    "pop": lambda m, s: list(m.scales).pop(s[2]),
    "module list": lambda m, s: m.layers[s[2] // 4],
    "module dict": lambda m, s: m.by_name[str(s[2])],
    "name": lambda m, s: getattr(m, f"layer{s[2] // 4}"),
    "f-string": lambda m, s: m.named[f"s{s[2]}"],
    "str": lambda m, s: m.named["s" + str(s[2])],
    "format": lambda m, s: m.named.get("s{}".format(s[2])),  # noqa: UP032
    "percent": lambda m, s: m.named["s%d" % s[2]],  # noqa: UP031
    "number of a text": lambda m, s: int(str(s[2])) + float(f"{s[3]}"),
    "text that is compared": lambda m, s: 2.0 if str(s[2]) == "8" else 1.0,
    "bytes": lambda m, s: b"abcdefghijklmn"[s[2]],
    "range": lambda m, s: range(0, 90, 3)[s[2]],
    "bits": lambda m, s: len(bin(s[2])) + int(hex(s[2]), 16) + s[2].bit_count() + s[2].to_bytes(2, "big")[1],
    "complex": lambda m, s: abs(1j * s[2]) + abs(complex(s[2], 1)),
    "ratio": lambda m, s: float(Fraction(s[2], 3)) + float(Decimal(s[2]) / 3) + s[2].as_integer_ratio()[0],
    "itertools": lambda m, s: sum(itertools.islice(m.scales, s[2])) + sum(itertools.repeat(1, s[2])),
    "itemgetter": lambda m, s: operator.itemgetter(s[2])(m.scales) + operator.getitem(m.scales, s[2]),
    "array": lambda m, s: float(m.places[s[2]]),
    "part of an array": lambda m, s: float(m.places[: s[2]].sum()),
    "arange": lambda m, s: float(np.arange(s[2]).sum()),
    "arange of an import inside": places,
    "number of numpy < size": lambda m, s: 2.0 if np.float64(9.5) < s[2] else 1.0,
    "size < number of numpy": lambda m, s: 2.0 if s[2] < np.float64(9.5) else 1.0,
    "linspace": lambda m, s: float(np.linspace(0.0, 1.0, num=s[2])[1]),
    "shape of an array": lambda m, s: float(np.zeros((s[2], 2)).shape[0]),
    "computed float < size": lambda m, s: 2.0 if m.table[9] < s[2] else 1.0,
}


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("how", LIVE)
def test_arithmetic_stays_live(how: str) -> None:
    """The graph computes with the sizes that it gets, and so does the slim one."""
    x, other = images(2, 8), images(3, 12)
    model = randomise(Scaled(LIVE[how]), (x,))
    traced = chase_fx.trace(model, x)
    for inputs in (x, other):
        assert torch.equal(traced(inputs), model(inputs))
    assert_exact(model, chase_fx.prune(model, x), (other,))


@pytest.mark.parametrize("how", DECIDED)
def test_what_is_looked_up_is_a_decision(how: str) -> None:
    """Sizes that pick something by Python are guarded; another batch size needs no other graph, other sizes do."""
    x, other = images(2, 8), images(3, 12)
    model = randomise(Scaled(DECIDED[how]), (x,))
    traced = chase_fx.trace(model, x)
    for inputs in (x, images(5, 8)):
        assert torch.equal(traced(inputs), model(inputs))
    assert not traced.variants.others
    try:
        want = model(other)
    except (LookupError, RuntimeError):
        with pytest.raises(OtherSizeError, match=r"test_escaping_sizes.py:\d+"):
            traced(other)
    else:
        assert torch.equal(traced(other), want)
        assert len(traced.variants.others) == 1


def test_a_message_is_no_decision() -> None:
    """Sizes that are only written to a text which is no key stay free."""

    class Told(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            message = f"images of {x.shape[2]} x {x.shape[3]} pixels, {x.shape}"
            assert x.dim() == 4, message
            return super().forward(x)

    x, other = images(2, 8), images(3, 12)
    model = randomise(Told(lambda m, s: m.named["s3"]), (x,))
    traced = chase_fx.trace(model, x)
    assert torch.equal(traced(other), model(other))


def test_imports_inside_a_forward() -> None:
    """While a forward is recorded, modules can be imported as ever."""

    class Importing(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            import colorsys
            from xml.dom import minidom

            assert colorsys.__name__ == "colorsys"
            assert minidom.__name__ == "xml.dom.minidom"
            return super().forward(x)

    x = images(2, 8)
    model = Importing(lambda m, s: 0.5).double()
    assert torch.equal(chase_fx.trace(model, x)(x), model(x))


class _Lazy(dict[str, Any]):
    """Values that cost something to ask for, such as modules that are imported then."""

    def values(self) -> Any:
        raise AssertionError("asked for every value")

    def __len__(self) -> int:
        return len(list(self.values()))


_LAZY = _Lazy(half=lambda n: 0.5 / n)


def test_containers_with_methods_of_their_own_are_not_asked() -> None:
    """What code can reach through a container is looked up without running the container's code."""
    x, other = images(2, 8), images(3, 12)
    model = randomise(Scaled(lambda m, s: _LAZY["half"](s[2])), (x,))
    traced = chase_fx.trace(model, x)
    assert torch.equal(traced(other), model(other))
