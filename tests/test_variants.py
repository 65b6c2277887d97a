"""Sizes at which the model runs other code than the graph has: the module captures it again."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import chase_fx
from chase_fx.errors import OtherPathError, OtherSizeError
from chase_fx.graphs.traced import TracedModule
from chase_fx.training import GraphShrinker
from tests.oracle import assert_exact, randomise


class Net(nn.Module):
    """Normalised features of a sequence, between two layers; ``rule`` decides by the length."""

    def __init__(self, rule: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.other = nn.Linear(4, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(12, 3)
        self.rule = rule

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.norm(self.first(x).mT).mT)
        y = self.rule(self, y)
        out = self.last(y)
        return (out, y.mean()) if self.training else out


def branch(net: Net, y: Tensor) -> Tensor:
    """A table as long as the sequence, for short ones."""
    z = net.other(y)
    return z + torch.linspace(0, 1, y.shape[1], dtype=y.dtype)[:, None] if y.shape[1] < 6 else z.relu()


def loop(net: Net, y: Tensor) -> Tensor:
    """A recurrence."""
    state = torch.zeros_like(y[:, 0])
    for t in range(y.shape[1]):
        state = torch.tanh(net.other(state) + y[:, t])
    return y + state[:, None]


def padded(_: Net, y: Tensor) -> Tensor:
    """To whole windows, and back."""
    extra = -y.shape[1] % 4
    if extra:
        y = F.pad(y, (0, 0, 0, extra))
    y = y.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)
    return y[:, :-extra] if extra else y


RULES: dict[str, Callable[[Net, Tensor], Tensor]] = {"branch": branch, "loop": loop, "padded": padded}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def sequence(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def model_of(rule: Callable[[Net, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return randomise(Net(rule), (sequence(8),))


def others(module: TracedModule) -> int:
    return len(module.variants.others)


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


def test_first_met_in_inference_mode() -> None:
    """What a graph holds for itself can be trained with later."""

    def tabled(net: Net, y: Tensor) -> Tensor:
        return branch(net, y) * torch.tensor([1.0, 2.0] * 6, dtype=y.dtype)

    slim = chase_fx.prune(model_of(tabled), sequence(8))
    with torch.inference_mode():
        slim(sequence(5))
    slim(sequence(5)).sum().backward()
    assert slim.get_parameter("first.weight").grad is not None


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


def test_nothing_is_left_behind() -> None:
    """Rewritten and unpickled modules hold nothing for graphs that they don't have."""

    def tabled(net: Net, y: Tensor) -> Tensor:
        return loop(net, y) * torch.tensor([1.0, 2.0] * 6, dtype=y.dtype)

    traced = chase_fx.trace(model_of(tabled), sequence(8))
    names = {name for name, _ in (*traced.named_buffers(), *traced.named_modules())}
    traced(sequence(5))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan_keeping({}))
    again = pickle.loads(pickle.dumps(traced))
    for module in (slim, again):
        assert {name for name, _ in (*module.named_buffers(), *module.named_modules())} == names
    traced.recompile()
    assert {name for name, _ in (*traced.named_buffers(), *traced.named_modules())} == names


def test_layers_that_the_other_code_leaves_out() -> None:
    """What the plan removed from them does not matter."""

    def skipping(net: Net, y: Tensor) -> Tensor:
        return y if y.shape[1] < 6 else y + net.other(y)

    model = model_of(skipping)
    slim = chase_fx.prune(model, sequence(8))
    for length in (8, 5):
        assert_exact(model, slim, (sequence(length),))


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


def test_live_shrink() -> None:
    """What is cut while it trains meets other sizes as a slim module does."""
    model = model_of(branch)
    traced = chase_fx.trace(model, sequence(8))
    traced(sequence(5))
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.0)
    channels = chase_fx.analyze(traced)
    plan = channels.plan(0.5)
    slim = chase_fx.rewrite(traced, plan)
    shrink = GraphShrinker(traced, channels)
    masks = channels.masks_of(plan)
    kept = {g.name: torch.from_numpy(masks[g.atom]) for g in channels.groups if g.atom in masks}
    for name, parameter in traced.named_parameters():
        parameter.data = slim.get_parameter(name).data.clone()
    shrink(traced, kept)
    assert optimizer.param_groups[0]["params"]
    for length in (8, 5, 3):
        assert torch.equal(traced.eval()(sequence(length)), slim.eval()(sequence(length)))
        assert_exact(model, traced, (sequence(length),))


