"""Sizes of the input that decide how channels are grouped, stepped over, repeated or bounded."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherSizeError
from chase_fx.graphs.traced import TracedModule
from tests.nets import Net, conv
from tests.oracle import EXACT, _run, difference, masked_copy, randomise

Step = Callable[[Tensor, int], Tensor]


def image(batch: int, height: int, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(height * 7 + batch)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=torch.float64)


def cut_at_random(net: nn.Module, x: Tensor, seed: int) -> tuple[nn.Module, TracedModule]:
    """The model with masked channels, and without them."""
    traced = chase_fx.trace(net, x)
    channels = chase_fx.analyze(traced)
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in channels.groups:
        masks[group.name] = torch.rand(group.size, generator=generator) < 0.55
        masks[group.name][torch.randint(group.size, (1,), generator=generator)] = True
    slim = chase_fx.rewrite(traced, channels.plan_keeping(masks))
    return masked_copy(net, slim.plan.kept_indices()), slim.eval()


def assert_never_silent(net: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Slim modules give what the masked model gives, or refuse; by itself, the graph refuses some, with the line."""
    refused = 0
    for seed in range(4):
        masked, slim = cut_at_random(net, inputs[0], seed)
        alone = copy.deepcopy(slim)
        alone.variants.recapture = None
        for x in inputs:
            want = _run(masked, slim.plan.kept_indices(), (x,), {})
            with contextlib.suppress(OtherSizeError):
                assert difference(want, slim(x)) <= EXACT
            try:
                found = alone(x)
            except OtherSizeError as e:
                refused += "test_sizes_among_channels.py" in str(e)
            else:
                assert difference(want, found) <= EXACT
    assert refused


