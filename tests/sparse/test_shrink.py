"""Live shrink: the trajectory is the one of masking, and everything that holds the parameters follows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from chase_fx.errors import CheckpointError
from chase_fx.sparse import GMP, SET, Chase, RigL, SRigL
from chase_fx.sparse.shrink import cut_parameter

OPTIONS = {"sparsity": 0.6, "channel_sparsity": 0.6, "update_interval": 3, "channel_interval": 4}


def close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *((Chase, name) for name in ("sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam")),
        *((method, name) for name in ("sgd", "adam") for method in (RigL, SET, GMP, SRigL)),
    ],
)
def test_the_trajectory_equals_masking_without_shrinking(run, method, optimizer) -> None:
    masked = run(method, optimizer, **OPTIONS)
    shrunk = run(method, optimizer, **OPTIONS, live_shrink=True)
    for step in range(1, 41):
        masked.step()
        shrunk.step()
        close(shrunk.loss, masked.loss, f"loss at step {step}")
        assert masked.trainer.budget == shrunk.trainer.budget
        assert all(torch.equal(masked.trainer.kept[name], kept) for name, kept in shrunk.trainer.kept.items())
    assert shrunk.trainer._shrink.calls > 3
    assert masked.trainer.channel_history == shrunk.trainer.channel_history
    slim, cut = masked.trainer.finalize(), shrunk.trainer.finalize()
    assert cut is shrunk.net
    for (name, a), b in zip(slim.state_dict().items(), cut.state_dict().values(), strict=True):
        # A norm follows conv1: its bias has rounding noise for gradients, which Adagrad blows up, and the mean follows.
        if name not in ("conv1.bias", "bn1.running_mean"):
            close(b, a, name)


def test_parameters_keep_identity_and_really_get_smaller(run) -> None:
    done = run(Chase, "adam", **OPTIONS, live_shrink=True)
    before = {name: (id(p), p.numel()) for name, p in done.net.named_parameters()}
    done.step(40)
    assert {name: id(p) for name, p in done.net.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert done.net.conv1.weight.numel() < 0.5 * before["conv1.weight"][1]
    for p in done.net.parameters():
        for value in done.optimizer.state[p].values():
            assert value.dim() == 0 or value.shape == p.shape


def test_a_loss_that_is_still_alive_does_not_break_the_next_backward(run) -> None:
    done = run(Chase, **OPTIONS, live_shrink=True)
    losses = []
    done.step(40, lambda r: losses.append(r.loss))
    assert len(losses) == 40


def test_factored_slots_and_gradients_follow() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.randn(4, 6)
    optimizer.step()
    gradient, state = weight.grad.clone(), copy.deepcopy(optimizer.state[weight])
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 2, 5])
    cut_parameter(weight, [rows, columns], optimizer)
    assert torch.equal(weight.grad, gradient[rows][:, columns])
    assert torch.equal(optimizer.state[weight]["row_var"], state["row_var"][rows])
    assert torch.equal(optimizer.state[weight]["col_var"], state["col_var"][:, columns])
    assert torch.equal(optimizer.state[weight]["step"], state["step"])
    optimizer.step()


def test_an_average_follows(run) -> None:
    done = run(Chase, **OPTIONS, live_shrink=True)
    average = torch.optim.swa_utils.AveragedModel(
        done.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    done.trainer.follow(average.module)
    done.step(40, lambda r: average.update_parameters(r.net))
    assert average.module.conv1.weight.shape == done.net.conv1.weight.shape
    assert average.module.eval()(torch.randn(2, 3, 6, 6, dtype=torch.float64)).shape == (2, 10)


def test_clipping_scheduling_and_accumulation_work_through_shrinks(run) -> None:
    losses = []
    for live in (False, True):
        done = run(Chase, "adam", **OPTIONS, live_shrink=live)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(done.optimizer, 40)
        torch.manual_seed(1)
        x, y = torch.randn(40, 2, 4, 3, 6, 6, dtype=torch.float64), torch.randint(10, (40, 2, 4))
        for step in range(40):
            for micro in range(2):
                loss = nn.functional.cross_entropy(done.net(x[step, micro]), y[step, micro])
                (loss / 2).backward()
            nn.utils.clip_grad_norm_(done.net.parameters(), 0.5)
            done.optimizer.step()
            done.trainer.step()
            schedule.step()
            done.optimizer.zero_grad()
        losses.append(loss.detach())
    close(losses[0], losses[1], "last loss")


def test_an_earlier_state_needs_a_new_trainer(run) -> None:
    done = run(Chase, **OPTIONS, live_shrink=True).step(5)
    early = done.state()
    done.step(25)
    with pytest.raises(CheckpointError, match="newly built"):
        done.trainer.load_state_dict(early["trainer"])


def test_channels_last_weights_stay_channels_last() -> None:
    weight = nn.Parameter(torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last))
    cut_parameter(weight, [torch.arange(4), torch.arange(3), None, None], None)
    assert weight.shape == (4, 3, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
