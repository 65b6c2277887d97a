"""Sparse training on a GPU: masks, updates, removed channels, optimizer state, mixed precision, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import chase_fx
from chase_fx.models import ResNet20
from chase_fx.training import SET, Chase, GraNet, RigL
from tests.device import CPU, DEVICE, close, needs_device

pytestmark = needs_device

STEPS = 24
OPTIONS: dict[str, Any] = {
    "total_steps": STEPS, "sparsity": 0.7, "channel_sparsity": 0.5, "update_interval": 2, "channel_interval": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same sums in every run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
    torch.use_deterministic_algorithms(False)


class Net(nn.Module):
    """A narrow ResNet-20 that averages by a call that is deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ResNet20(width=8)

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        y = body.layer3(body.layer2(body.layer1(body.bn1(body.conv1(x)).relu())))
        return body.fc(y.mean((2, 3)))


class Run:
    """A net that trains on endless random data that depends on the step alone."""

    def __init__(
        self,
        method: Any = Chase,
        device: torch.device = DEVICE,
        *,
        seed: int = 0,
        compiled: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.steps = device, 0
        self.net = chase_fx.trace(Net().to(device), torch.zeros(2, 1, 28, 28, device=device)).train()
        self.forward = torch.compile(self.net) if compiled else self.net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        self.trainer = method(self.net, self.optimizer, **{**OPTIONS, **options})

    def loss(self) -> Tensor:
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        x = torch.randn(16, 1, 28, 28, generator=generator).to(self.device)
        return cross_entropy(self.forward(x), torch.randint(10, (16,), generator=generator).to(self.device))

    def check(self) -> None:
        """Exactly as many weights as the budget says, zeros outside of the masks, in the optimizer's slots too."""
        assert self.trainer.nnz == self.trainer.budget == sum(int(m.sum()) for m in self.trainer.masks.values())
        weights = dict(self.net.named_parameters())
        for name, mask in self.trainer.masks.items():
            weight = weights[name]
            assert mask.device == weight.device == self.device
            assert mask.shape == weight.shape
            assert not weight[~mask].any(), name
            momentum = self.optimizer.state[weight].get("momentum_buffer")
            assert momentum is None or (momentum.shape == weight.shape and not momentum[~mask].any()), name

    def step(self, count: int = 1) -> Run:
        for _ in range(count):
            self.loss().backward()
            self.optimizer.step()
            self.trainer.step()
            self.check()
            self.optimizer.zero_grad()
        return self


def test_masks_are_those_of_the_cpu() -> None:
    """The same seed draws the same first masks on every device, and knows the same channels."""
    here, there = Run(device=CPU), Run()
    assert all(torch.equal(mask.to(CPU), here.trainer.masks[name]) for name, mask in there.trainer.masks.items())
    assert dict(here.trainer.channels_left) == dict(there.trainer.channels_left)


@pytest.mark.parametrize("live_shrink", [False, True])
@pytest.mark.parametrize("method", [Chase, RigL, SET, GraNet])
def test_a_whole_run(method: Any, live_shrink: bool) -> None:
    """Masks move, channels go step by step, and the slim module is the trained one without its zeros."""
    run = Run(method, live_shrink=live_shrink)
    first = {name: mask.clone() for name, mask in run.trainer.masks.items()}
    channels = sum(run.trainer.channels_left.values())
    run.step(STEPS)
    assert len(run.trainer.channel_history) > 2
    assert run.trainer.channel_shortfall == 0
    assert sum(run.trainer.channels_left.values()) <= 0.55 * channels
    if not live_shrink:
        assert any(bool((mask & ~first[name]).any()) for name, mask in run.trainer.masks.items())  # grown
    slim = run.trainer.finalize().eval()
    assert {t.device for t in (*slim.parameters(), *slim.buffers())} == {DEVICE}
    x = torch.randn(4, 1, 28, 28, device=DEVICE)
    with torch.no_grad():
        assert close(slim.double()(x.double()), copy.deepcopy(run.net).double().eval()(x.double()), 1e-9)
    small = sum(p.numel() for p in slim.parameters())
    assert small < 0.6 * sum(p.numel() for p in Net().parameters())


@pytest.mark.parametrize("live_shrink", [False, True])
def test_a_run_resumes_bit_identical(live_shrink: bool, tmp_path: Path) -> None:
    """A checkpoint in the middle, in a fresh process's place, leads to the same end."""
    straight = Run(live_shrink=live_shrink).step(11)
    straight.trainer.save(tmp_path / "run.ckpt")
    straight.step(STEPS - 11)
    resumed = Run(live_shrink=live_shrink, seed=9)
    resumed.trainer.restore(tmp_path / "run.ckpt")
    resumed.steps = 11
    resumed.step(STEPS - 11)
    for (name, a), b in zip(straight.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for p, q in zip(straight.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(*(r.optimizer.state[w]["momentum_buffer"] for r, w in ((straight, p), (resumed, q))))
    assert all(torch.equal(mask, resumed.trainer.masks[name]) for name, mask in straight.trainer.masks.items())


def test_a_checkpoint_moves_to_the_cpu(tmp_path: Path) -> None:
    """What was trained on the device goes on where the new module lies, with the same masks."""
    run = Run(live_shrink=True).step(11)
    run.trainer.save(tmp_path / "run.ckpt")
    moved = Run(device=CPU, live_shrink=True, seed=9)
    moved.trainer.restore(tmp_path / "run.ckpt")
    assert all(torch.equal(mask.to(CPU), moved.trainer.masks[name]) for name, mask in run.trainer.masks.items())
    moved.steps = 11
    moved.step(STEPS - 11)
    assert moved.trainer.steps_done == STEPS


def test_a_module_moves_between_steps() -> None:
    """Masks follow a module that is moved to another device while it trains."""
    run = Run(device=CPU).step(7)
    run.net.to(DEVICE)
    for state in run.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to(DEVICE)
    run.device = DEVICE
    run.step(STEPS - 7)
    assert run.trainer.finalize() is not None


@pytest.mark.parametrize("live_shrink", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(dtype: torch.dtype, live_shrink: bool) -> None:
    """Autocast with a GradScaler, an overflow included: budgets hold, weights stay finite, channels go."""
    run = Run(live_shrink=live_shrink)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype is torch.float16, init_scale=2.0**10)
    skipped = 0
    for step in range(STEPS):
        with torch.autocast(DEVICE.type, dtype):
            loss = run.loss()
        scaler.scale(loss).backward()
        if scaler.is_enabled() and step == 7:
            run.net.get_parameter("body.conv1.weight").grad[0] = float("inf")
        before = scaler.get_scale()
        scaler.step(run.optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        run.trainer.step()
        run.check()
        run.optimizer.zero_grad()
    assert skipped >= scaler.is_enabled()
    assert all(bool(p.isfinite().all()) for p in run.net.parameters())
    assert run.trainer.channel_shortfall == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own advice about speed
@pytest.mark.parametrize("live_shrink", [False, True])
def test_a_compiled_forward_trains(live_shrink: bool) -> None:
    """The traced module trains under ``torch.compile``, which follows its cuts."""
    torch.compiler.reset()
    run = Run(live_shrink=live_shrink, compiled=True, channel_interval=8, channels_until=0.5)
    run.step(STEPS)
    assert run.trainer.channel_history
    with torch.no_grad():
        x = torch.randn(4, 1, 28, 28, device=DEVICE)
        run.net.eval()
        assert close(run.forward(x), run.net(x), 1e-3)
