"""Live shrink under everything that training loops have: each ends where masking alone ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import chase_fx
from chase_fx.errors import OptimizerMismatchError
from chase_fx.sparse import Chase
from tests.sparse.hand_net import ResidualNet, Shrinker, channels_of, rewrite

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=1e-3, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


class Loop:
    """One run: net, optimizer and trainer, and whatever a test puts between backward and step."""

    def __init__(
        self, optimizer: str, *, live_shrink: bool, total_steps: int, dtype: torch.dtype = torch.float64
    ) -> None:
        torch.manual_seed(0)
        self.net = ResidualNet().to(dtype)
        # A bias in front of a norm has rounding noise for a gradient, which the adaptive rates would blow up.
        self.net.conv1.bias.requires_grad_(False).zero_()
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.trainer = Chase(
            self.net, self.optimizer, total_steps=total_steps, sparsity=0.6, channel_sparsity=0.6,
            update_interval=max(1, total_steps // 20), channel_interval=max(1, total_steps // 10),
            channels=channels_of(self.net), rewrite=rewrite, live_shrink=live_shrink,
            shrink=Shrinker() if live_shrink else None,
        )  # fmt: skip
        self.dtype, self.shapes = dtype, set()

    def loss(self, step: int, forward: nn.Module | Callable[[Tensor], Tensor] | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64).to(self.dtype)
        y = torch.randint(10, (6,), generator=generator)
        return nn.functional.cross_entropy((self.net if forward is None else forward)(x), y)

    def after(self) -> None:
        self.optimizer.step()
        self.trainer.step()
        self.optimizer.zero_grad()
        self.shapes.add((self.net.stem.weight.shape[0], self.net.conv1.weight.shape[0]))


def same_end(masked: Loop, shrunk: Loop) -> None:
    assert len(masked.shapes) == 1
    assert len(shrunk.shapes) > 3  # through several shrinks
    assert masked.trainer.channel_history == shrunk.trainer.channel_history
    slim, cut = masked.trainer.finalize(), shrunk.trainer.finalize()
    for (name, a), b in zip(slim.state_dict().items(), cut.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_hundred_steps_equal_masking(optimizer) -> None:
    loops = [Loop(optimizer, live_shrink=live, total_steps=200) for live in (False, True)]
    for step in range(200):
        losses = []
        for loop in loops:
            loss = loop.loss(step)
            loss.backward()
            loop.after()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=1e-10, msg=lambda t, step=step: f"{step}: {t}")
    same_end(*loops)


class Embedded(nn.Module):
    """A table whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(12, 16, sparse=True), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(x)).relu().mean(1))


@pytest.mark.parametrize("channel_score", ["umm", "taylor", "gradient_flow"])
def test_sparse_gradients_rank_as_dense_ones(channel_score) -> None:
    ends = []
    for sparse, live in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        traced = chase_fx.trace(Embedded().double(), torch.randint(12, (3, 4)))
        traced.get_submodule("table").sparse = sparse
        optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
        trainer = Chase(
            traced, optimizer, total_steps=20, sparsity=0.5, channel_sparsity=0.5, channel_score=channel_score,
            live_shrink=live,
        )  # fmt: skip
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randint(12, (3, 4), generator=generator), torch.randint(5, (3,), generator=generator))
            nn.functional.cross_entropy(traced(x), y).backward()
            assert traced.get_parameter("table.weight").grad.is_sparse == sparse
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
        ends.append({name: p.detach() for name, p in trainer.finalize().named_parameters()})
    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(end[name], value, rtol=1e-9, atol=1e-12)


