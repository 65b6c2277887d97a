"""Capture, pruning, verification and compilation on a GPU; skipped where there is none.

Double precision tells exactness. Single precision comes with torch's settings as they are, so that convolutions may run
in TF32: what must hold then is that verification is not fooled by its rounding.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chase_fx
from chase_fx.errors import DeviceMismatchError, OtherPathError
from chase_fx.graphs.traced import TracedModule
from tests.device import CPU, DEVICE, NETS, close, images, moved, needs_device, rows
from tests.oracle import EXACT, assert_exact, randomise, tensors

pytestmark = [
    needs_device,
    pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning"),  # a mask that llama looks at
]


@dataclass
class Case:
    """A net on the device in double precision, its capture there, and the slim module at 50 %."""

    name: str
    model: nn.Module
    traced: TracedModule
    slim: TracedModule

    def inputs(self, *sizes: int, device: torch.device = DEVICE) -> Tensor:
        return NETS[self.name][1](*sizes).to(device)


@pytest.fixture(scope="module", params=list(NETS))
def case(request: pytest.FixtureRequest) -> Case:
    build, make = NETS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = moved(randomise(build()), DEVICE)
    x = make().to(DEVICE)
    return Case(request.param, model, chase_fx.trace(model, x).eval(), chase_fx.prune(model, x).eval())


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Single precision without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_pruning_is_exact(case: Case) -> None:
    """The slim module equals the masked dense one, lies where the model lies, and serves other sizes."""
    report = chase_fx.verify(case.traced, case.slim)
    assert report.dtype is torch.float64
    assert report.difference <= EXACT
    assert not report.stepwise
    for module in (case.traced, case.slim):
        assert {t.device for t in (*module.parameters(), *module.buffers())} == {DEVICE}
    assert sum(p.numel() for p in case.slim.parameters()) < 0.6 * sum(p.numel() for p in case.model.parameters())
    with torch.no_grad():
        for x in (case.inputs(), case.inputs(3, *((64,) if case.inputs().dim() == 4 and case.name != "vit" else ()))):
            assert close(case.traced(x), case.model(x), EXACT)
            assert next(tensors(case.slim(x))).device == DEVICE
    if case.inputs().is_floating_point():  # the oracle asks for outputs that are plain tensors
        assert_exact(case.model, case.slim, (case.inputs(3),))


def test_both_devices_find_the_same_channels(case: Case) -> None:
    """Kernels differ between devices; groups, frozen axes and the plan do not."""
    model = moved(copy.deepcopy(case.model), CPU)
    here = chase_fx.analyze(chase_fx.trace(model, case.inputs(device=CPU)))
    there = chase_fx.analyze(case.traced)
    assert not there.unknown
    assert [(g.name, g.size, len(g.members)) for g in there.groups] == [
        (g.name, g.size, len(g.members)) for g in here.groups
    ]
    assert there.frozen.keys() == here.frozen.keys()
    assert case.slim.plan == here.plan(0.5)


def test_graphs_move(case: Case) -> None:
    """A graph captured on one device equals on the other what was captured there: the model, and the masked model.

    Each comparison is made on one device, for the devices round differently, in double precision too: llama asks for
    norms and rotations in single, and hardswish of doubles multiplies by a sixth of single precision on a GPU.
    """
    model = moved(copy.deepcopy(case.model), CPU)
    traced = chase_fx.trace(model, case.inputs(device=CPU)).eval()
    slim = chase_fx.rewrite(traced, case.slim.plan).eval()
    for device, dense, own, arrived, arrived_slim in (
        (CPU, model, traced, case.traced, case.slim),
        (DEVICE, case.model, case.traced, traced, slim),
    ):
        x = case.inputs(3, device=device)
        with torch.no_grad():
            assert close(moved(copy.deepcopy(arrived), device)(x), dense(x), EXACT)
        report = chase_fx.verify(own, moved(copy.deepcopy(arrived_slim), device))
        assert report.difference <= EXACT
        assert not report.stepwise
        if x.is_floating_point():
            assert_exact(dense, moved(copy.deepcopy(arrived_slim), device), (x,))


def test_files_move(case: Case, tmp_path: Path) -> None:
    """What was saved on one device is read on the other bit for bit, onto the device of the model given."""
    path, back = tmp_path / "slim.safetensors", tmp_path / "back.safetensors"
    chase_fx.save(case.slim, path)
    model = moved(copy.deepcopy(case.model), CPU)
    slim = chase_fx.load(path, model)
    chase_fx.save(slim, back)
    again = chase_fx.load(back, case.model).eval()
    own = case.slim.state_dict()
    for found, device in ((slim, CPU), (again, DEVICE)):
        state = found.state_dict()
        assert state.keys() == own.keys()
        assert all(t.device == device and torch.equal(t.to(DEVICE), own[name]) for name, t in state.items())
    with torch.no_grad():
        assert close(again(case.inputs()), case.slim(case.inputs()), EXACT)


def test_training_mode(case: Case) -> None:
    """Under one seed the device draws the same numbers for model and graph; outputs and gradients agree."""
    model, traced = copy.deepcopy(case.model).train(), copy.deepcopy(case.traced).train()
    found = []
    for module in (model, traced):
        torch.manual_seed(3)
        found.append(module(case.inputs()))
        next(tensors(found[-1])).square().mean().backward()
    assert close(found[1], found[0], EXACT)
    for (name, a), (_, b) in zip(model.named_parameters(), traced.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or close(b.grad, a.grad, 1e-7), name


def test_single_precision(case: Case) -> None:
    """``prune`` passes in single precision with torch's settings as they are, and finds the plan of double."""
    model = copy.deepcopy(case.model).float()
    x = case.inputs().float() if case.inputs().is_floating_point() else case.inputs()
    slim = chase_fx.prune(model, x)
    assert slim.plan == case.slim.plan
    with torch.no_grad():
        found, want = next(tensors(slim.eval()(x))), next(tensors(case.slim(case.inputs())))
    assert close(found.double(), want, 5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """Weights in half precision are captured, pruned and verified; the slim module runs in it."""
    model = copy.deepcopy(case.model).to(dtype)
    x = case.inputs().to(dtype) if case.inputs().is_floating_point() else case.inputs()
    slim = chase_fx.prune(model, x).eval()
    with torch.no_grad():
        out = next(tensors(slim(x)))
    assert out.dtype is dtype
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    """Inside a region of autocast the graph casts as the model does, whose fast paths round otherwise."""
    model, traced = copy.deepcopy(case.model).float(), copy.deepcopy(case.traced).float()
    x = case.inputs().float() if case.inputs().is_floating_point() else case.inputs()
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype):
        found = traced(x)
        assert next(tensors(found)).dtype is dtype
        assert close(found, model(x), 2e-2)