def test_live_shrink_of_numbered_channels() -> None:
    """The slim graph takes the places that stay from a buffer, which comes along."""

    def numbered(net: Net, y: Tensor) -> Tensor:
        return net.other(y * torch.arange(12, dtype=y.dtype))

    model = model_of(numbered)
    traced = chase_fx.trace(model, sequence(8))
    channels = chase_fx.analyze(traced)
    shrink = GraphShrinker(traced, channels)
    dense = chase_fx.trace(model, sequence(8))
    groups = chase_fx.analyze(dense)
    for share in (0.25, 0.5):
        plan = groups.plan(share)
        masks = groups.masks_of(plan)
        slim = chase_fx.rewrite(dense, plan)
        assert [name for name, _ in slim.named_buffers() if "kept" in name]
        for name, parameter in traced.named_parameters():
            parameter.data = slim.get_parameter(name).data.clone()
        shrink(traced, {g.name: torch.from_numpy(masks[g.atom]) for g in groups.groups if g.atom in masks})
        assert torch.equal(traced.eval()(sequence(8)), slim.eval()(sequence(8)))


def mixing(net: Net, y: Tensor) -> Tensor:
    """Short sequences couple the channels of two layers that are apart in long ones."""
    return net.other(y) + y if y.shape[1] < 6 else net.other(y)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    """Where the other code couples what the plan tells apart, the slim module refuses, and holds nothing more."""
    model = model_of(mixing)
    traced = chase_fx.trace(model, sequence(8))
    channels = chase_fx.analyze(traced)
    assert len(channels.groups) == 2
    half = torch.arange(12) < 6
    kept = {group.name: mask for group, mask in zip(channels.groups, (half, ~half), strict=True)}
    slim = chase_fx.rewrite(traced, channels.plan_keeping(kept))
    names = [name for name, _ in slim.named_buffers()]
    with pytest.raises(OtherSizeError, match=r"test_variants\.py:\d+.*could not be captured again.*coupled") as found:
        slim(sequence(5))
    assert "test_variants.py" in found.value.where
    assert [name for name, _ in slim.named_buffers()] == names
    assert_exact(model, slim, (sequence(8),))


def test_a_module_has_one_size() -> None:
    """A norm without weights that the other code calls on another width would change what the first graph computes."""

    class Grouped(Net):
        def __init__(self, rule: Callable[[Net, Tensor], Tensor]) -> None:
            super().__init__(rule)
            self.shared = nn.GroupNorm(4, 12, affine=False)

    def either(net: Any, y: Tensor) -> Tensor:
        if y.shape[1] < 6:
            return net.shared(net.other(y).mT).mT
        return net.other(net.shared(y.mT).mT)

    torch.manual_seed(0)
    model = randomise(Grouped(either), (sequence(8),))
    traced = chase_fx.trace(model, sequence(8))
    channels = chase_fx.analyze(traced)
    first = next(group for group in channels.groups if group.size == 4)
    slim = chase_fx.rewrite(traced, channels.plan_keeping({first.name: torch.arange(4) < 2}))
    chase_fx.verify(traced, slim)
    before = slim(sequence(8))
    with pytest.raises(OtherSizeError, match=r"test_variants\.py:\d+"):
        slim(sequence(5))
    assert torch.equal(slim(sequence(8)), before)


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


def test_frozen_outputs_and_custom_rules() -> None:
    """The outputs that the plan leaves open stay open."""

    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.rule(self, self.norm(self.first(x).mT).mT)
            return {"scores": self.last(y), "features": y}

    model = randomise(Two(branch), (sequence(8),))
    slim = chase_fx.prune(model, sequence(8), outputs="scores")
    assert slim(sequence(8))["features"].shape[-1] == slim(sequence(5))["features"].shape[-1] == 6
    traced = chase_fx.trace(model, sequence(5))
    again = chase_fx.rewrite(traced, chase_fx.analyze(traced, "scores").plan_keeping({}))
    assert again(sequence(5))["features"].shape[-1] == 12


def test_autocast_around_the_call() -> None:
    """The graph that is captured inside a region is the one for outside, which torch casts like the model."""
    model, x = model_of(branch).float(), sequence(5).float()
    traced = chase_fx.trace(model, sequence(8).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(x), model(x))
