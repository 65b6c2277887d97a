"""What a forward writes to without using what comes back, and buffers that it replaces."""

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
from tests.oracle import EXACT


class Doubled(torch.autograd.Function):
    """Doubles its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x: any shape."""
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """2 grad."""
        return grad * 2


class Net(nn.Module):
    """Two layers with ``step`` between them, which may write to the hidden layer and to buffers."""

    def __init__(self, step: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.step = step
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.relu, self.norm = nn.ReLU(inplace=True), nn.BatchNorm1d(8)
        self.register_buffer("state", torch.arange(8.0))
        self.register_buffer("other", torch.ones(8))
        self.bounded = nn.Embedding(3, 8, max_norm=0.1)

    def forward(self, x: Tensor) -> Any:
        """x: (N, 6) -> (N, 3), or with whatever ``step`` gives."""
        y = self.first(x) * 1
        with torch.no_grad():
            found = self.step(self, y)
        return self.last(y) if found is None else (self.last(y + self.state), found)


def _net(step: Callable[[Any, Tensor], Any]) -> Any:
    torch.manual_seed(0)
    return Net(step).double().eval()


def _same(net: Any, *, removes: bool = True) -> None:
    """The traced module does what the model does, also to its buffers, in calls after one another; slim ones do."""
    x = [torch.randn(n, 6, dtype=torch.float64) for n in (2, 2, 5, 1)]
    traced = chase_fx.trace(net, x[0])
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)) if removes else traced
    assert not removes or chase_fx.verify(traced, slim).difference <= EXACT
    for training in (False, True):
        model, graph = copy.deepcopy(net).train(training), copy.deepcopy(traced).train(training)
        for batch in x[: 3 if training else 4]:
            torch.testing.assert_close(graph(batch), model(batch))
            torch.testing.assert_close(dict(graph.named_buffers()), dict(model.named_buffers()))


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "module": lambda m, y: m.relu(y),
    "part": lambda m, y: m.relu(y[:, 2:]),
    "function": lambda m, y: F.leaky_relu(y, inplace=True),
    "out": lambda m, y: F.normalize(y, dim=0, out=y),
    "operator": lambda m, y: torch.ops.aten.mul_.Tensor(y, y),
    "operator's out": lambda m, y: torch.ops.aten.mul.out(y, y, out=y),
    "autograd function": lambda m, y: Doubled.apply(y),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_writes_stay_though_nobody_uses_what_comes_back(name: str) -> None:
    """A call that is told to write by an argument, or whose name does not say that it writes."""

    def step(m: Any, y: Tensor) -> None:
        WRITES[name](m, y)

    _same(_net(step))


def test_writes_to_state_stay_though_nobody_uses_what_comes_back() -> None:
    """Statistics of a batch, and weights that a lookup makes shorter, are written by calls that seem only to read."""

    def step(m: Any, y: Tensor) -> None:
        F.batch_norm(y, m.state, m.other, training=True)
        m.bounded(torch.tensor([1, 2]))
        y += m.bounded.weight[1] + m.state

    model, x = _net(step), torch.randn(4, 6, dtype=torch.float64)
    traced = chase_fx.trace(model, x)
    for batch in (x, x[:2], torch.randn(5, 6, dtype=torch.float64)):
        torch.testing.assert_close(traced(batch), model(batch))
        torch.testing.assert_close(dict(traced.state_dict()), dict(model.state_dict()))


def test_a_write_that_nobody_reads_keeps_no_layer() -> None:
    """A branch that is not used goes, even if its last call writes to what the branch made."""
    traced = chase_fx.trace(_net(_unused), torch.zeros(2, 6, dtype=torch.float64))
    assert not any(node.target == "relu" for node in traced.graph.nodes)


def _unused(m: Any, y: Tensor) -> None:
    m.relu(F.linear(y, m.last.weight))


@pytest.mark.parametrize("function", [lambda t: t.mul_(2), lambda t: t.mul_(2) + 1])
def test_a_write_inside_of_a_vmap_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    """It was lost in the graph: no call that is recorded writes to the tensor."""

    def step(_: Any, y: Tensor) -> None:
        torch.vmap(function)(y)

    with pytest.raises(CaptureError, match=r"where the torch API does not show it \(aten.mul_"):
        chase_fx.trace(_net(step), torch.zeros(2, 6, dtype=torch.float64))


def _old_is_read(m: Any, y: Tensor) -> Any:
    old = m.state
    m.state = old + y.mean(0)
    return m.state - old


def _old_view_is_read(m: Any, y: Tensor) -> Any:
    old = m.state[2:4]
    m.state = y.sum(0)
    return old * 2


def _old_is_the_result(m: Any, y: Tensor) -> Any:
    old = m.state
    m.state = y.mean(0)
    return old, [old[1:]], m.state


def _old_decides(m: Any, y: Tensor) -> Any:
    old = m.state
    m.state = m.state - y.abs().sum(0)
    return y.sum() * (2 if old.sum() > 0 else 3)