@pytest.mark.filterwarnings("ignore")  # torch's own advice about speed
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(case: Case, mode: str, full_precision: None) -> None:
    """Compiled in one piece, also into a CUDA graph, the slim module gives what it gives eagerly."""
    if case.name in ("lstm", "gru"):
        pytest.skip("Dynamo takes no recurrent layers")
    slim = copy.deepcopy(case.slim).float()
    x = case.inputs().float() if case.inputs().is_floating_point() else case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(slim, fullgraph=True, mode=mode)
    with torch.no_grad():
        want = slim(x)
        for _ in range(3):  # a CUDA graph is recorded in the second call
            assert close(compiled(x), want, 1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "attention"])
def test_compiled_training_step(name: str, full_precision: None) -> None:
    """Gradients of the compiled slim module are those of the eager one."""
    build, make = NETS[name]
    model = moved(randomise(build()), DEVICE, torch.float32)
    x = make(8).to(DEVICE, torch.float32)
    slim = chase_fx.prune(model, x).eval()
    torch.compiler.reset()
    compiled = torch.compile(slim, fullgraph=True)
    grads = []
    for module in (slim, compiled):
        slim.zero_grad()
        module(x).square().mean().backward()
        grads.append([p.grad.clone() for p in slim.parameters() if p.grad is not None])
    assert len(grads[0]) > 10
    assert all(close(b, a, 1e-3) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("name", ["vit", "attention", "llama"])
def test_slim_attention_by_every_kernel(name: str, backend: SDPBackend) -> None:
    """Heads of an odd width run through the fused kernels too, whichever of them takes the masks that there are."""
    build, make = NETS[name]
    model = moved(randomise(build()), DEVICE, torch.bfloat16)
    x = make().to(DEVICE) if name == "llama" else make().to(DEVICE, torch.bfloat16)
    slim = chase_fx.prune(model, x, channel_sparsity=0.6).eval()
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            want = slim(x)
        with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
            assert close(slim(x), want, 0.1)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_weights_lie_in_one_piece(name: str, tmp_path: Path) -> None:
    """cuDNN does not complain about the weights of captured, slim, moved, copied and stored layers."""
    build, make = NETS[name]
    model = moved(randomise(build()), DEVICE, torch.float32)
    x = make().to(DEVICE, torch.float32)
    traced = chase_fx.trace(model, x)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    assert slim.get_submodule("layer").hidden_size == 4
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    ways = {
        "captured": traced,
        "slim": slim,
        "copied": copy.deepcopy(slim),
        "pickled": pickle.loads(pickle.dumps(slim)),
        "read": chase_fx.load(tmp_path / "slim.safetensors", copy.deepcopy(model).double(), x.double()),
        "moved": moved(moved(copy.deepcopy(slim), CPU), DEVICE),
    }
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for way, module in ways.items():
            assert module(x).shape == (2, 5)
            assert not caught, (way, str(caught[0].message))


class Deciding(nn.Module):
    """Leaves a layer out where the data says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if (x > 0).all():
            y = y + self.layer(y).relu()
        return self.last(y)


class Counting(Deciding):
    """Divides by a number that it reads from the data, and decides by it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.first(x)).relu()
        return self.last(y / 2 if int((x > 0).sum().item()) > 20 else y)


