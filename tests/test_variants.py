"""Sizes at which the model runs other code than the graph has: the module captures it again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import chase_fx
from chase_fx.errors import OtherPathError, OtherSizeError
from tests.oracle import assert_exact
from tests.sequence_nets import Net, branch, loop, model_of, others, padded, sequence

RULES: dict[str, Callable[[Net, Tensor], Tensor]] = {"branch": branch, "loop": loop, "padded": padded}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
def test_other_lengths(rule: Callable[[Net, Tensor], Tensor]) -> None:
    """Traced and slim graphs follow the model, also to lengths that were seen before, in any order."""
    model = model_of(rule)
    traced, slim = chase_fx.trace(model, sequence(8)), chase_fx.prune(model, sequence(8))
    keys = list(slim.state_dict())
    for length in (8, 5, 7, 5, 8, 3):
        x = sequence(length, batch=3)
        assert torch.equal(traced(x), model(x))
        assert_exact(model, slim, (x,))
    assert others(traced) == others(slim) > 0
    assert list(slim.state_dict()) == keys


@every_rule
def test_training(rule: Callable[[Net, Tensor], Tensor]) -> None:
    """Outputs, draws, gradients and statistics are the model's, though the first graph was broken off half-way."""
    model = model_of(rule)
    traced = chase_fx.trace(model, sequence(8)).train()
    model.train()
    for length in (8, 5, 5):
        results = []
        for module in (model, traced):
            torch.manual_seed(3)
            module.zero_grad()
            out, extra = module(sequence(length))
            (out.square().sum() + extra).backward()
            results.append((out, extra, torch.rand(1)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        for (name, p), q in zip(model.named_parameters(), traced.parameters(), strict=True):
            assert (p.grad is None) is (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        for (name, p), q in zip(model.named_buffers(), traced.buffers(), strict=False):
            assert torch.equal(p, q), name
    assert others(traced) == 1


def test_inputs_written_to() -> None:
    """A forward that writes to its input before it decides writes once."""

    class Writes(Net):
        def forward(self, x: Tensor) -> Any:
            x += 1
            return super().forward(x)

    model = Writes(branch).double().eval()
    traced = chase_fx.trace(model, sequence(8))
    x, y = sequence(5), sequence(5)
    assert torch.equal(traced(x), model(y))
    assert torch.equal(x, y)
    assert others(traced) == 1
    with torch.inference_mode():
        x, y = sequence(3), sequence(3)
        assert torch.equal(traced(x), model(y))
        assert torch.equal(x, y)


def test_parameters_written_to() -> None:
    """A parameter that the forward writes to before the size decides is written once."""

    class Decaying(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                self.first.weight.mul_(0.5)
            return super().forward(x)

    model = Decaying(branch).double().eval()
    traced = chase_fx.trace(model, sequence(8))
    traced.load_state_dict(model.state_dict())
    for length in (8, 5, 5, 8):
        assert torch.equal(traced(sequence(length)), model(sequence(length)))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    before = slim.get_parameter("first.weight").detach().clone()
    slim(sequence(5))
    assert torch.equal(slim.get_parameter("first.weight"), before / 2)


def test_state_that_is_not_registered_is_not_forked() -> None:
    """Each graph would count for itself."""

    class Counts(Net):
        def __init__(self, rule: Callable[[Net, Tensor], Tensor]) -> None:
            super().__init__(rule)
            self.count = [torch.zeros((), dtype=torch.float64)]

        def forward(self, x: Tensor) -> Any:
            self.count[0].copy_(self.count[0] + 1)
            return super().forward(x * self.count[0])

    traced = chase_fx.trace(Counts(branch).double().eval(), sequence(8))
    with pytest.raises(OtherSizeError, match="make it a buffer"):
        traced(sequence(5))


def test_a_decision_by_precision() -> None:
    """A graph that was captured in one precision does not serve another."""

    def clamped(net: Net, y: Tensor) -> Tensor:
        y = net.other(y)
        if y.shape[1] < 6 and y.dtype == torch.float32:
            y = y.clamp(-0.01, 0.01)
        return y

    model = model_of(clamped)
    traced = chase_fx.trace(model, sequence(8))
    traced.float()(sequence(5).float())
    assert others(traced) == 1
    traced.double().load_state_dict(model.state_dict())
    assert others(traced) == 0
    assert torch.equal(traced(sequence(5)), model(sequence(5)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant: bool) -> None:
    """What is saved for the backward pass is that of one graph."""
    model = model_of(branch)
    traced = chase_fx.trace(model, sequence(8))
    gradients = []
    for module in (model, traced):
        x = sequence(5).requires_grad_()
        out: Any = checkpoint(module, x, use_reentrant=reentrant)
        out.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_inputs_of_any_kind() -> None:
    """NaN and expanded inputs are compared as they are."""
    model = model_of(branch)
    traced = chase_fx.trace(model, sequence(8))
    x = torch.full((1, 1, 4), float("nan"), dtype=torch.float64).expand(2, 5, 4)
    assert traced(x).isnan().all()
    assert traced(x.contiguous().requires_grad_()).isnan().all()


def test_no_warning_at_a_call() -> None:
    """What a capture has to say was said by the first one."""

    def reading(net: Net, y: Tensor) -> Tensor:
        return branch(net, y) * float(net.norm.eps + y.sum().item() * 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = chase_fx.trace(model_of(reading), sequence(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(sequence(5))


def test_threads() -> None:
    """Lengths that several threads meet first."""
    model = model_of(loop)
    traced = chase_fx.trace(model, sequence(8))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda n: traced(sequence(n)), (3, 4, 5, 3, 4, 5, 8)))
    for n, out in zip((3, 4, 5, 3, 4, 5, 8), found, strict=True):
        assert torch.equal(out, model(sequence(n)))
    assert torch.equal(traced(sequence(4)), model(sequence(4)))


def test_copies_and_precision() -> None:
    """Graphs for other sizes go along with copies, precision and loaded weights."""
    model = model_of(branch)
    traced = chase_fx.trace(model, sequence(8))
    traced(sequence(5))
    copied = copy.deepcopy(traced)
    other = model_of(branch)
    nn.init.ones_(other.other.weight)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(sequence(5)), other(sequence(5)))
    assert torch.equal(traced(sequence(5)), model(sequence(5)))
    copied.float()
    assert torch.equal(copied(sequence(5).float()), other.float()(sequence(5).float()))
    assert torch.equal(copied(sequence(4).float()), other(sequence(4).float()))


def test_compiled() -> None:
    """A compiled module has the graphs of the sizes that the module met before it was compiled."""
    model = model_of(branch)
    traced = chase_fx.trace(model, sequence(8))
    for length in (8, 5):
        traced(sequence(length))
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    for length in (8, 5, 9):
        assert torch.equal(compiled(sequence(length)), model(sequence(length)))
    with pytest.raises(Exception, match="decides by a size"):
        compiled(sequence(4))


def test_what_the_model_can_not_do_is_refused() -> None:
    """With the model's own error."""

    def strict(_: Net, y: Tensor) -> Tensor:
        if y.shape[1] < 6:
            raise ValueError("too short")
        return y

    traced = chase_fx.trace(model_of(strict), sequence(8))
    with pytest.raises(OtherSizeError, match="too short"):
        traced(sequence(5))


def test_layers_that_were_replaced() -> None:
    """Another activation is part of every graph; a parameter that is gone leaves none but those that there are."""
    model = model_of(loop)
    model.drop = nn.Tanh()
    traced = chase_fx.trace(model, sequence(8))
    traced.drop = model.drop = nn.Sigmoid()
    assert torch.equal(traced(sequence(5)), model(sequence(5)))
    traced.other = nn.Linear(12, 12, bias=False).double()
    traced(sequence(8))
    with pytest.raises(OtherSizeError, match=r"'other\.bias' is gone"):
        traced(sequence(4))


def test_an_edited_graph_stands_alone() -> None:
    """Graphs that are captured again would lack what was edited."""
    traced = chase_fx.trace(model_of(branch), sequence(8))
    traced(sequence(5))
    for node in traced.graph.nodes:
        if node.target == "relu":
            node.target = "sigmoid"
    traced.recompile()
    traced(sequence(8))
    with pytest.raises(OtherSizeError):
        traced(sequence(5))


def test_data_that_decide_sizes_are_refused() -> None:
    """A capture for each new number of hits would never end."""

    def hits(_: Net, y: Tensor) -> Tensor:
        found = y[y[..., 0] > 0]
        return y * 2 if len(found) > 3 else y

    model = model_of(hits)
    traced = chase_fx.trace(model, sequence(8))
    many, few = (1000 * model.first.weight[0].detach().expand(2, 8, 4) * sign for sign in (1, -1))
    if model.norm.weight[0] < 0:
        many, few = few, many
    assert torch.equal(traced(many), model(many))
    with pytest.raises(OtherPathError, match="whole=") as found:
        traced(few)
    assert not isinstance(found.value, OtherSizeError)


def test_inside_another_capture_and_under_vmap() -> None:
    """No capture begins inside of another one, or inside a function transform."""
    traced = chase_fx.trace(model_of(branch), sequence(8))
    with pytest.raises(OtherPathError, match="decides by a size"):
        chase_fx.trace(nn.Sequential(traced, nn.Linear(3, 2).double()), sequence(5))
    with pytest.raises(OtherSizeError):
        torch.func.vmap(traced)(sequence(5)[:, None])
    assert others(traced) == 0


def test_the_oldest_graphs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrence has a graph for each length, of which the module keeps some, with their constants."""
    monkeypatch.setattr("chase_fx.graphs.variants._MOST", 3)

    def tabled(net: Net, y: Tensor) -> Tensor:
        return loop(net, y) + torch.tensor([0.5, 2.0, 1.0], dtype=y.dtype).sum()

    model = model_of(tabled)
    traced = chase_fx.trace(model, sequence(8))
    buffers = len(list(traced.buffers()))
    for length in (1, 2, 3, 4, 5, 4, 8):
        assert torch.equal(traced(sequence(length)), model(sequence(length)))
        assert others(traced) <= 3
    assert len(list(traced.buffers())) <= buffers * 4


def test_autocast_around_the_call() -> None:
    """The graph that is captured inside a region is the one for outside, which torch casts like the model."""
    model, x = model_of(branch).float(), sequence(5).float()
    traced = chase_fx.trace(model, sequence(8).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(x), model(x))