def _new_is_written(m: Any, y: Tensor) -> Any:
    m.state = m.state.roll(1)
    m.state[0] = y.sum()
    return m.state


def _twice(m: Any, y: Tensor) -> Any:
    old = m.state
    m.state = m.state + y.mean(0)
    m.state = m.state * 2
    m.state.clamp_(max=9)
    return old.sum()


def _exchanged(m: Any, y: Tensor) -> Any:
    m.state.add_(y.mean(0))
    old, m.state = m.state, m.other
    m.other = old
    return m.state - m.other


def _put_back(m: Any, y: Tensor) -> Any:
    old = m.state
    m.state = y.mean(0)
    mean = m.state
    m.state = old
    return mean


def _by_dict(m: Any, y: Tensor) -> Any:
    m._buffers["state"] = m.state + y.mean(0)
    return m.state.sum()


def _registered_again(m: Any, y: Tensor) -> Any:
    m.register_buffer("state", m.state + y.mean(0))
    return m.state.sum()


def _on_one_way(m: Any, y: Tensor) -> Any:
    old = m.state
    if y.sum() > 0:
        m.state = m.state + y.mean(0)
        m.state[1] = 3
    return old.sum() + m.state.sum()


@pytest.mark.filterwarnings("ignore::chase_fx.SpecializationWarning")
@pytest.mark.parametrize(
    "step",
    [
        _old_is_read,
        _old_view_is_read,
        _old_is_the_result,
        _old_decides,
        _new_is_written,
        _twice,
        _exchanged,
        _put_back,
        _by_dict,
        _registered_again,
        _on_one_way,
    ],
)
def test_buffers_that_are_replaced(step: Callable[[Any, Tensor], Any]) -> None:
    """The old tensor and the new one are two, as in the model, though a graph has one buffer for both."""
    _same(_net(step), removes=False)


def _none(m: Any, _: Tensor) -> None:
    m.state = None


def _parameter(m: Any, _: Tensor) -> None:
    m.last.weight = nn.Parameter(m.last.weight * 2)


def _held_twice(m: Any, _: Tensor) -> Any:
    m.state = m.state + 1
    return m.norm.running_mean


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (_none, "None in place of the buffer 'state'"),
        (_parameter, "replaces the parameter 'last.weight'"),
        (_held_twice, "another name of it keeps the old tensor"),
    ],
)
def test_state_that_a_graph_can_not_replace_is_refused(step: Callable[[Any, Tensor], Any], message: str) -> None:
    """A buffer that is gone in the second call, a parameter that no optimizer knows, a buffer of two modules."""
    net = _net(step)
    net.norm.running_mean = net.state
    with pytest.raises(CaptureError, match=message):
        chase_fx.trace(net, torch.zeros(2, 6, dtype=torch.float64))


def test_a_parameter_that_is_tied_in_the_forward_is_followed() -> None:
    """The tensor that takes the place of another one is a parameter itself."""

    def step(m: Any, y: Tensor) -> None:
        m.again.weight = m.last.weight
        y += m.again(y).mean()

    net = _net(step)
    net.again = nn.Linear(8, 3).double()
    _same(net)


def _of_parameters(m: Any, y: Tensor) -> None:
    m.slow.weight.lerp_(m.last.weight, 0.1)
    torch._foreach_mul_([m.slow.bias], 0.5)
    y += F.linear(y, m.slow.weight, m.slow.bias).mean()


def _with_slow(step: Callable[[Any, Tensor], Any]) -> Any:
    net = _net(step)
    net.slow = nn.Linear(8, 3).double().requires_grad_(False)
    return net


def test_verify_and_prune_leave_parameters_that_a_forward_writes() -> None:
    """Moving averages of weights are what they were: verifying is no step of theirs."""
    net, x = _with_slow(_of_parameters), torch.randn(2, 6, dtype=torch.float64)
    traced = chase_fx.trace(net, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    before = copy.deepcopy(slim.state_dict())
    chase_fx.verify(traced, slim)
    torch.testing.assert_close(dict(slim.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(dict(traced.state_dict()), dict(net.state_dict()), rtol=0, atol=0)
    pruned = chase_fx.prune(net, x, channel_sparsity=0.5)
    torch.testing.assert_close(dict(pruned.state_dict()), dict(before), rtol=0, atol=0)


def test_parameters_that_an_operator_on_lists_wrote_are_put_back_where_a_graph_refuses_sizes() -> None:
    """Another batch takes another way, which is found out behind the write: the write counts once."""

    def step(m: Any, y: Tensor) -> None:
        torch._foreach_mul_([m.slow.bias], 0.5)
        y += m.slow.bias.mean() * (2 if len(y) > 3 else 3)

    net = _with_slow(step)
    traced = chase_fx.trace(net, torch.randn(2, 6, dtype=torch.float64)).eval()
    for batch in (2, 5, 1, 4):
        x = torch.randn(batch, 6, dtype=torch.float64)
        torch.testing.assert_close(traced(x), net(x))
        torch.testing.assert_close(traced.get_parameter("slow.bias"), net.slow.bias)
