"""``weight.data = new`` in a forward: what that gives, and where it would show that graphs write to the old memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import CaptureError
from tests.oracle import EXACT, assert_exact, randomise


class Net(nn.Module):
    """Convolutions; ``step`` assigns before the last but one runs."""

    def __init__(self, step: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.step = step
        self.first, self.wide, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.merged, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) -> (N, 4, H, W)."""
        y = F.silu(self.first(x))
        found = self.step(self, y)
        y = y + self.merged(y) + self.mean[:, None, None]
        return self.last(y if found is None else y * found)


def _merged_in_eval_mode(m: Any, y: Tensor) -> None:
    """One kernel in place of two that only training has (SPAN)."""
    if not m.training:
        m.merged.weight.data = torch.einsum("oihw,ic->ochw", m.narrow.weight.data, m.wide.weight.data[..., 0, 0])
        m.merged.bias.data = (m.narrow.weight.data * m.wide.bias.data.reshape(1, -1, 1, 1)).sum((1, 2, 3))


def _bounded(m: Any, y: Tensor) -> None:
    """Filters of bounded length (EEGNet)."""
    m.merged.weight.data = torch.renorm(m.merged.weight.data, p=2, dim=0, maxnorm=1.0)


def _statistics(m: Any, y: Tensor) -> None:
    m.mean.data = 0.9 * m.mean.data + 0.1 * y.detach().mean((0, 2, 3))


def _clamped(m: Any, y: Tensor) -> None:
    """What is assigned is used as well, and comes from the weight itself (EEGMiner)."""
    kept = m.narrow.bias.clamp(-0.1, 0.1)
    m.narrow.bias.data = kept
    y.add_(kept[:, None, None])


def _after_use(m: Any, y: Tensor) -> Any:
    z = m.merged(y).mean()
    m.merged.weight.data = m.merged.weight.data * 2
    return z


def _twice(m: Any, y: Tensor) -> None:
    m.merged.bias.data = m.narrow.bias.data * 2
    m.merged.bias.data = m.merged.bias.data + 1


SERVED = {
    "merged in eval mode": _merged_in_eval_mode,
    "bounded": _bounded,
    "statistics": _statistics,
    "twice": _twice,
    "clamped": _clamped,
    "after use": _after_use,
}


@pytest.mark.parametrize("name", SERVED)
def test_new_data(name: str) -> None:
    """Graphs give and keep what the model does, call by call, in both modes; slim ones are exact."""
    torch.manual_seed(0)
    net = randomise(Net(SERVED[name]))
    x = [torch.randn(2, 3, size, size, dtype=torch.float64) for size in (5, 5, 6)]
    traced = chase_fx.trace(net, x[0])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    assert chase_fx.verify(traced, slim).difference <= EXACT
    assert slim.merged.weight.shape[0] < 8
    if name not in ("statistics", "after use"):  # those of the oracle's own calls
        assert_exact(net, slim, (x[2],))
    for training in (False, True):
        model, graph = copy.deepcopy(net).train(training), copy.deepcopy(traced).train(training)
        for batch in x:
            want, have = model(batch), graph(batch)
            torch.testing.assert_close(have, want)
            want.square().sum().backward()
            have.square().sum().backward()
            torch.testing.assert_close(dict(graph.state_dict()), dict(model.state_dict()))
        for path, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(graph.get_parameter(path).grad, parameter.grad)


def _old_is_read(m: Any, y: Tensor) -> Any:
    old = m.merged.bias.data
    m.merged.bias.data = m.narrow.bias.data * 2
    return old.sum()


def _put_back(m: Any, y: Tensor) -> Any:
    old = m.merged.bias.data
    m.merged.bias.data = m.narrow.bias.data * 2
    z = m.merged(y).mean()
    m.merged.bias.data = old
    return z


def _old_is_written(m: Any, y: Tensor) -> None:
    old = m.mean.view(2, 4)
    m.mean.data = y.detach().mean((0, 2, 3))
    old.zero_()


def _new_is_written(m: Any, y: Tensor) -> None:
    m.mean.data = new = y.detach().mean((0, 2, 3))
    new.mul_(2)


def _used_before(m: Any, y: Tensor) -> Any:
    """The backward pass would look at what the view is then."""
    z = (y.mean((0, 2, 3)) * m.merged.bias.view(2, 4).flatten()).sum()
    m.merged.bias.data = m.merged.bias.data * 2
    return z


def _tied(m: Any, y: Tensor) -> None:
    """An optimizer would move both from then on."""
    m.merged.bias.data = m.narrow.bias.data


def _transposed(m: Any, y: Tensor) -> None:
    """The same memory, read in another order."""
    m.merged.weight.data = m.merged.weight.data.transpose(0, 1)


def _another_shape(m: Any, y: Tensor) -> None:
    m.mean.data = y.detach().mean((0, 2, 3))[:1]


@pytest.mark.parametrize(
    "step",
    [_old_is_read, _put_back, _old_is_written, _new_is_written, _used_before, _tied, _transposed, _another_shape],
)
def test_what_would_show_is_refused(step: Callable[[Any, Tensor], Any]) -> None:
    """Two memories in the model are one in a graph."""
    with pytest.raises(CaptureError, match=r"assigns to a tensor's property 'data' at .*test_new_data"):
        chase_fx.trace(Net(step), torch.zeros(2, 3, 5, 5))
