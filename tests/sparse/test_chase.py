"""Chase, end to end on a small residual CNN."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import nn

from chase_fx.errors import ArgumentError, CheckpointError, NothingToPruneError, OptimizerMismatchError
from chase_fx.sparse import Chase
from chase_fx.sparse.optim import slots

DENSE = 8 * 27 + 12 * 72 + 8 * 108 + 80  # masked weights of the residual net


def check_invariants(run) -> None:
    trainer = run.trainer
    assert trainer.nnz == trainer.budget
    for name, mask in trainer.masks.items():
        weight = run.net.get_parameter(name)
        assert mask.shape == weight.shape
        assert not weight.detach()[~mask].any(), name
        for slot_name, slot in slots(run.optimizer, weight):
            assert not slot[~mask].any(), (name, slot_name)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "adafactor"])
def test_nnz_is_the_budget_and_everything_outside_the_masks_is_zero(run, optimizer) -> None:
    run(Chase, optimizer, sparsity=0.8, channel_sparsity=0.5, update_interval=3, channel_interval=5).step(
        40, check_invariants
    )


def test_the_budget_follows_the_soft_bound_and_ends_at_the_density(run) -> None:
    d, delta, end = 0.2, 0.1, 30
    budgets = []
    done = run(Chase, sparsity=1 - d, delta=delta, channel_sparsity=0.0, update_interval=5)
    assert done.trainer.budget == round(d * DENSE)
    done.step(40, lambda r: budgets.append(r.trainer.budget))
    for t in range(5, 31, 5):
        surplus = delta / 2 * (1 + torch.cos(torch.tensor(torch.pi * t / end, dtype=torch.float64)).item())
        assert budgets[t - 1] == round((d + surplus) * DENSE), t
    assert set(budgets[29:]) == {round(d * DENSE)}


def test_channels_go_along_the_cubic_down_to_the_share(run) -> None:
    left = []
    done = run(Chase, channel_sparsity=0.5, channel_interval=8).step(
        40, lambda r: left.append(sum(r.trainer.channels_left.values()))
    )
    # 20 channels, T_c = 32: 1 - (1 - t/32)^3 at 8, 16, 24, 32 is .578, .875, .984, 1, and 10 channels go in the end.
    assert [left[t - 1] for t in (7, 8, 16, 24, 32, 40)] == [20, 14, 11, 10, 10, 10]
    assert done.trainer.channel_shortfall == 0
    assert sum(len(ids) for event in done.trainer.channel_history for ids in event["removed"].values()) == 10


def test_channels_come_back_never_and_floors_hold(run) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    done = run(Chase, channel_sparsity=0.6, beta=1.0, channel_interval=1)
    done.step(40, lambda r: seen.append({name: mask.clone() for name, mask in r.trainer.kept.items()}))
    for before, after in itertools.pairwise(seen):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    assert done.trainer.channels_left["stem.weight:0"] >= 3
    assert done.trainer.channels_left["conv1.weight:0"] >= 4


def test_finalize_equals_the_masked_model(run) -> None:
    done = run(Chase, sparsity=0.7, channel_sparsity=0.5).step(40)
    slim = done.trainer.finalize().eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(slim(x), done.net.eval()(x), rtol=1e-9, atol=1e-12)
    assert slim.stem.out_channels == done.trainer.channels_left["stem.weight:0"]
    check_invariants(done)
    nonzero = sum(int(p.count_nonzero()) for p in slim.parameters() if p.dim() > 1)
    assert 0 < nonzero <= done.trainer.nnz


def test_where_channels_hold_less_than_the_budget_they_become_dense(run) -> None:
    done = run(Chase, sparsity=0.3, channel_sparsity=0.8, beta=0.1).step(40, check_invariants)
    assert done.trainer.budget == done.trainer._weights.capacity() < round(0.7 * DENSE)


def test_same_seed_same_run_and_the_global_generator_is_left_alone(run) -> None:
    results = []
    for salt in (1, 2):
        torch.manual_seed(0)
        done = run(Chase, seed=3, sparsity=0.8)
        torch.manual_seed(salt)
        state = torch.get_rng_state()
        done.step(20)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(done.state())
    assert_same(*results)


def test_another_seed_draws_other_masks() -> None:
    masks = []
    for seed in (0, 1):
        torch.manual_seed(0)
        net = nn.Linear(20, 20)
        masks.append(
            Chase(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=5, channel_sparsity=0, seed=seed).masks
        )
    assert not torch.equal(masks[0]["weight"], masks[1]["weight"])


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [1, 13, 32, 37])
@pytest.mark.parametrize("live_shrink", [False, True])
def test_a_resumed_run_ends_bit_identical(run, optimizer, stop, live_shrink) -> None:
    options = {
        "sparsity": 0.7,
        "channel_sparsity": 0.5,
        "update_interval": 3,
        "channel_interval": 4,
        "live_shrink": live_shrink,
    }
    straight = run(Chase, optimizer, **options).step(40)
    first = run(Chase, optimizer, **options).step(stop)
    second = run(Chase, optimizer, seed=99, **options)
    second.load(first.state(), stop).step(40 - stop)
    assert_same(straight.state(), second.state())


def test_loading_an_earlier_state_into_the_same_trainer_goes_back(run) -> None:
    done = run(Chase, channel_sparsity=0.5, sparsity=0.7).step(10)
    early = done.state()
    end = done.step(30).state()
    assert_same(done.load(early, 10).step(30).state(), end)


def test_state_survives_torch_save_with_weights_only(run, tmp_path) -> None:
    state = run(Chase).step(12).trainer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=True), state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("masks"), "lacks"),
        (lambda s: s.update(method="RigL"), "RigL"),
        (lambda s: s.update(total_steps=7), "total_steps"),
        (lambda s: s["masks"].update(other=torch.ones(1)), "other masked weights"),
        (lambda s: s["masks"].update({"fc.weight": torch.ones(2, 2, dtype=torch.bool)}), "shape"),
    ],
)
def test_a_foreign_state_is_refused(run, change, words) -> None:
    done = run(Chase).step(3)
    state = copy.deepcopy(done.trainer.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=words):
        done.trainer.load_state_dict(state)


def test_momentum_of_a_weight_that_comes_back_starts_at_zero(run) -> None:
    done = run(Chase, "adam", sparsity=0.8, update_interval=1, channel_sparsity=0.0)
    for _ in range(10):
        before = {name: mask.clone() for name, mask in done.trainer.masks.items()}
        done.step()
        for name, mask in done.trainer.masks.items():
            grown = mask & ~before[name]
            weight = done.net.get_parameter(name)
            assert not weight.detach()[grown].any()
            assert all(not slot[grown].any() for _, slot in slots(done.optimizer, weight))


def test_an_unknown_optimizer_is_handled_by_the_shape_of_its_slots() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            result = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("peak", torch.zeros_like(p)).add_(1.0)
                    self.state[p].setdefault("calls", torch.zeros(())).add_(1.0)
            return result

    net = nn.Linear(10, 10)
    optimizer = Odd(net.parameters(), lr=0.1)
    trainer = Chase(net, optimizer, total_steps=4, update_interval=2, channel_sparsity=0.0)
    net(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    trainer.step()
    mask = trainer.masks["weight"]
    assert torch.equal(optimizer.state[net.weight]["peak"], mask.float())
    assert optimizer.state[net.weight]["calls"] == 1
    assert optimizer.state[net.bias]["peak"].all()


def test_growth_takes_the_largest_dense_gradients() -> None:
    net = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    trainer = Chase(net, optimizer, total_steps=100, sparsity=0.5, delta=0.5, channel_sparsity=0.0, update_interval=1)
    start = trainer.masks["weight"].clone()
    net.weight.grad = torch.arange(8.0).view(2, 4)
    trainer.step()
    grown = (trainer.masks["weight"] & ~start).flatten().nonzero().squeeze(1).tolist()
    inactive = (~start).flatten().nonzero().squeeze(1).tolist()
    assert grown == inactive[-len(grown) :]
    assert trainer.nnz == round(8 * (0.5 + 0.25 * (1 + torch.cos(torch.tensor(torch.pi / 75)).item())))


def test_an_optimizer_on_other_parameters_is_refused(residual) -> None:
    net = residual()
    with pytest.raises(OptimizerMismatchError, match=r"stem\.weight.*traced\.parameters"):
        Chase(net, torch.optim.SGD(residual().parameters(), lr=0.1), total_steps=10, channel_sparsity=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0}, {"sparsity": -0.1}, {"channel_sparsity": 1.0}, {"channel_sparsity": -1}, {"total_steps": 0},
        {"total_steps": -5}, {"beta": 2.0}, {"refill": 1.5}, {"round_to": 0}, {"channel_interval": 0}, {"delta": -0.1},
        {"channel_score": "nonsense"}, {"distribution": "nonsense"}, {"update_interval": 0},
        {"parameters": ["fc.bias"]}, {"parameters": ["missing"]}, {"sparsity": float("nan")},
        {"stop": 0.5}, {"channels_until": 1.5},
        {"channels_from": -0.1}, {"channels_from": 0.9},
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(run, options) -> None:
    with pytest.raises(ArgumentError):
        run(Chase, **options)


def test_channel_sparsity_of_a_module_without_channels_is_refused(residual) -> None:
    net = residual()
    with pytest.raises(ArgumentError, match=r"chase_fx\.trace"):
        Chase(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=10, channel_sparsity=0.5)


def test_a_module_without_weights_or_channels_has_nothing_to_prune(residual, make_channels) -> None:
    norm = nn.BatchNorm2d(4)
    with pytest.raises(NothingToPruneError):
        Chase(norm, torch.optim.SGD(norm.parameters(), lr=0.1), total_steps=10, channel_sparsity=0.0)
    net = residual()
    with pytest.raises(NothingToPruneError, match="no channel"):
        Chase(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=10, channels=make_channels(()))


def test_an_update_without_gradients_says_what_to_do(run) -> None:
    done = run(Chase, update_interval=1)
    with pytest.raises(ArgumentError, match=r"optimizer\.zero_grad"):
        done.trainer.step()


def test_any_module_trains_sparsely_without_channels() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters())
    trainer = Chase(layer, optimizer, total_steps=10, sparsity=0.75, channel_sparsity=0.0, update_interval=1)
    for _ in range(10):
        layer(torch.randn(2, 3, 8)).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.nnz == trainer.budget == round(0.25 * (24 * 8 + 64 + 2 * 128))
    assert trainer.finalize() is layer


def tensor_bytes() -> int:
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("steps", [0, 6])
def test_memory_over_dense_is_one_byte_per_masked_weight(steps) -> None:
    net = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 100))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    before = tensor_bytes()
    trainer = Chase(net, optimizer, total_steps=8, channel_sparsity=0.0, update_interval=2)
    for _ in range(steps):
        trainer.step()
    weights = sum(mask.numel() for mask in trainer.masks.values())
    assert weights <= tensor_bytes() - before <= weights + 100


def test_steps_beyond_the_end_only_mask(run) -> None:
    done = run(Chase, total_steps=10).step(10)
    masks = copy.deepcopy(dict(done.trainer.masks))
    done.step(5, check_invariants)
    assert_same(masks, dict(done.trainer.masks))
