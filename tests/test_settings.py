"""A forward that changes its own modules, their settings or their mode, between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.writes import writes_state
from tests.oracle import assert_exact, masked_copy, randomise


class Changing(nn.Module):
    """Convolutions around ``change``, which may do anything to the modules."""

    def __init__(self, change: Callable[[Changing, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.drop, self.pool = nn.BatchNorm2d(8), nn.Dropout(0.0), nn.AvgPool2d(2)
        self.act = nn.LeakyReLU(0.1)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.change(self, self.a(x))).mean((2, 3))


def slope_twice(m: Changing, y: Tensor) -> Tensor:
    m.act.negative_slope = 0.1
    y = m.act(y)
    m.act.negative_slope = 0.7
    return m.act(y)


def pool_all(m: Changing, y: Tensor) -> Tensor:
    m.pool.kernel_size = y.shape[2:]
    return y * m.pool(y)


def pool_by_size(m: Changing, y: Tensor) -> Tensor:
    m.pool.kernel_size = y.shape[2] // 2
    m.pool.stride = y.shape[3] // 2
    return m.pool(y)


def frozen_norm(m: Changing, y: Tensor) -> Tensor:
    m.norm.eval()
    return m.norm(y)


def dilated(m: Changing, y: Tensor) -> Tensor:
    m.b.stride = (2, 2)
    z = m.b(y)
    m.b.stride = (1, 1)
    return F.pad(z, (0, 0, 0, 0, 0, 4))


def dropping_late(m: Changing, y: Tensor) -> Tensor:
    y = m.drop(y)
    m.drop.p = 0.5
    y = m.drop(y)
    m.drop.p = 0.0
    return y


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("change", [slope_twice, pool_all, pool_by_size, frozen_norm, dilated, dropping_late])
def test_settings_are_those_of_each_call(change: Callable[[Changing, Tensor], Tensor]) -> None:
    """Each call runs with the settings that the forward gave the module, at other sizes and in train mode too."""
    x, other = images(2, 8), images(3, 12)
    model = randomise(Changing(change), (x,))
    traced = chase_fx.trace(model, x)
    for inputs in (x, other, x):
        assert torch.equal(traced(inputs), model(inputs))
    slim = chase_fx.prune(model, x)
    assert slim.get_submodule("a").weight.shape[0] < 8
    assert_exact(model, slim, (x,))
    assert_exact(model, slim, (other,))
    model.train(), traced.train()
    torch.manual_seed(0)
    want = model(other)
    torch.manual_seed(0)
    assert torch.equal(traced(other), want)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), traced.buffers(), strict=True))


class _Fresh(nn.Module):
    """Puts an attribute of another name, which holds the same object, in the place of its last one."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh = True

    def forward(self, x: Tensor) -> Tensor:
        strength = 0.1 if self.training else 1.0
        if hasattr(self, "fresh"):
            del self.fresh
            self.used = True
            return x * 2 * strength
        return x * 3 * strength


def test_an_attribute_of_another_name_is_another_setting() -> None:
    gain = _Fresh()
    model = nn.Sequential(nn.Linear(4, 8), gain, gain, nn.Linear(8, 2)).eval()
    x = torch.ones(1, 4)
    traced = chase_fx.trace(model, x)
    assert torch.equal(traced(x), model(x))


class _Count:
    n = 0


class _Counting(nn.Module):
    """Without weights, as drop-path is; what it counts is inside of what it holds."""

    def __init__(self, holds: _Count | tuple[list[int], ...]) -> None:
        super().__init__()
        self.holds = holds

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.holds, _Count):
            self.holds.n = n = self.holds.n + 1
        else:
            self.holds[0][0] = n = self.holds[0][0] + 1
        return x if self.training else x * n


class _Toggling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        self.on = not self.on
        return x * 3 if self.on and not self.training else x


@pytest.mark.parametrize("layer", [_Counting(_Count()), _Counting(([0],)), _Toggling()])
def test_layers_without_weights_that_change_what_they_hold(layer: nn.Module) -> None:
    """Each call means what the layer holds then."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layer, self.b = nn.Linear(4, 8), copy.deepcopy(layer), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.layer, _Toggling):
                self.layer.on = False
            elif isinstance(self.layer.holds, _Count):
                self.layer.holds.n = 0
            else:
                self.layer.holds[0][0] = 0
            return self.b(self.layer(self.layer(self.layer(self.a(x)).tanh()).tanh()))

    model, x = Net().eval(), torch.randn(3, 4)
    traced, slim = chase_fx.trace(copy.deepcopy(model), x), chase_fx.prune(copy.deepcopy(model), x)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(slim(x), masked_copy(model, slim.plan.kept_indices())(x))
    for net in (traced.train(), model.train()):
        torch.testing.assert_close(net(x), model(x))


_TOTAL = [0]


def _in_a_global(x: Tensor) -> Tensor:
    _TOTAL[0] += 1
    return x * _TOTAL[0]


def _in_a_list(x: Tensor) -> Tensor:
    _TOTAL.append(1)
    return x * len(_TOTAL)


def _in_a_class(x: Tensor) -> Tensor:
    _Count.n += 1
    return x * _Count.n


def _in_itself(x: Tensor) -> Tensor:
    _in_itself.n += 1  # type: ignore[attr-defined]
    return x * _in_itself.n  # type: ignore[attr-defined]


class _Counter(nn.Module):
    """Without weights; it counts its calls somewhere else."""

    def __init__(self, count: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return self.count(F.dropout(x, 0.3, self.training))


@pytest.mark.parametrize("count", [_in_a_global, _in_a_list, _in_a_class, _in_itself])
def test_layers_without_weights_that_change_what_others_hold(count: Callable[[Tensor], Tensor]) -> None:
    """The forward begins anew in each call, and so does the graph."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layer, self.b = nn.Linear(4, 8), _Counter(count), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            _TOTAL[:], _Count.n, _in_itself.n = [0], 0, 0  # type: ignore[attr-defined]
            return self.b(self.layer(self.layer(self.a(x))))

    model, x = Net().eval(), torch.randn(3, 4)
    traced = chase_fx.trace(model, x)
    for train in (False, True, False):
        torch.manual_seed(0)
        want = model.train(train)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(traced.train(train)(x), want)


class _Drawing(nn.Module):
    """Without weights; what it writes to are its own variables, its attributes and tensors."""

    def forward(self, x: Tensor) -> Tensor:
        shape = [x.shape[0]]
        shape.append(1)
        mask = torch.ones_like(x)
        mask[torch.randint(3, (1,))] = 0
        x[:, 0] = 1
        self.last = 3
        return x * mask


def test_what_a_layer_writes_to() -> None:
    assert not writes_state(_Drawing())
    assert writes_state(_Counter(_in_a_global))
