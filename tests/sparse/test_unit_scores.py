"""Unit scores, costs and rankings: hand-computed values, and floors and rounding at every event."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError
from chase_fx.sparse import Chase, RigL, Static
from chase_fx.sparse.channels import floor_of
from chase_fx.sparse.ranking import RANKINGS, ChannelCount, choose, comparable
from tests.sparse.hand_net import Channels, Group, Member, ResidualNet, Shrinker, channels_of, one_to_one, rewrite

SCORES = ["umm", "magnitude", "taylor", "bn_scale", "gradient_flow", "activation", "random"]


class Two(nn.Module):
    """A convolution without spatial extent and a linear layer: 3 -> 4 channels -> 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def two_channels() -> Channels:
    members = (Member("conv.weight", 0, one_to_one(4), producer=True), Member("fc.weight", 1, one_to_one(4)))
    return Channels((Group("conv", 4, members),))


def two(score, **options):
    torch.manual_seed(0)
    net = Two().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    options = {
        "total_steps": 10, "sparsity": 0.0, "channel_sparsity": 0.5, "channel_interval": 1, "channels": two_channels(),
        "channel_score": score, **options,
    }  # fmt: skip
    return net, Static(net, optimizer, **options)


def scores(trainer) -> Tensor:
    state = trainer._channels
    return state._score(state.units[0], trainer._weights)


def test_activation_is_the_mean_size_of_what_consumers_read() -> None:
    net, trainer = two("activation")
    with torch.no_grad():
        net.conv.weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 2.0, 0], [0.5, 0, 0]]).view(4, 3, 1, 1))
    x = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    x[0, 0], x[1, 0], x[:, 1] = torch.tensor([[1.0, 3.0]]), torch.tensor([[-2.0, -2.0]]), 1.0
    net(x)
    # After ReLU and the mean over space: channel 0 is (2, 0), 1 is (0, 2), 2 is (2, 2), 3 is (1, 0).
    trainer._watch.collect()
    assert scores(trainer).tolist() == [1.0, 1.0, 2.0, 0.5]


def test_activation_sees_the_step_of_the_event_only_and_evaluation_never() -> None:
    net, trainer = two("activation", channel_interval=4)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for step in range(1, 5):
        net.eval()(100 * x)
        net.train()(x).sum().backward()
        assert bool(trainer._watch.inputs) == (step == 4)
        if step == 4:
            assert trainer._watch.seen["fc.weight"] == 2
        trainer.step()
    assert not trainer._watch.inputs


def test_a_silent_channel_goes_first_by_activation() -> None:
    net, trainer = two("activation", channel_interval=1, total_steps=3, channel_sparsity=0.25)
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.weight[2] = -50.0  # large weights, but dead behind the ReLU
    for _ in range(3):
        net(torch.rand(2, 3, 2, 2, dtype=torch.float64)).sum().backward()
        trainer.step()
    assert trainer.kept["conv"].tolist() == [True, True, False, True]


def test_gradient_flow_is_the_root_mean_square_gradient() -> None:
    net, trainer = two("gradient_flow")
    net.conv.weight.grad = (
        torch.tensor([[3.0, 4.0, 0], [0, 0, 0], [1.0, 1, 1], [math.inf, 0, 0]]).view(4, 3, 1, 1).double()
    )
    assert scores(trainer).tolist() == pytest.approx([math.sqrt(25 / 3), 0, 1, 0])


