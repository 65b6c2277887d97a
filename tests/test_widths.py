"""How many units of a group have to stay: hand-made masks are refused below that, and training stays above it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError
from chase_fx.graphs.traced import TracedModule

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


class Spread(nn.Module):
    """Measures a spread over the channels of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.out(self.b(y).relu()) * y.std(-1, keepdim=True)


class Experts(nn.Module):
    """Multiplies rows with weights whose rows are a multiple of 16 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 32)), nn.Parameter(torch.randn(3, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
        hidden = F.grouped_mm(self.a(x), self.up, offs=offsets).relu()
        return self.out(F.grouped_mm(hidden, self.down.transpose(1, 2), offs=offsets))


def traced(net: type[nn.Module]) -> TracedModule:
    torch.manual_seed(0)
    return chase_fx.trace(net(), X)


def test_masks_that_keep_too_few() -> None:
    """One unit has no spread; so says a mask made by hand, and a plan that was edited."""
    module = traced(Spread)
    channels = chase_fx.analyze(module)
    group = next(g for g in channels.groups if g.name == "a.weight:0")
    assert (group.least, group.multiple) == (2, 1)
    for left in (0, 1):
        with pytest.raises(ArgumentError, match=r"'a.weight:0' must keep at least"):
            channels.plan_keeping({group.name: torch.arange(8) < left})
    slim = chase_fx.rewrite(module, channels.plan_keeping({group.name: torch.arange(8) < 2}))
    chase_fx.verify(module, slim)


def test_masks_that_keep_no_multiple() -> None:
    """A width that an operator does not take is refused at once, not when it runs."""
    module = traced(Experts)
    channels = chase_fx.analyze(module)
    assert {g.multiple for g in channels.groups} == {4}
    name = channels.groups[0].name
    with pytest.raises(ArgumentError, match=r"must keep a multiple of 4 units.*keeps 6"):
        channels.plan_keeping({name: torch.arange(channels.groups[0].size) < 6})


@pytest.mark.parametrize("live_shrink", [False, True])
@pytest.mark.parametrize("net", [Spread, Experts])
def test_training_keeps_the_widths_that_rules_need(net: type[nn.Module], live_shrink: bool) -> None:
    """Channels are removed down to what the groups need, and no further."""
    module = traced(net)
    groups = {g.name: g for g in chase_fx.analyze(module).groups}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    trainer = chase_fx.Chase(
        module,
        optimizer,
        total_steps=20,
        sparsity=0.1,
        channel_sparsity=0.95,
        channel_interval=2,
        live_shrink=live_shrink,
    )
    for _ in range(20):
        optimizer.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()
        trainer.step()
    slim = trainer.finalize()
    kept = slim.plan.kept_indices()
    for name, group in groups.items():
        tensor, _, dim = name.rpartition(":")
        indices = kept[tensor][int(dim)]
        left = group.size if indices is None else len(indices)
        assert left >= group.least
        assert left % group.multiple == 0
        assert left < group.size
    assert slim(X).isfinite().all()


class Rows(nn.Module):
    """Multiplies rows of several pieces, or of two factors, with weights whose rows are a multiple of 16 bytes."""

    def __init__(self, pieces: tuple[int, ...], given: int, factors: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, n) for n in pieces)
        self.given, self.scale = given, nn.Parameter(torch.randn(2, 1)) if factors else None
        self.w, self.out = nn.Parameter(torch.randn(2, given + sum(pieces), 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x[:, : self.given], *(part(x) for part in self.parts)], 1)
        if self.scale is not None:
            y = (y.view(len(y), 2, -1) * self.scale).flatten(1)
        return self.out(F.grouped_mm(y, self.w, offs=torch.tensor([2, 6], dtype=torch.int32)))


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize(
    ("pieces", "given", "factors", "free"),
    [
        ((6, 2), 0, False, ()),  # eight in sum, but neither is a multiple of four
        ((6, 10, 8), 0, False, (2,)),
        ((10,), 6, False, ()),  # six inputs stay
        ((12,), 4, False, (0,)),
        ((8,), 0, True, (0,)),
        ((12,), 0, True, (0,)),  # two times six: the six by twos, and both of the two
        ((24,), 0, True, (0,)),
    ],
)
def test_rows_of_pieces_stay_aligned(
    pieces: tuple[int, ...], given: int, factors: bool, free: tuple[int, ...], round_to: int
) -> None:
    """A piece whose width is no multiple stays whole; of a product each factor keeps what it has of it."""
    torch.manual_seed(0)
    module = chase_fx.trace(Rows(pieces, given, factors), torch.randn(6, 6))
    channels = chase_fx.analyze(module)
    touched = {member.tensor for group in channels.groups for member in group.members}
    assert [i for i in range(len(pieces)) if f"parts.{i}.weight" in touched] == list(free)
    for sparsity in (0.3, 0.6, 0.9):
        slim = chase_fx.rewrite(module, channels.plan(sparsity, round_to=round_to))
        chase_fx.verify(module, slim)


@pytest.mark.parametrize("pooled", [False, True])
def test_group_norms_of_single_positions(pooled: bool) -> None:
    """torch takes no sample of one channel in a group, so a slim norm keeps two where nothing else is in a group."""
    layers: list[nn.Module] = [nn.Linear(5, 12), nn.GroupNorm(3, 12), nn.SiLU(), nn.Linear(12, 2)]
    if pooled:
        pool = nn.AdaptiveAvgPool2d(1)
        layers = [nn.Conv2d(5, 12, 1), pool, nn.GroupNorm(3, 12), nn.SiLU(), nn.Flatten(), nn.Linear(12, 2)]
    net = nn.Sequential(*layers)
    example = torch.randn(2, 5, 4, 4) if pooled else torch.randn(2, 5)
    slim = chase_fx.prune(net, example, channel_sparsity=0.9)
    norm = next(m for m in slim.modules() if isinstance(m, nn.GroupNorm))
    assert norm.weight.numel() // norm.num_groups == 2
    assert slim(example[:1]).shape == (1, 2)