STEPS: dict[str, Step] = {
    "step": lambda y, n: y[:, :: n - 2].sum(1, keepdim=True),
    "stop of a step": lambda y, n: y[:, 0 : 2 * n : 2].sum(1, keepdim=True),
    "view": lambda y, n: y.view(y.shape[0], n - 2, -1, *y.shape[2:]).sum(1).pow(2).sum(1, keepdim=True),
    "inner view": lambda y, n: y.view(y.shape[0], -1, n - 2, *y.shape[2:]).sum(1).pow(2).sum(1, keepdim=True),
    "unflatten": lambda y, n: y.unflatten(1, (n - 2, -1)).sum(1).pow(2).sum(1, keepdim=True),
    "channel shuffle": lambda y, n: torch.channel_shuffle(y, n - 2)[:, :4].sum(1, keepdim=True),
    "chunk": lambda y, n: torch.stack(y.chunk(n - 2, 1)).sum(0).pow(2).sum(1, keepdim=True),
    "bounded copies": lambda y, n: y.repeat_interleave(n, 1)[:, :8].sum(1, keepdim=True),
    "copies from the end": lambda y, n: y.repeat(1, n, 1, 1)[:, -12:].sum(1, keepdim=True),
    "bounded zeros": lambda y, n: (
        torch.cat([y.new_zeros(y.shape[0], n, *y.shape[2:]), y], 1)[:, 4:12] * torch.arange(8.0)[:, None, None]
    ).sum(1, keepdim=True),
    "bounded space": lambda y, _: y.flatten(1)[:, :32].sum(1)[:, None, None, None],
    "bounded windows": lambda y, n: F.unfold(y, n // 2, stride=n // 2)[:, :16].sum(1).sum(1)[:, None, None, None],
    "windows as groups": lambda y, n: (
        F.unfold(y, 2, stride=2).view(y.shape[0], (n + 2) // 3, -1, (n // 2) ** 2).sum(2).pow(2).sum((1, 2))
    )[:, None, None, None],
    "split": lambda y, n: torch.cat([k * part for k, part in enumerate(y.split(y.shape[1] // (n // 2), 1))], 1).sum(
        1, keepdim=True
    ),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_pixels_among_channels(step: Step) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y) + step(y, x.shape[2])

    example = image(2, 4)
    net = randomise(Net(forward, a=conv(3, 8), out=conv(8, 2)), (example,))
    assert_never_silent(net, [example, image(3, 4), image(2, 10), image(2, 6)])


def test_groups_of_a_norm() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(F.group_norm(m.a(x), x.shape[2] - 2, m.norm.weight, m.norm.bias))

    example = image(2, 4)
    net = randomise(Net(forward, a=conv(3, 8), norm=nn.GroupNorm(2, 8), out=conv(8, 2)), (example,))
    assert_never_silent(net, [example, image(3, 4), image(2, 10), image(2, 6)])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows that were read as the batch": lambda y: y.reshape(y.shape[1] * 2, -1).cumsum(-1).view(y.shape),
    "rows of the batch": lambda y: y.flatten(0, 1)[: y.shape[0] * 4].sum(0).expand(y.shape[0], 8, -1, -1),
    "a step of the batch": lambda y: y[:, :: y.shape[0]].sum(1, keepdim=True).expand(-1, 8, -1, -1),
    "a slice that held the batch": lambda y: (
        y.reshape(y[:2].shape[0] * y.shape[1] * 4, y[0, 0].numel() * y.shape[0] // y[:2].shape[0] // 4)
        .cumsum(1)
        .reshape(y.shape)
    ),
    "a slice that held space": lambda y: (
        y.transpose(1, 2)
        .reshape(y.shape[0] * y[:, :, :4].shape[2] * y.shape[1], -1)
        .cumsum(1)
        .reshape(y.transpose(1, 2).shape)
        .transpose(1, 2)
    ),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_numbers_that_were_a_size_in_the_capture(view: Callable[[Tensor], Tensor]) -> None:
    example = image(2, 4)
    net = randomise(Net(lambda m, x: m.out(view(m.a(x))), a=conv(3, 8), out=conv(8, 2)), (example,))
    assert_never_silent(net, [example, image(3, 4), image(2, 8, 4), image(4, 4, 8)])


def _patches(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    z = y.reshape(n * c * (h // 2), 2, w // 2, 2).transpose(1, 2).reshape(n, c, h * w // 4, 4).transpose(1, 3)
    z = z.reshape(n * 4, h * w // 4, c).softmax(1).view(n, 4, h * w // 4, c).transpose(1, 3)
    return z.reshape(n * c * (h // 2), w // 2, 2, 2).transpose(1, 2).reshape(n, c, h, w)


def _windows(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    z = y.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c).cumsum(1)
    return z.view(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c).permute(0, 3, 1, 2)


def _heads(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    q = y.flatten(2).mT.reshape(n, h * w, 2, c // 2).transpose(1, 2).reshape(n * 2, h * w, c // 2)
    mask = torch.zeros(n * 2, h * w, h * w, dtype=y.dtype)
    z = torch.baddbmm(mask, q, q.mT).softmax(-1) @ q
    return z.view(n, 2, h * w, c // 2).transpose(1, 2).reshape(n, h * w, c).mT.reshape(n, c, h, w)


def _shuffled(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    y = torch.cat([y[:, : c // 2], y[:, c // 2 :].relu()], 1)
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _as_another(y: Tensor) -> Tensor:
    return y.flatten(0, 1).flatten(1).cumsum(-1).view_as(y)


@pytest.mark.parametrize(("batch", "side"), [(1, 4), (2, 4), (1, 2), (2, 2)])
@pytest.mark.parametrize("view", [_patches, _windows, _heads, _shuffled, _as_another])
def test_usual_views_are_served_by_one_graph(view: Callable[[Tensor], Tensor], batch: int, side: int) -> None:
    example = image(batch, side)
    layers = {"a": conv(3, 8), "b": conv(8, 8), "out": conv(8, 2)}
    net = randomise(Net(lambda m, x: m.out(view(m.b(m.a(x)))), **layers), (example,))
    for seed in range(2):
        masked, slim = cut_at_random(net, example, seed)
        assert slim.plan.new_shape("a.weight")[0] < 8
        for x in (example, image(1, 4), image(3, 4), image(2, 8), image(3, 4, 8), image(1, 6, 4)):
            assert difference(_run(masked, slim.plan.kept_indices(), (x,), {}), slim(x)) <= EXACT
        assert not slim.variants.others
