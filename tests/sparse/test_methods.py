"""The other methods: their tables, and what holds for all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chase_fx.errors import ArgumentError
from chase_fx.sparse import ACDC, GMP, MEST, SET, SNIP, Chase, GraNet, RigL, RigLITOP, SRigL, Static
from chase_fx.sparse.optim import slots
from chase_fx.sparse.schedule import cubic

ALL = {
    "Static": (Static, {}),
    "Static uniform": (Static, {"distribution": "uniform"}),
    "GMP": (GMP, {"update_interval": 2}),
    "GMP layer": (GMP, {"scope": "layer"}),
    "SNIP": (SNIP, {}),
    "SET": (SET, {"update_interval": 2}),
    "RigL": (RigL, {"update_interval": 2}),
    "RigL-ITOP": (RigLITOP, {}),
    "GraNet": (GraNet, {"update_interval": 2}),
    "GraNet dense": (GraNet, {"initial_density": 1.0}),
    "MEST": (MEST, {"update_interval": 2}),
    "MEST soft": (MEST, {"soft": True, "update_interval": 2}),
    "SRigL": (SRigL, {"update_interval": 2}),
    "SRigL transformers": (SRigL, {"gamma": 0.95}),
    "ACDC": (ACDC, {"phases": 4}),
    "Chase": (Chase, {"channel_sparsity": 0.0}),
}
DENSE = 8 * 27 + 12 * 72 + 8 * 108 + 80
GROWLESS = {"Static", "Static uniform", "GMP", "GMP layer", "SNIP"}


def check(run) -> None:
    assert run.trainer.nnz == run.trainer.budget
    for name, mask in run.trainer.masks.items():
        weight = run.net.get_parameter(name)
        assert not weight.detach()[~mask].any()
        assert all(not slot[~mask].any() for _, slot in slots(run.optimizer, weight))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channel_sparsity", [0.0, 0.5])
def test_every_method_is_exact_with_and_without_the_channel_rule(run, name, channel_sparsity) -> None:
    method, options = ALL[name]
    options = {**options, "channel_sparsity": channel_sparsity}
    done = run(method, "adam", total_steps=30, sparsity=0.8, **options)
    done.step(30, check)
    nominal = round(0.2 * DENSE)
    if name.startswith("SRigL"):
        assert 0.8 * nominal <= done.trainer.nnz <= nominal
    elif name in GROWLESS and channel_sparsity:
        assert done.trainer.nnz <= nominal
    else:
        assert done.trainer.nnz == nominal
    assert sum(done.trainer.channels_left.values()) == (10 if channel_sparsity else 0)


@pytest.mark.parametrize("name", ALL)
def test_every_method_resumes_bit_identical(run, name) -> None:
    method, options = ALL[name]
    options = {"total_steps": 24, "sparsity": 0.8, **options, "channel_sparsity": 0.4}
    straight = run(method, **options).step(24)
    first = run(method, **options).step(11)
    second = run(method, seed=5, **options).load(first.state(), 11).step(13)
    for key, value in straight.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[key]), key
    for key, mask in straight.trainer.masks.items():
        assert torch.equal(mask, second.trainer.masks[key]), key


@pytest.mark.parametrize("name", sorted(set(ALL) - {"Static uniform", "GMP layer"}))
def test_refill_fills_the_kept_channels_of_every_method(run, name) -> None:
    method, options = ALL[name]
    done = run(method, total_steps=30, sparsity=0.8, **{**options, "channel_sparsity": 0.5}, refill=1.0)
    done.step(30, check)
    capacity = done.trainer._weights.capacity()
    assert sum(done.trainer.channels_left.values()) == 10
    if name.startswith("SRigL"):
        assert done.trainer.nnz > 0.8 * capacity  # a constant fan-in with ablated neurons need not fill every place
    else:
        assert done.trainer.nnz == capacity


def drive(
    method, weight: torch.Tensor, gradients: torch.Tensor, mask: torch.Tensor | None = None, steps: int = 1, **options
):
    """One bias-free linear layer with a given weight, mask and gradient, at learning rate zero."""
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    trainer = method(net, optimizer, **options)
    with torch.no_grad():
        if mask is not None:
            trainer.masks["weight"].copy_(mask)
        net.weight.copy_(weight * trainer.masks["weight"])
    for _ in range(steps):
        net.weight.grad = gradients.clone()
        optimizer.step()
        trainer.step()
    return trainer, net


W = torch.tensor([[4.0, 1.0, 0, 0], [3.0, 2.0, 0, 0]])
M = W != 0
G = torch.tensor([[0.0, 0, 5.0, 7.0], [0, 0, 6.0, 7.0]])


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient() -> None:
    # 4 of 8 active, alpha = 0.3 * (1 + cos(pi / 75)) / 2 = .2999: round(4 * .2999) = 1 weight moves; the tie of the two
    # gradients of 7 goes to the lower index.
    trainer, net = drive(RigL, W, G, M, total_steps=100, sparsity=0.5, update_interval=1)
    assert trainer.masks["weight"].tolist() == [[True, False, False, True], [True, True, False, False]]
    assert net.weight.tolist() == [[4, 0, 0, 0], [3, 2, 0, 0]]


def test_set_grows_anywhere_but_where_weights_are() -> None:
    trainer, _ = drive(SET, W, G, M, total_steps=100, sparsity=0.5, update_interval=1)
    mask = trainer.masks["weight"]
    assert mask.sum() == 4
    assert mask[0, 0]
    assert mask[1, :2].all()


def test_snip_keeps_the_largest_products_and_may_run_before_training() -> None:
    w = torch.tensor([[4.0, 1.0, 2.0, 1.0], [3.0, 2.0, 0.5, 1.0]])
    g = torch.tensor([[1.0, 9.0, -3.0, 0.0], [1.0, 1.0, 8.0, 4.0]])  # |g w|: 4 9 6 0 / 3 2 4 4
    expected = [[True, True, True, False], [False, False, True, False]]
    trainer, _ = drive(SNIP, w, g, total_steps=10, sparsity=0.5)
    assert trainer.masks["weight"].tolist() == expected
    net = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(w)
    net.weight.grad = g
    trainer = SNIP(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=10, sparsity=0.5)
    assert trainer.masks["weight"].tolist() == expected
    assert trainer.budget == 4


def test_mest_adds_the_gradient_to_the_magnitude() -> None:
    # |w| + 1.0 * |g|: the weight of magnitude 1 has gradient 9 and stays, the one of 2 goes. 30 % of 4 is 1.
    g = torch.tensor([[0.0, 9.0, 0, 0], [0, 0, 0, 0]])
    trainer, net = drive(MEST, W, g, M, total_steps=100, sparsity=0.5, update_interval=1, gradient_rate=1.0)
    assert trainer.nnz == 4
    assert net.weight.tolist() == [[4, 1, 0, 0], [3, 0, 0, 0]]


def test_gmp_follows_the_cubic() -> None:
    weight = torch.arange(1.0, 101.0).view(10, 10)
    trainer, net = drive(GMP, weight, weight, total_steps=100, sparsity=0.9, update_interval=5, stop=0.5, steps=20)
    left = round(100 * (1 - 0.9 * cubic(20, 0, 50)))
    assert trainer.nnz == left == 29
    assert net.weight.flatten().nonzero().squeeze(1).tolist() == list(range(71, 100))


def test_granet_prunes_to_the_cubic_and_replaces_a_share_per_layer(run) -> None:
    budgets = []
    done = run(GraNet, channel_sparsity=0.0, total_steps=40, sparsity=0.9, update_interval=10)
    assert done.trainer.nnz == DENSE // 2
    done.step(40, lambda r: budgets.append(r.trainer.budget))
    for t in (10, 20, 30):
        assert budgets[t - 1] == round(DENSE * (0.5 - 0.4 * cubic(t, 0, 30)))


@pytest.mark.parametrize("method", [SET, RigL, RigLITOP, GraNet, MEST, Chase])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_a_layer_without_empty_places_keeps_its_weights(method, sparsity) -> None:
    """ERK makes small layers dense: what they dropped would grow again at once, with its value lost."""
    net = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 2, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    scope = {"channel_sparsity": 0.0, "explore_until": 0.1} if method is Chase else {}
    extra = {"initial_density": 0.1} if method is GraNet else {}
    trainer = method(net, optimizer, total_steps=60, sparsity=sparsity, update_interval=1, **scope, **extra)
    assert trainer.masks["1.weight"].all()
    before = {name: net.get_parameter(name).detach().clone() for name in trainer.masks}
    for _ in range(20):
        for p in net.parameters():
            p.grad = torch.rand_like(p) + (p.numel() == 40)  # what the small layer lost would come back
        trainer.step()
        assert trainer.nnz == trainer.budget
    if method is not Chase or not sparsity:  # Chase drops and grows anywhere
        assert torch.equal(net[1].weight, before["1.weight"])
    if sparsity:
        assert not torch.equal(net[0].weight != 0, before["0.weight"] != 0)
    else:
        assert torch.equal(net[0].weight, before["0.weight"])


def test_mest_soft_exceeds_the_budget_until_the_bound_is_gone(run) -> None:
    budgets = []
    run(MEST, soft=True, channel_sparsity=0.0, sparsity=0.8, update_interval=4, total_steps=40).step(
        40, lambda r: budgets.append(r.trainer.budget)
    )
    assert budgets[3] == round(0.2 * 1.3 * DENSE)
    assert budgets[-1] == round(0.2 * DENSE)
    assert sorted(budgets[3:], reverse=True) == budgets[3:]


def test_acdc_alternates_and_ends_sparse(run) -> None:
    budgets = []
    run(ACDC, channel_sparsity=0.0, sparsity=0.8, phases=4, warmup=0.1, stop=0.7, total_steps=40).step(
        40, lambda r: budgets.append(r.trainer.budget)
    )
    sparse = round(0.2 * DENSE)
    # warm-up 4 steps, phases of (28 - 4) // 4 = 6 steps from step 4 on, sparse for good from step 28.
    assert budgets == [DENSE] * 3 + [sparse] * 6 + [DENSE] * 6 + [sparse] * 6 + [DENSE] * 6 + [sparse] * 13


def test_itop_reports_the_share_of_weights_ever_active(run) -> None:
    shares = []
    done = run(RigLITOP, channel_sparsity=0.0, sparsity=0.9, total_steps=20, update_interval=4)
    union = {name: mask.clone() for name, mask in done.trainer.masks.items()}

    def note(r) -> None:
        for name, mask in r.trainer.masks.items():
            union[name] |= mask
        shares.append(r.trainer.coverage)
        assert r.trainer.coverage == sum(int(m.sum()) for m in union.values()) / DENSE

    done.step(20, note)
    assert shares == sorted(shares)
    assert shares[-1] > 0.12


def test_itop_reports_the_same_with_live_shrink_and_when_resumed(run) -> None:
    options = {"channel_sparsity": 0.5, "sparsity": 0.9, "total_steps": 20, "update_interval": 2}
    masked, shrunk = (run(RigLITOP, **options, live_shrink=live) for live in (False, True))
    for _ in range(13):
        assert masked.step().trainer.coverage == shrunk.step().trainer.coverage
    resumed = run(RigLITOP, **options, live_shrink=True).load(shrunk.state(), 13)
    assert resumed.step(7).trainer.coverage == shrunk.step(7).trainer.coverage == masked.step(7).trainer.coverage


def test_srigl_keeps_one_fan_in_per_layer(run) -> None:
    def check_fan_in(r) -> None:
        for name, mask in r.trainer.masks.items():
            widths = mask.flatten(1).sum(1)
            assert set(widths[widths > 0].tolist()) == {r.trainer.fan_in[name]}, name

    run(SRigL, channel_sparsity=0.0, sparsity=0.9, update_interval=2).step(40, check_fan_in)
    run(SRigL, channel_sparsity=0.5, sparsity=0.9, update_interval=2).step(40, check_fan_in)


def test_srigl_table() -> None:
    # 8 of 16 active, fan-in 2; round(.3 * 8) = 2 weights move. By magnitude 1 and 2 go: neuron 3 loses both, its
    # gradients are 0, so it has no salient weight and is ablated. The largest gradients are at (0, 3) and (1, 3).
    # 8 weights for 3 neurons: fan-in 2 each, kept weights first: neurons 0, 1 and 2 keep theirs.
    w = torch.tensor([[9.0, 8.0, 0, 0], [7.0, 6.0, 0, 0], [5.0, 4.0, 0, 0], [2.0, 1.0, 0, 0]])
    g = torch.zeros(4, 4)
    g[0, 3], g[1, 3] = 5.0, 4.0
    trainer, _ = drive(SRigL, w, g, w != 0, total_steps=1000, sparsity=0.5, gamma=0.3, update_interval=1)
    t, f = True, False
    assert trainer.masks["weight"].tolist() == [[t, t, f, f], [t, t, f, f], [t, t, f, f], [f, f, f, f]]
    assert trainer.fan_in == {"weight": 2}
    # Had neuron 2 lost one more, two neurons would share the 8: fan-in 4.
    w[2] = torch.tensor([0.2, 0.1, 0, 0])
    trainer, _ = drive(SRigL, w, g, w != 0, total_steps=1000, sparsity=0.5, gamma=0.3, update_interval=1, alpha=0.5)
    assert trainer.masks["weight"].tolist() == [[t] * 4, [t] * 4, [f] * 4, [f] * 4]


@given(st.floats(0.0, 0.99), st.integers(1, 60), st.sampled_from(sorted(ALL)), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_nnz_is_always_the_budget(sparsity: float, total_steps: int, name: str, seed: int) -> None:
    method, options = ALL[name]
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"update_interval": 1, **options} if method not in (Static, SNIP, ACDC) else options
    trainer = method(net, optimizer, total_steps=total_steps, sparsity=sparsity, seed=seed, **options)
    for _ in range(min(total_steps, 12)):
        for p in net.parameters():
            p.grad = torch.randn_like(p).round()  # many ties
        optimizer.step()
        trainer.step()
        assert trainer.nnz == trainer.budget
        assert all(not net.get_parameter(n).detach()[~m].any() for n, m in trainer.masks.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (GMP, {"start": 0.9, "stop": 0.5}), (SET, {"alpha": 2.0}), (RigL, {"stop": 1.5}),
        (MEST, {"rates": ((0.5, 3.0),)}), (GraNet, {"initial_density": 2.0}), (SRigL, {"gamma": -1.0}),
        (ACDC, {"phases": 0}), (RigLITOP, {"alpha_end": 7}), (Static, {"sparsity": 1.2}), (SNIP, {"total_steps": 0}),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(method, options, run) -> None:
    with pytest.raises(ArgumentError):
        run(method, channel_sparsity=0.0, **options)