class Preconditioned(torch.optim.SGD):
    """Keeps a square matrix per weight, which no channel can be cut from by shape."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["statistics"] = torch.eye(len(p))


@pytest.mark.parametrize("build", [torch.optim.LBFGS, Preconditioned])
def test_state_that_cannot_be_cut_is_refused_in_the_first_step(build) -> None:
    for live in (False, True):
        net = ResidualNet()
        optimizer = build(net.parameters(), lr=0.01)
        trainer = Chase(
            net, optimizer, total_steps=20, channels=channels_of(net), rewrite=rewrite, live_shrink=live,
            shrink=Shrinker() if live else None,
        )  # fmt: skip

        def closure(net=net, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(torch.randn(6, 3, 5, 5)), torch.randint(10, (6,)))
            loss.backward()
            return loss

        optimizer.step(closure)
        if live:
            with pytest.raises(OptimizerMismatchError, match=f"live_shrink.*{build.__name__}"):
                trainer.step()
        else:
            trainer.step()
            assert trainer.nnz == trainer.budget


def each(build: Callable[[Loop], Callable[[int], None]], optimizer: str = "momentum", **options: Any) -> list[Loop]:
    """Run ``build(loop)(step)`` for 40 steps with and without live shrink."""
    loops = []
    for live in (False, True):
        loop = Loop(optimizer, live_shrink=live, total_steps=40, **options)
        step = build(loop)
        for number in range(40):
            step(number)
        loops.append(loop)
    same_end(*loops)
    return loops


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_averages_follow_whole_or_their_module(use_buffers, wrapped) -> None:
    averages = []

    def build(loop: Loop) -> Callable[[int], None]:
        average = AveragedModel(loop.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        loop.trainer.follow(average if wrapped else average.module)
        averages.append((loop, average))

        def step(number: int) -> None:
            loop.loss(number).backward()
            loop.after()
            average.update_parameters(loop.net)

        return step

    each(build)
    (masked, a), (_, b) = averages
    slim = rewrite(a.module, masked.trainer.kept)
    for (name, x), y in zip(slim.state_dict().items(), b.module.state_dict().values(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", ["momentum", "Adam", "AdamW fused"])
@pytest.mark.parametrize("enabled", [False, True])
def test_grad_scaler(optimizer, enabled) -> None:
    skipped = []

    def build(loop: Loop) -> Callable[[int], None]:
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**8, growth_interval=7)

        def step(number: int) -> None:
            scaler.scale(loop.loss(number)).backward()
            if enabled and number in (7, 22):  # an overflow: this step is skipped, the trainer's is not
                loop.net.fc.weight.grad[0, 0] = float("inf")
                loop.net.stem.weight.grad[:, 0] = float("nan")
            before = loop.net.fc.weight.detach().clone()
            scaler.step(loop.optimizer)
            skipped.append(torch.equal(before, loop.net.fc.weight.detach()))
            scaler.update()
            loop.trainer.step()
            loop.optimizer.zero_grad()
            loop.shapes.add((loop.net.stem.weight.shape[0], loop.net.conv1.weight.shape[0]))

        return step

    each(build, optimizer)
    assert sum(skipped) == (4 if enabled else 0)


def test_accumulation_and_clipping() -> None:
    def build(loop: Loop) -> Callable[[int], None]:
        def step(number: int) -> None:
            for micro in range(3):
                (loop.loss(100 * number + micro) / 3).backward()
            nn.utils.clip_grad_norm_(loop.net.parameters(), 0.5)
            nn.utils.clip_grad_value_(loop.net.parameters(), 0.1)
            loop.after()

        return step

    each(build, "Adam")


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=41),
    "warm-up and cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5), torch.optim.lr_scheduler.CosineAnnealingLR(o, 35)], [5]
    ),
    "SWA": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=10),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedules(name) -> None:
    def build(loop: Loop) -> Callable[[int], None]:
        scheduler = SCHEDULERS[name](loop.optimizer)

        def step(number: int) -> None:
            loss = loop.loss(number)
            loss.backward()
            loop.after()
            scheduler.step(*([loss.detach().round(decimals=6)] if name == "plateau" else []))

        return step

    each(build)


@pytest.mark.slow
def test_compiled_training() -> None:
    def build(loop: Loop) -> Callable[[int], None]:
        torch._dynamo.reset()
        forward = torch.compile(loop.net, backend="aot_eager")

        def step(number: int) -> None:
            loop.loss(number, forward).backward()
            loop.after()

        return step

    each(build)


@pytest.mark.slow
def test_a_compiled_function_around_the_module_outlives_many_cuts() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 10))
    traced = chase_fx.trace(net, torch.zeros(4, 6))
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    trainer = Chase(
        traced, optimizer, total_steps=40, channel_sparsity=0.9, beta=0.0, channel_interval=2, live_shrink=True
    )

    @torch.compile(backend="eager", fullgraph=True)
    def loss_of(x: Tensor) -> Tensor:
        return traced(x).square().mean()

    for _ in range(40):
        loss_of(torch.randn(4, 6)).backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert len(trainer.channel_history) > 10  # torch gives up after eight


def test_a_compiled_module_can_be_given_to_the_trainer() -> None:
    net = ResidualNet()
    compiled = torch.compile(net, backend="eager")
    trainer = Chase(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1), total_steps=3, channel_sparsity=0.0)
    assert trainer.module is net
    assert "stem.weight" in trainer.masks


def test_autocast() -> None:
    def build(loop: Loop) -> Callable[[int], None]:
        def step(number: int) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loop.loss(number)
            loss.backward()
            loop.after()

        return step

    for live in (False, True):  # bfloat16 sums differ in their last bits: what must hold is that it trains
        loop = Loop("momentum", live_shrink=live, total_steps=40, dtype=torch.float32)
        step = build(loop)
        for number in range(40):
            step(number)
        assert loop.trainer.nnz == loop.trainer.budget
        assert all(bool(p.isfinite().all()) for p in loop.net.parameters())