def test_data_decide_on_the_device() -> None:
    """The graph decides again in every call; where it can't, it refuses the other way with the line."""
    x = rows().to(DEVICE)
    model = moved(randomise(Deciding()), DEVICE)
    slim = chase_fx.prune(model, x)
    traced = chase_fx.trace(model, x)
    for given in (x, x.abs()):
        assert torch.equal(traced(given), model(given))
        assert_exact(model, slim.eval(), (given,))
    counting = chase_fx.trace(moved(randomise(Counting()), DEVICE), x.abs())
    with pytest.raises(OtherPathError, match=r"test_cuda.py:\d+"):
        counting(-x.abs())


@pytest.mark.parametrize("benchmark", [False, True])
def test_channels_last(benchmark: bool) -> None:
    """The memory format of the input comes out, whichever convolution cuDNN picks."""
    build, _ = NETS["resnet18"]
    model = moved(randomise(build()), DEVICE).to(memory_format=torch.channels_last)
    x = images(4).to(DEVICE).to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
        slim = chase_fx.prune(model, x).eval()
        assert_exact(model, slim, (x,))
        front = nn.Sequential(*[slim.get_submodule(name) for name in ("conv1", "bn1")]).float()
        assert front(x.float()).is_contiguous(memory_format=torch.channels_last)  # cuDNN has none of doubles


def test_inputs_elsewhere_are_refused() -> None:
    """A model on the device with inputs on the CPU, before anything is captured."""
    model = moved(Deciding(), DEVICE)
    if DEVICE == CPU:
        pytest.skip("one device only")
    with pytest.raises(DeviceMismatchError, match="cuda"):
        chase_fx.trace(model, rows().float())
