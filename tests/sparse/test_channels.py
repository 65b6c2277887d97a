"""Channel events: hand-computed scores and tables, floors, products, ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chase_fx.errors import ArgumentError
from chase_fx.sparse import Chase
from chase_fx.sparse.channels import ChannelRule, ChannelState, floor_of
from chase_fx.sparse.masks import SparseWeights, maskable
from chase_fx.sparse.ranking import ChannelCount, choose


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def all_kept(**sizes: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}


def alone(*names: str) -> ChannelCount:
    return ChannelCount(tuple((name,) for name in names))


def removed(result: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in result.items()}


def test_lowest_scores_of_all_groups_go_first() -> None:
    scores = {"a": values(5, 1, 2, 9), "b": values(3, 8, 7)}
    result = choose(scores, all_kept(a=4, b=3), {"a": 1, "b": 1}, alone("a", "b"), quota=3)
    assert removed(result) == {"a": [1, 2], "b": [0]}


def test_what_a_floored_group_may_not_give_is_taken_elsewhere() -> None:
    scores = {"a": values(1, 2, 3, 4), "b": values(5, 6, 7, 8)}
    result = choose(scores, all_kept(a=4, b=4), {"a": 3, "b": 1}, alone("a", "b"), quota=3)
    assert removed(result) == {"a": [0], "b": [0, 1]}


def test_floors_that_cannot_be_met_end_the_search() -> None:
    scores = {"a": values(1, 2, 3), "b": values(4, 5)}
    result = choose(scores, all_kept(a=3, b=2), {"a": 0, "b": 0}, alone("a", "b"), quota=100)
    assert removed(result) == {"a": [0, 1], "b": [0]}


def test_ties_go_by_group_order_then_by_lowest_unit() -> None:
    scores = {"b": values(1, 1, 1), "a": values(1, 1, 1)}
    result = choose(scores, all_kept(b=3, a=3), {"a": 1, "b": 1}, alone("b", "a"), quota=3)
    assert removed(result) == {"b": [0, 1], "a": [0]}


def test_nan_scores_go_first_and_break_nothing() -> None:
    scores = {"a": values(1, math.nan, 3)}
    assert removed(choose(scores, all_kept(a=3), {"a": 1}, alone("a"), quota=1)) == {"a": [1]}


def test_rounding_removes_blocks_that_leave_a_multiple() -> None:
    # 10 units: first 2 to get to 8, then 4 to get to 4; the block of 4 has mean 4.5 and b's has 4.0.
    scores = {"a": values(*range(1, 11)), "b": values(4, 4, 4, 4, 20, 20, 20, 20)}
    kept = all_kept(a=10, b=8)
    floors = {"a": 1, "b": 1}
    assert removed(choose(scores, kept, floors, alone("a", "b"), quota=6, multiples={"a": 4, "b": 4})) == {
        "a": [0, 1],
        "b": [0, 1, 2, 3],
    }
    everything = choose(scores, kept, floors, alone("a", "b"), quota=99, multiples={"a": 4, "b": 4})
    assert {name: len(kept[name]) - len(gone) for name, gone in everything.items()} == {"a": 4, "b": 4}


def test_a_product_axis_counts_channels_not_units(make_group) -> None:
    # 4 heads x 6 dims on one axis: position = head * 6 + dim.
    grid = torch.arange(24).view(4, 6)
    heads = make_group("heads", 4, ("w", 0, grid, True))
    dims = make_group("dims", 6, ("w", 0, grid.t(), True))
    other = make_group("other", 5, ("v", 0, None, True))
    count = ChannelCount.of([heads, dims, other])
    assert set(count.terms) == {("dims", "heads"), ("other",)}
    assert count.total({"heads": 4, "dims": 6, "other": 5}) == 29
    # The lowest head costs 6 channels; then a dim costs 3, and the next head (5) no longer fits into the 4 left.
    scores = {"heads": values(1, 3, 9, 9), "dims": values(2, 9, 9, 9, 9, 9), "other": values(8, 8.5, 8.6, 8.7, 8.8)}
    gone = choose(scores, all_kept(heads=4, dims=6, other=5), {"heads": 1, "dims": 1, "other": 1}, count, quota=13)
    assert removed(gone) == {"heads": [0], "dims": [0], "other": [0, 1, 2, 3]}


def test_groups_side_by_side_on_an_axis_are_no_product(make_group) -> None:
    a = make_group("a", 2, ("fc", 1, torch.tensor([[0], [1]]), False))
    b = make_group("b", 3, ("fc", 1, torch.tensor([[2], [3], [4]]), False))
    assert set(ChannelCount.of([a, b]).terms) == {("a",), ("b",)}


@given(st.data())
@settings(deadline=None)
def test_choice_is_exact_or_stopped_by_floors(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    names = [f"g{i}" for i in range(len(sizes))]
    scores = {n: values(*data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=s, max_size=s)))
              for n, s in zip(names, sizes, strict=True)}  # fmt: skip
    floors = {n: data.draw(st.integers(0, s)) for n, s in zip(names, sizes, strict=True)}
    quota = data.draw(st.integers(0, 40))
    gone = choose(scores, all_kept(**dict(zip(names, sizes, strict=True))), floors, alone(*names), quota=quota)
    room = sum(s - max(1, floors[n]) for n, s in zip(names, sizes, strict=True))
    assert sum(map(len, gone.values())) == min(quota, room)
    for n, indices in gone.items():
        worst = scores[n][indices].max()
        assert all(scores[n][i] >= worst for i in range(len(scores[n])) if i not in indices.tolist())


def test_floor_table() -> None:
    assert [floor_of(c, 0.5, 0.5) for c in (1, 4, 16, 64)] == [1, 1, 4, 16]
    assert floor_of(10, 0.9, 1.0) == 1  # 10 * (1 - 0.9) is a hair below 1 in floats
    assert floor_of(10, 0.7, 1.0) == 3


def test_events_are_due_at_intervals_and_at_the_end() -> None:
    rule = ChannelRule(0.5, interval=4, end=10)
    shares = {t: rule.at(t) for t in range(1, 14) if rule.at(t) is not None}
    assert shares == pytest.approx({4: 0.5 * (1 - 0.6**3), 8: 0.5 * (1 - 0.2**3), 10: 0.5})
    assert ChannelRule(0.0, interval=1, end=10).at(5) is None


def test_no_channel_goes_before_the_start_of_the_rule() -> None:
    rule = ChannelRule(0.5, interval=4, start=6, end=16)
    shares = {t: rule.at(t) for t in range(1, 20) if rule.at(t) is not None}
    assert shares == pytest.approx({10: 0.5 * (1 - 0.6**3), 14: 0.5 * (1 - 0.2**3), 16: 0.5})


def test_channels_from_is_a_share_of_the_run(run) -> None:
    options = {"channel_sparsity": 0.5, "channel_interval": 1, "channels_from": 0.3, "channels_until": 0.6}
    events = run(Chase, **options).step(40).trainer.channel_history
    assert 12 < events[0]["step"] <= 14
    assert events[-1]["step"] <= 24


def state_of(net, channels, score="umm", **options):
    from chase_fx.sparse.unit_score import resolve

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weights = SparseWeights(maskable(net), optimizer)
    rule = ChannelRule(options.pop("sparsity", 0.5), interval=1, end=10, score=resolve(score), **options)
    return weights, ChannelState(channels.groups, net, rule)


def test_umm_is_the_mean_over_all_producers_of_the_unit(residual, residual_channels) -> None:
    net = residual(channels=2, middle=3)
    weights, state = state_of(net, residual_channels(net))
    with torch.no_grad():
        net.stem.weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1).expand_as(net.stem.weight))
        net.conv2.weight.copy_(torch.tensor([2.0, 0.0]).view(2, 1, 1, 1).expand_as(net.conv2.weight))
        net.conv2.weight[0, :2] = 0
    stream = state._score(state.units[0], weights)
    # unit 0: 27 entries of 1 in the stem, 9 of 2 among 27 in conv2; unit 1: 27 entries of 3 and 27 zeros.
    assert stream.tolist() == pytest.approx([(27 * 1 + 9 * 2) / 54, 27 * 3 / 54])


def test_umm_leaves_out_entries_of_removed_channels(residual, residual_channels) -> None:
    net = residual(channels=2, middle=3)
    weights, state = state_of(net, residual_channels(net))
    with torch.no_grad():
        net.stem.weight.fill_(1.0)
        net.conv2.weight.fill_(1.0)
    state.remove({"conv1.weight:0": torch.tensor([2])}, weights)
    weights.apply()
    assert state._score(state.units[0], weights).tolist() == [1.0, 1.0]


def test_a_removed_unit_is_zero_in_every_member(residual, residual_channels) -> None:
    net = residual(channels=4, middle=6)
    channels = residual_channels(net)
    weights, state = state_of(net, channels)
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    state.remove({"stem.weight:0": torch.tensor([1, 3]), "conv1.weight:0": torch.tensor([0])}, weights)
    weights.apply()
    parameters = dict(net.named_parameters())
    for group, gone in zip(channels.groups, ([1, 3], [0]), strict=True):
        for member in group.members:
            if member.tensor in parameters:
                touched = parameters[member.tensor].index_select(member.dim, member.positions[gone].flatten())
                assert not touched.any(), member
    assert net.conv1.weight.count_nonzero() == 5 * 2 * 9
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in net.named_buffers())
    net.eval()
    assert not net.bn0(net.stem(torch.randn(2, 3, 5, 5)))[:, [1, 3]].any()


def test_impossible_channel_sparsity_stops_at_the_floors_and_says_so(residual, residual_channels) -> None:
    net = residual(channels=4, middle=4)
    weights, state = state_of(net, residual_channels(net), sparsity=0.9)
    assert state.event(10, 0.9, weights)
    assert state.left == {"stem.weight:0": 1, "conv1.weight:0": 1}
    assert state.shortfall == round(0.9 * 8) - 6
    assert not state.event(11, 0.9, weights)


def test_a_group_of_one_unit_is_no_prunable_channel(make_group, make_channels) -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 4), nn.Linear(4, 2))
    groups = (
        make_group("one", 1, ("0.weight", 0, None, True), ("1.weight", 1, None, False)),
        make_group("four", 4, ("1.weight", 0, None, True), ("2.weight", 1, None, False)),
    )
    weights, state = state_of(net, make_channels(groups))
    state.event(10, 0.5, weights)
    assert state.left == {"one": 1, "four": 2}


@pytest.mark.parametrize("score", ["umm", "magnitude", "taylor", "bn_scale"])
def test_scores_find_the_weakest_unit(score, residual, residual_channels) -> None:
    net = residual(channels=4, middle=6)
    weights, state = state_of(net, residual_channels(net), score)
    with torch.no_grad():
        net.conv1.weight[2] *= 1e-4
        net.bn1.weight[2] = 1e-4
    net(torch.randn(8, 3, 6, 6)).square().mean().backward()
    assert int(state._score(state.units[1], weights).argmin()) == 2


def test_a_score_of_the_wrong_shape_is_refused(residual, residual_channels) -> None:
    net = residual(channels=4, middle=6)
    weights, state = state_of(net, residual_channels(net), lambda units, alive: torch.ones(3))
    with pytest.raises(ArgumentError, match="one number per"):
        state.event(10, 0.5, weights)


def test_groups_of_another_module_are_refused(make_group, make_channels, residual) -> None:
    channels = make_channels((make_group("g", 2, ("nowhere.weight", 0, None, True)),))
    with pytest.raises(ArgumentError, match=r"nowhere\.weight"):
        state_of(residual(), channels)
