"""Sparse training of traced modules: groups, rewrite and live shrink come from the graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import chase_fx
from chase_fx.errors import ArgumentError, OptimizerMismatchError
from chase_fx.training import Chase, RigL, Static


class Flattened(nn.Module):
    """Residual, depthwise and flatten: sizes that only the graph knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point, self.bn1 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.fc = nn.Linear(8 * 16, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn1(self.point(self.depthwise(x)))).relu()
        return self.fc(self.hidden(x.reshape(x.shape[0], -1)).relu())


class Attention(nn.Module):
    """Heads times head dims: axes that are products of two groups."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
        self.embed, self.encoder = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


SHAPES = {Flattened: (3, 8, 8), Attention: (5, 6)}


def build(make, method=Chase, **options):
    torch.manual_seed(0)
    traced = chase_fx.trace(make().double(), torch.zeros(2, *SHAPES[make], dtype=torch.float64))
    optimizer = torch.optim.AdamW(traced.parameters(), lr=1e-3)
    options = {"total_steps": 20, "sparsity": 0.5, "channel_sparsity": 0.5, **options}
    return traced, optimizer, method(traced, optimizer, **options)


def train(make, traced, optimizer, trainer, steps, *, first=0, each=lambda: None, forward=None):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, *SHAPES[make], generator=generator, dtype=torch.float64)
        y = torch.randint(10, (4,), generator=generator)
        loss = nn.functional.cross_entropy((traced if forward is None else forward)(x), y)
        loss.backward()
        optimizer.step()
        trainer.step()
        each()
        optimizer.zero_grad()
        assert trainer.nnz == trainer.budget
    return loss.detach()


@pytest.mark.parametrize("make", [Flattened, Attention])
def test_finalize_gives_a_verified_slim_module(make) -> None:
    traced, optimizer, trainer = build(make)
    train(make, traced, optimizer, trainer, 20)
    slim = trainer.finalize()
    chase_fx.verify(traced, slim)
    assert slim.plan.pruned
    assert sum(p.numel() for p in slim.parameters()) < 0.6 * sum(p.numel() for p in traced.parameters())
    assert trainer.channel_shortfall == 0


def test_the_slim_module_equals_the_masked_one() -> None:
    traced, optimizer, trainer = build(Flattened)
    train(Flattened, traced, optimizer, trainer, 20)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(trainer.finalize().eval()(x), traced.eval()(x), rtol=1e-9, atol=1e-12)


def test_live_shrink_follows_the_masked_trajectory() -> None:
    masked, shrunk = build(Flattened), build(Flattened, live_shrink=True)
    for step in range(20):
        losses = [train(Flattened, *each, 1, first=step) for each in (masked, shrunk)]
        torch.testing.assert_close(*losses, rtol=1e-7, atol=1e-10)
    slim, cut = masked[2].finalize(), shrunk[2].finalize()
    assert cut is shrunk[0]
    assert cut.plan == slim.plan
    assert {n: p.shape for n, p in cut.state_dict().items()} == {n: p.shape for n, p in slim.state_dict().items()}
    assert repr(cut.get_submodule("stem")) == repr(slim.get_submodule("stem"))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(cut.eval()(x), slim.eval()(x), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", [Flattened, Attention])
def test_live_shrink_resumes_bit_identical(make) -> None:
    straight, first, second = (build(make, live_shrink=True) for _ in range(3))
    train(make, *straight, 20)
    train(make, *first, 11)
    state = copy.deepcopy([part.state_dict() for part in reversed(first)])
    for part, saved in zip(reversed(second), (state[0], state[1], state[2]), strict=True):
        part.load_state_dict(saved)
    train(make, *second, 9, first=11)
    for (name, a), b in zip(straight[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_a_shrunken_traced_module_builds_it_again(tmp_path) -> None:
    straight, first = build(Flattened, live_shrink=True), build(Flattened, live_shrink=True)
    train(Flattened, *straight, 20)
    train(Flattened, *first, 11)
    first[2].save(tmp_path / "run.ckpt")
    torch.manual_seed(5)
    traced = chase_fx.trace(Flattened().double(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    optimizer = torch.optim.AdamW(traced.parameters())
    trainer = Chase.restore(tmp_path / "run.ckpt", traced, optimizer)
    assert traced.hidden.weight.shape == first[0].hidden.weight.shape != (12, 128)
    train(Flattened, traced, optimizer, trainer, 9, first=11)
    for (name, a), b in zip(straight[0].state_dict().items(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_average_made_between_two_shrinks_follows() -> None:
    traced, optimizer, trainer = build(Flattened, live_shrink=True)
    train(Flattened, traced, optimizer, trainer, 5)
    assert trainer.channel_history
    average = AveragedModel(traced, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    trainer.follow(average.module)
    train(Flattened, traced, optimizer, trainer, 15, first=5, each=lambda: average.update_parameters(traced))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert average.module.eval()(x).shape == (3, 10)
    assert average.module.stem.weight.shape == traced.stem.weight.shape


def test_compiled_training_goes_on_through_shrinks() -> None:
    traced, optimizer, trainer = build(Flattened, live_shrink=True, channel_interval=5)
    compiled = torch.compile(traced, backend="aot_eager")
    plain = build(Flattened, live_shrink=True, channel_interval=5)
    ours = train(Flattened, traced, optimizer, trainer, 20, forward=compiled)
    torch.testing.assert_close(ours, train(Flattened, *plain, 20), rtol=1e-7, atol=1e-10)


def test_every_method_takes_a_traced_module() -> None:
    for method in (RigL, Static):
        traced, optimizer, trainer = build(Flattened, method)
        train(Flattened, traced, optimizer, trainer, 20)
        chase_fx.verify(traced, trainer.finalize())


def test_without_channel_sparsity_finalize_keeps_every_channel() -> None:
    traced, optimizer, trainer = build(Flattened, channel_sparsity=0.0)
    train(Flattened, traced, optimizer, trainer, 20)
    slim = trainer.finalize()
    assert slim is not traced
    assert not slim.plan.pruned
    assert {n: p.shape for n, p in slim.named_parameters()} == {n: p.shape for n, p in traced.named_parameters()}


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x))).relu().mean((2, 3))


@pytest.mark.parametrize(
    ("norm", "counts"),
    [(nn.BatchNorm2d(16), False), (nn.GroupNorm(16, 16), False), (nn.GroupNorm(4, 16), True), (nn.LayerNorm(6), False),
     (nn.LayerNorm([16, 6, 6]), True)],
)  # fmt: skip
def test_norms_over_channels_that_will_be_zeros_are_told(norm, counts, caplog) -> None:
    def build(**options):
        traced = chase_fx.trace(Normed(copy.deepcopy(norm)), torch.zeros(2, 3, 8, 8))
        RigL(traced, torch.optim.SGD(traced.parameters(), lr=0.1), total_steps=10, **options)

    build(channel_sparsity=0.5, live_shrink=True)
    build()
    assert not caplog.records
    build(channel_sparsity=0.5)
    assert [("live_shrink=True" in r.message, "'first.weight:0" in r.message, r.name) for r in caplog.records] == [
        (True, True, "chase_fx")
    ] * counts


def normed_weights(**options):
    wrap = nn.utils.parametrizations.weight_norm
    net = nn.Sequential(wrap(nn.Linear(6, 16)), nn.ReLU(), wrap(nn.Linear(16, 10)))
    traced = chase_fx.trace(net, torch.zeros(2, 6))
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    return traced, Chase(traced, optimizer, total_steps=20, sparsity=0.9, **options)


def test_weights_that_no_row_of_may_be_empty_are_refused() -> None:
    """``weight_norm`` makes NaN of an empty row."""
    with pytest.raises(
        ArgumentError, match=r"0\.weight is computed from '0\.parametrizations.*remove_parametrizations"
    ):
        normed_weights()

    def second(name, _):
        return name == "2.parametrizations.weight.original1"

    with pytest.raises(ArgumentError, match=r"2\.weight.*parameters="):
        normed_weights(parameters=second, live_shrink=True)
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 16)), nn.Linear(16, 10))
    state = copy.deepcopy(spectral.state_dict())
    trainer = RigL(spectral, torch.optim.SGD(spectral.parameters(), lr=0.1), total_steps=20, sparsity=0.0)
    assert all(torch.equal(value, state[name]) for name, value in spectral.state_dict().items())
    assert list(trainer.masks) == ["0.parametrizations.weight.original", "1.weight"]


def test_live_shrink_cuts_what_no_row_of_may_be_empty() -> None:
    def build(live):
        wrap = nn.utils.parametrizations.weight_norm
        net = nn.Sequential(wrap(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 10))
        traced = chase_fx.trace(net, torch.zeros(2, 6))
        options = {"parameters": ["2.weight"], "live_shrink": live, "channel_sparsity": 0.5}
        optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
        return traced, optimizer, Chase(traced, optimizer, total_steps=20, sparsity=0.5, **options)

    with pytest.raises(ArgumentError, match="live_shrink=True"):
        build(live=False)
    traced, optimizer, trainer = build(live=True)
    for _ in range(20):
        loss = traced(torch.randn(4, 6)).square().mean()
        loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    assert traced.get_submodule("2").weight.shape == (10, 8)


def test_the_older_weight_and_spectral_norm_too() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 1, 1))
    with pytest.raises(ArgumentError, match=r"0\.weight is computed from '0\.weight_v'.*remove_weight_norm"):
        Static(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=2)
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 1, 1))
    net[1].register_parameter("weight_g", nn.Parameter(torch.ones(8, 1, 1)))  # a factor per channel is no weight
    trainer = Static(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=2)
    assert list(trainer.masks) == ["0.weight_orig", "1.weight"]


def test_an_optimizer_of_the_model_instead_of_the_traced_one_is_refused() -> None:
    model = Flattened()
    traced = chase_fx.trace(model, torch.zeros(2, 3, 8, 8))
    with pytest.raises(OptimizerMismatchError, match=r"traced\.parameters"):
        Chase(traced, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)


def test_a_module_that_is_not_traced_can_lose_no_channels() -> None:
    model = Flattened()
    with pytest.raises(ArgumentError, match=r"chase_fx\.trace"):
        Chase(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
