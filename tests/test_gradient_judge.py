"""The judge of gradients: as tight as double precision allows, where a norm leaves nothing but rounding too."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests import gradients, nets
from tests.oracle import EXACT, randomise


class Normed(nn.Module):
    """Two layers with a norm between them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(3, 8), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.first(x)))


def pruned(norm: nn.Module, left: int, size: float) -> tuple[nn.Module, nn.Module, tuple[Tensor]]:
    """A net, the slim one whose norm has ``left`` channels, and inputs of that size."""
    torch.manual_seed(0)
    net, x = randomise(Normed(norm)), (size * torch.randn(5, 3, dtype=torch.float64),)
    traced = chase_fx.trace(net, x)
    channels = chase_fx.analyze(traced)
    return net, chase_fx.rewrite(traced, channels.plan_keeping({"first.weight:0": torch.arange(8) < left})), x


VANISHING = {"gradient first.weight", "gradient first.bias", "input 0"}


@pytest.mark.parametrize(("norm", "left", "size", "vanishing"), [
    (nn.LayerNorm, 1, 1.0, VANISHING | {"gradient norm.weight"}),
    (nn.LayerNorm, 2, 1.0, set()),
    (nn.LayerNorm, 2, 1e6, VANISHING),  # epsilon's share is 1e-17 there
    (nn.RMSNorm, 1, 1e6, VANISHING),
    (nn.RMSNorm, 2, 1.0, set()),
])  # fmt: skip
def test_a_millionth_is_caught(norm: type[nn.Module], left: int, size: float, vanishing: set[str]) -> None:
    """A gradient that is wrong by a millionth is found in every tensor.

    Where exact arithmetic gives (nearly) zero, an error of a billionth of what the gradient is made from is found.
    """
    want, have, samples = gradients.both(*pruned(norm(8), left, size), training=False)
    again = list(samples)
    assert gradients.gap(want, have, again) <= EXACT
    for name in want:
        wrong = have[name] + 1e-9 if name in vanishing else have[name] * (1 + 1e-6)
        assert gradients.gap(want, {**have, name: wrong}, again) > EXACT, name


@pytest.mark.parametrize("name", ["batch_norm", "attention", "excite"])
@pytest.mark.parametrize("training", [False, True])
def test_a_millionth_is_caught_everywhere(name: str, training: bool) -> None:
    """So in any net."""
    net, x = nets.build(name)
    slim = chase_fx.prune(net, x)
    want, have, samples = gradients.both(net, slim, x, training=training)
    again = list(samples)
    assert gradients.gap(want, have, again) <= EXACT
    for key in want:
        wrong = have[key] * (1 + 1e-6) if have[key].abs().max() > 1e-12 else have[key] + 1e-12
        assert gradients.gap(want, {**have, key: wrong}, again) > EXACT, key


def exact(x: list[float], g: list[float], eps: float) -> list[Decimal]:
    """The gradient of a layer norm's input where ``g`` is that of its output."""
    with localcontext(prec=80):
        values, given, n = [Decimal(v) for v in x], [Decimal(v) for v in g], len(x)
        mean = sum(values) / n
        rate = 1 / (sum((v - mean) ** 2 for v in values) / n + Decimal(eps)).sqrt()
        unit = [(v - mean) * rate for v in values]
        level, slope = sum(given) / n, sum(a * b for a, b in zip(given, unit, strict=True)) / n
        return [rate * (b - level - u * slope) for b, u in zip(given, unit, strict=True)]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_rounding_is_what_it_is(width: int, size: float) -> None:
    """The samples tell how wrong a layer norm's gradient is, at least and at most, next to exact arithmetic."""
    net, x = nn.LayerNorm(width).double(), size * torch.randn(7, width, dtype=torch.float64)
    rate = (x.var(1, unbiased=False) + net.eps).rsqrt().max().item()

    def learn(root: nn.Module, args: tuple[Tensor, ...], factor: float = 1.0) -> gradients.Learned:
        given = tuple(t.detach().requires_grad_() for t in args)
        return gradients.learned(root, root(*given), given, factor)

    want = learn(net, (x,))
    noise = gradients.rounding(want, gradients.resampled(net, (x,), learn))["input 0"]
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape)
    true = [exact(*pair, net.eps) for pair in zip(x.tolist(), weights.tolist(), strict=True)]
    found = want["input 0"].flatten().tolist()
    error = max(abs(float(Decimal(a) - b)) for a, b in zip(found, (b for row in true for b in row), strict=True))
    assert error <= gradients.MARGIN * noise
    assert noise <= 30 * torch.finfo(torch.float64).eps * rate  # of terms of at most 1.5 times the rate
