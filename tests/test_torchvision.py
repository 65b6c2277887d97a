"""Sixteen architectures of torchvision, pruned with no option but the sparsity."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.traced import TracedModule
from tests.oracle import EXACT, assert_exact, tensors
from tests.zoo.torchvision import ENTRIES, Entry

LARGE = ("wide_resnet50_2", "vgg16_bn")
COMPILED = ("resnet18", "googlenet", "shufflenet_v2_x1_0")


@dataclass
class Case:
    """A model, its capture, and the slim module at 50 %."""

    entry: Entry
    model: nn.Module
    before: dict[str, Tensor]
    modes: tuple[list[bool], list[bool]]  # before and after pruning
    traced: TracedModule
    slim: TracedModule


@pytest.fixture(scope="module", params=list(ENTRIES))
def case(request: pytest.FixtureRequest) -> Case:
    entry = ENTRIES[request.param]
    model = entry.build()
    next(model.children()).train()  # a mixture of modes, which has to survive
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    slim = chase_fx.prune(model, entry.inputs(), channel_sparsity=0.5)
    traced = chase_fx.trace(model, entry.inputs())
    after = [module.training for module in model.modules()]
    return Case(entry, model.eval(), before, (modes, after), traced.eval(), slim.eval())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_plan(case: Case, slim: nn.Module) -> None:
    """Kept widths, input and output dims, and the tensors of the slim module agree with the plan."""
    kept = slim.plan.kept_indices()
    dense, own = case.model.state_dict(), slim.state_dict()
    assert set(kept) == set(dense) == set(own)
    for name, indices in kept.items():
        shape = [n if k is None else len(k) for n, k in zip(dense[name].shape, indices, strict=True)]
        assert tuple(own[name].shape) == tuple(shape)
        assert all(n > 0 for n in shape)
        assert all(k is None or torch.equal(k, k.unique()) for k in indices)
    last = list(case.model.named_parameters())[-1][0]
    assert own[last].shape == dense[last].shape == (1000,)


def test_half_is_exact(case: Case) -> None:
    """At 50 % the slim module equals the masked dense model, by the library's judgement and by the oracle's."""
    report = chase_fx.verify(case.traced, case.slim)
    assert report.dtype is torch.float64
    assert report.difference <= EXACT
    check_plan(case, case.slim)
    assert_exact(case.model, case.slim, case.entry.inputs())
    assert case.slim(*case.entry.inputs()).shape == (2, 1000)


def test_half_is_small(case: Case) -> None:
    """At 50 % no more parameters are left than a quarter and what rounding, inputs and outputs explain."""
    assert count(case.slim) <= case.entry.left * count(case.model)


def test_nine_tenths_is_exact(case: Case) -> None:
    """At 90 % the slim module equals the masked dense model, and at least one unit is left everywhere."""
    slim = chase_fx.prune(case.model, case.entry.inputs(), channel_sparsity=0.9)
    report = chase_fx.verify(case.traced, slim)
    assert report.difference <= EXACT
    check_plan(case, slim)
    assert_exact(case.model, slim, case.entry.inputs())
    assert count(slim) < 0.1 * count(case.model)


def test_model_is_unchanged(case: Case) -> None:
    """Pruning changes no bit of the model's state and no training flag, and shares no memory with it."""
    state = case.model.state_dict()
    assert list(state) == list(case.before)
    assert all(torch.equal(state[name], case.before[name]) for name in state)
    assert case.modes[0] == case.modes[1]
    own = {t.data_ptr() for t in state.values()}
    assert not own & {t.data_ptr() for t in (*case.slim.state_dict().values(), *case.traced.state_dict().values())}


def test_other_inputs(case: Case) -> None:
    """The slim module is exact on another batch size and another image size, though captured on one of each."""
    assert_exact(case.model, case.slim, case.entry.inputs(3, case.entry.other, seed=5))


def test_batch_size_does_not_matter(case: Case) -> None:
    """Captures at batch sizes 1, 2, 3 and 8 give the same plan."""
    model = copy.deepcopy(case.model).float()
    home = "meta" if case.entry.name in LARGE else "cpu"
    model.to(home)
    plans = []
    for batch in (1, 2, 3, 8):
        args = tuple(x.to(home, torch.float32) for x in case.entry.inputs(batch))
        plans.append(chase_fx.analyze(chase_fx.trace(model, args)).plan(0.5))
    assert all(list(plan.differences(plans[0])) == [] for plan in plans)
    assert len(set(plans)) == 1