def test_random_is_one_fixed_number_per_unit_and_seed() -> None:
    first, again, other = (scores(two("random", seed=seed)[1]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == 4


def test_a_score_and_a_cost_of_the_users_own() -> None:
    net, trainer = two(
        lambda units, alive: torch.tensor([4.0, 3.0, 2.0, 1.0]),
        channel_cost=lambda units, alive: torch.tensor([8.0, 1.0, 4.0, 1.0]),
        total_steps=1, channels_until=1.0,
    )  # fmt: skip
    net(torch.rand(2, 3, 2, 2, dtype=torch.float64)).sum().backward()
    trainer.step()  # scores per cost are 0.5, 3, 0.5, 1
    assert trainer.kept["conv"].tolist() == [False, True, False, True]


def test_parameters_and_flops_saved_per_unit() -> None:
    torch.manual_seed(0)
    net = ResidualNet(channels=4, middle=6).double()
    trainer = RigL(
        net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=9, channel_sparsity=0.3, channel_interval=1,
        channels=channels_of(net), channel_cost="flops",
    )  # fmt: skip
    state, weights = trainer._channels, trainer._weights
    with pytest.raises(ArgumentError, match="no forward pass"):
        state._score(state.units[0], weights)
    net(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    trainer._watch.collect()
    # A middle unit: 4*9 weights of conv1 and 4*9 of conv2, each used at 2 * 25 places; bias, gamma and beta count once.
    assert state.rule.cost(state.units[1], weights.alive).tolist() == [2 * 36 * 50 + 3.0] * 6
    # A stream unit: 27 of the stem, 6*9 of conv1 and of conv2, all at 50 places, 10 of fc at 2, and two norms.
    assert state.rule.cost(state.units[0], weights.alive).tolist() == [(27 + 2 * 54) * 50 + 10 * 2 + 4.0] * 4
    state.remove({"conv1.weight:0": torch.tensor([0, 5])}, weights)
    assert state.rule.cost(state.units[0], weights.alive)[0] == (27 + 2 * 36) * 50 + 10 * 2 + 4.0


def test_cost_aware_ranking_takes_the_expensive_group_first(make_group) -> None:
    net = nn.Sequential(nn.Linear(100, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for layer in net:
            layer.weight.fill_(1.0)
        net[1].weight.mul_(0.5)  # by score alone the cheap second group goes first
    groups = Channels((
        make_group("wide", 4, ("0.weight", 0, None, True), ("1.weight", 1, None, False)),
        make_group("narrow", 4, ("1.weight", 0, None, True), ("2.weight", 1, None, False)),
    ))  # fmt: skip
    left = {}
    for cost in (None, "parameters", "flops"):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        trainer = Static(
            net, optimizer, total_steps=1, sparsity=0.0, channel_sparsity=0.25, channels_until=1.0, channels=groups,
            channel_cost=cost,
        )  # fmt: skip
        weights = [p.detach().clone() for p in net.parameters()]
        net(torch.ones(1, 100)).sum().backward()
        trainer.step()
        left[cost] = dict(trainer.channels_left)
        with torch.no_grad():
            for p, w in zip(net.parameters(), weights, strict=True):
                p.copy_(w)
    assert left == {
        None: {"wide": 4, "narrow": 2},
        "parameters": {"wide": 2, "narrow": 4},
        "flops": {"wide": 2, "narrow": 4},
    }


def test_ranking_tables() -> None:
    values, kept = torch.tensor([8.0, 2.0, 4.0, 6.0], dtype=torch.float64), torch.tensor([True, True, False, True])
    assert comparable(values, kept, 8, "global").tolist() == [8, 2, 4, 6]
    assert comparable(values, kept, 8, "normalised").tolist() == pytest.approx([1.5, 0.375, 0.75, 1.125])
    # 5 of 8 are gone already: the lowest of the three left makes it 6/8.
    assert comparable(values, kept, 8, "group").tolist() == [1.0, 0.75, 0.0, 0.875]
    assert comparable(values, kept, 8, "coupled").tolist() == [1.0, 0.75, 0.0, 0.875]
    # Keeping 2/8 and 1/8 of a group that nine layers produce goes with keeping (2/8)^3 and (1/8)^3 inside a block.
    assert comparable(values, kept, 8, "coupled", 9).tolist() == [1.0, 1 - 1 / 64, 0.0, 1 - 1 / 512]


def test_group_ranking_takes_the_same_share_of_each_group() -> None:
    torch.manual_seed(0)
    net = ResidualNet(channels=8, middle=24)
    with torch.no_grad():
        net.stem.weight.mul_(100)
        net.conv2.weight.mul_(100)
    trainer = Static(
        net, torch.optim.SGD(net.parameters(), lr=0.0), total_steps=8, channel_sparsity=0.5, channels=channels_of(net),
        channel_ranking="group", beta=1.0, channel_interval=1,
    )  # fmt: skip
    for _ in range(8):
        net(torch.randn(2, 3, 5, 5)).sum().backward()
        trainer.step()
    assert dict(trainer.channels_left) == {"stem.weight:0": 4, "conv1.weight:0": 12}


def test_coupled_ranking_keeps_more_of_what_more_layers_produce() -> None:
    net = ResidualNet(channels=100, middle=100)  # two convolutions produce the stream, one the inside of the block
    trainer = Static(
        net, torch.optim.SGD(net.parameters(), lr=0.0), total_steps=8, channel_sparsity=0.7, channels=channels_of(net),
        channel_ranking="coupled", beta=0.0, channel_interval=1,
    )  # fmt: skip
    for _ in range(8):
        net(torch.randn(2, 3, 5, 5)).sum().backward()
        trainer.step()
    stream, inside = trainer.channels_left["stem.weight:0"], trainer.channels_left["conv1.weight:0"]
    assert stream + inside == 60
    assert stream / 100 == pytest.approx((inside / 100) ** (1 / math.sqrt(2)), abs=0.01)


@given(st.data())
@settings(deadline=None)
def test_floors_and_rounding_hold_in_every_choice(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, 20), min_size=1, max_size=4))
    round_to, ranking = (
        data.draw(st.sampled_from([1, 2, 4, 8])),
        data.draw(st.sampled_from(RANKINGS)),
    )
    names = [f"g{i}" for i in range(len(sizes))]
    floors = {name: data.draw(st.integers(1, size)) for name, size in zip(names, sizes, strict=True)}
    kept = {name: torch.ones(size, dtype=torch.bool) for name, size in zip(names, sizes, strict=True)}
    count = ChannelCount(tuple((name,) for name in names))
    for _ in range(data.draw(st.integers(1, 4))):
        quota = data.draw(st.integers(0, 12))
        ranked, raw = {}, {}
        for name, size in zip(names, sizes, strict=True):
            raw[name] = torch.tensor(
                data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=size, max_size=size))
            )
            ranked[name] = comparable(raw[name].double(), kept[name], size, ranking)
        gone = choose(ranked, kept, floors, count, quota=quota, multiples=dict.fromkeys(names, round_to))
        assert sum(map(len, gone.values())) <= quota
        for name, indices in gone.items():
            assert kept[name][indices].all()
            kept[name][indices] = False
            left = int(kept[name].sum())
            assert left >= floors[name]
            assert left % round_to == 0
            rest = raw[name][kept[name]]
            assert rest.numel() == 0 or raw[name][indices].max() <= rest.min()  # the lowest of each group go


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("cost", [None, "parameters", "flops"])
@pytest.mark.parametrize("score", SCORES)
def test_floors_and_rounding_hold_at_every_event_with_and_without_live_shrink(run, score, cost, ranking) -> None:
    events = []
    for live in (False, True):
        done = run(
            Chase, total_steps=16, sparsity=0.5, channel_sparsity=0.6, beta=0.9, channel_interval=2, round_to=2,
            update_interval=3, channel_score=score, channel_cost=cost, channel_ranking=ranking, live_shrink=live,
        )  # fmt: skip
        for _ in range(16):
            done.step()
            for group in channels_of(ResidualNet()).groups:
                left = done.trainer.channels_left[group.name]
                assert left >= floor_of(group.size, 0.6, 0.9)
                assert left % 2 == 0
        events.append(done.trainer.channel_history)
    assert events[0] == events[1]
    assert len(events[0]) > 1


def test_activation_works_in_compiled_training(run) -> None:
    torch._dynamo.reset()
    kept = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = ResidualNet().double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        trainer = Chase(
            net, optimizer, total_steps=12, sparsity=0.5, channel_interval=4, channels=channels_of(net),
            channel_score="activation", channel_cost="flops", live_shrink=True, shrink=Shrinker(), rewrite=rewrite,
        )  # fmt: skip
        forward = torch.compile(net, backend="aot_eager") if compiled else net
        for step in range(12):
            x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            forward(x).square().mean().backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
        kept.append(trainer.channel_history)
    assert kept[0] == kept[1]
    assert kept[0]


def test_activation_of_a_group_that_nobody_reads_is_refused() -> None:
    net = Two()
    members = (Member("conv.weight", 0, one_to_one(4), producer=True),)
    trainer = Static(
        net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1, channel_sparsity=0.5, channels_until=1.0,
        channels=Channels((Group("conv", 4, members),)), channel_score="activation",
    )  # fmt: skip
    net(torch.randn(1, 3, 2, 2)).sum().backward()
    with pytest.raises(ArgumentError, match="nothing read"):
        trainer.step()


@pytest.mark.parametrize("options", [{"channel_cost": "money"}, {"channel_ranking": "best"}, {"channel_score": "none"}])
def test_unknown_names_are_refused(run, options) -> None:
    with pytest.raises(ArgumentError, match="unknown channel_"):
        run(Chase, **options)


def test_hooks_are_gone_after_finalize_and_silent_in_copies(run) -> None:
    done = run(Chase, total_steps=6, channel_interval=2, channel_score="activation")
    average = copy.deepcopy(done.net)
    done.step(1)
    average(torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert not done.trainer._watch.inputs
    done.step(5).trainer.finalize()
    assert not any(module._forward_hooks for module in done.net.modules())


class Gated(nn.Module):
    """A residual net with norms whose stream is multiplied by a gate wherever it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.gate = torch.ones(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        x = x + self.norms[1](self.conv(x * self.gate[:, None, None]))
        return self.fc((x * self.gate[:, None, None]).mean((2, 3)))


def test_taylor_is_the_derivative_by_a_gate_also_behind_norms() -> None:
    torch.manual_seed(0)
    net, images = Gated().double(), torch.randn(8, 3, 5, 5, dtype=torch.float64)
    for norm in net.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    traced = chase_fx.trace(net, images)
    trainer = Static(
        traced, torch.optim.SGD(traced.parameters(), lr=0.0), total_steps=10, sparsity=0.0, channel_sparsity=0.5,
        channel_score="taylor",
    )  # fmt: skip
    torch.nn.functional.cross_entropy(traced(images), torch.arange(8) % 2).backward()
    net.gate.requires_grad_()
    torch.nn.functional.cross_entropy(net(images), torch.arange(8) % 2).backward()
    [group] = trainer._channels.units
    assert len(group.producers) == 2
    assert torch.allclose(scores(trainer), net.gate.grad.abs(), rtol=1e-9)
    behind_norms = sum(part.per_unit(part.parameter.detach() * part.parameter.grad) for part in group.producers)
    assert float(behind_norms.abs().max()) < 1e-3 * float(scores(trainer).min())  # the epsilon of the norm