def test_copies(case: Case, tmp_path: Path) -> None:
    """deepcopy, and a state_dict through torch.save into a copy that was zeroed, give the same outputs."""
    args = case.entry.inputs()
    expected = case.slim(*args)
    twin = copy.deepcopy(case.slim)
    assert torch.equal(twin(*args), expected)
    torch.save(case.slim.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(twin(*args), expected)
    assert torch.equal(case.slim(*args), expected)


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    """A saved slim module is read back bit for bit on a dense model with other weights."""
    path = tmp_path / "slim.safetensors"
    chase_fx.save(case.slim, path)
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    loaded = chase_fx.load(path, other)
    assert loaded.plan == case.slim.plan
    assert loaded.state_dict().keys() == case.slim.state_dict().keys()
    assert torch.equal(loaded.eval()(*case.entry.inputs()), case.slim(*case.entry.inputs()))


def test_training_mode(case: Case) -> None:
    """Under one seed, the capture in train mode gives the model's own outputs, gradients and statistics."""
    args = case.entry.inputs(2)
    model, traced = copy.deepcopy(case.model).train(), copy.deepcopy(case.traced).train()
    outs = []
    for module in (model, traced):
        torch.manual_seed(3)
        outs.append(module(*args))
        sum(out.square().mean() for out in tensors(outs[-1])).backward()
    assert type(outs[0]) is type(outs[1])
    assert all(torch.equal(a, b) for a, b in zip(tensors(outs[0]), tensors(outs[1]), strict=True))
    for (name, a), (_, b) in zip(model.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12 + 1e-9 * a.grad.abs().max().item()), name
    state = traced.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_backward(case: Case) -> None:
    """In train mode every parameter of the slim module that the model trains gets a finite gradient of its shape."""
    args = case.entry.inputs(2)
    slim = copy.deepcopy(case.slim).train()
    sum(out.square().mean() for out in tensors(slim(*args))).backward()
    for name, parameter in slim.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all(), name
    assert not slim.eval().training
    assert not any(module.training for module in slim.modules())


def test_contract(case: Case, tmp_path: Path) -> None:
    """The graph of couplings names every tensor of the model, explains its classifier, and can be drawn."""
    channels = chase_fx.analyze(case.traced)
    assert not channels.unknown
    state = case.model.state_dict()
    for name, tensor in state.items():
        for dim, size in enumerate(tensor.shape):
            assert channels.graph.nodes[name, dim]["size"] == size
    last = list(case.model.named_parameters())[-1][0]
    assert "output" in channels.frozen[last, 0]
    for group in channels.groups:
        for member in group.members:
            assert member.positions.shape[0] == group.size
            assert int(member.positions.max()) < state[member.tensor].shape[member.dim]
    group = next(g for g in channels.groups if len(g.members) > 1)
    first, second = group.members[0], group.members[-1]
    text = channels.explain((first.tensor, first.dim), (second.tensor, second.dim))
    assert " at '" in text
    assert text.splitlines()[-1].endswith(f"{second.tensor}[dim {second.dim}]")
    path = channels.draw(tmp_path / "graph.dot")
    assert path.read_text().count("->") + path.read_text().count("--") > 0


def test_compile(case: Case) -> None:
    """torch.compile with fullgraph takes the slim module, and the capture, without a graph break."""
    args = case.entry.inputs()
    for module in (case.slim, *([case.traced] if case.entry.name in COMPILED else [])):
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            expected = module(*args)
            assert torch.allclose(compiled(*args), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_inductor() -> None:
    """A slim module compiled by inductor computes what it computes eagerly, to single precision."""
    entry = ENTRIES["squeezenet1_0"]
    args = tuple(x.float() for x in entry.inputs())
    slim = chase_fx.prune(entry.build().float(), args, channel_sparsity=0.5).eval()
    torch.compiler.reset()
    with torch.no_grad():
        expected = slim(*args)
        found = torch.compile(slim, fullgraph=True)(*args)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
