"""Whether a slim module learns as the masked dense model does: outputs, gradients and statistics, in either mode.

Parameters and inputs of the slim module must get the gradients of the kept slices of a dense model whose removed
slices are zero (:mod:`tests.kept_means`), and its buffers must become the kept slices of the dense one's.

Every tensor is measured by its own largest value. A gradient can be nothing but rounding, though: a norm of one channel
passes none on, a softmax gives none to what all of its numbers have in common, and what two channels pass through their
norm is the share of its epsilon. No number says there which of two gradients is right, so the reference tells how far
rounding alone moves it: it runs again with every weight and input moved by its last bit, and with a loss that is scaled
by a number whose products are rounded, which cancels in exact arithmetic. That samples the rounding of the forward (a
rounded sum of products is the sum of other factors) and of the backward, inside of every kernel. What is no further
away than a few times that is as right as double precision can tell; anything else is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.kept_means import masked_run, seed
from tests.oracle import EXACT, tensors

__all__ = ["MARGIN", "both", "gap", "learned", "resampled", "rounding", "slim_gap"]

Learned = dict[str, Tensor]

FACTORS = tuple(1.1 + 0.027 * k for k in range(32))  # of the loss; none is a power of two
MARGIN = 10.0  # times the largest of the samples, which are taken until all gradients are explained


def gap(want: Mapping[str, Tensor], have: Mapping[str, Tensor], again: Iterable[Learned] = ()) -> float:
    """Largest difference between tensors of the same name, relative to the largest value of that tensor.

    Differences of all but the outputs that are no larger than :data:`MARGIN` times the reference's own rounding count
    as none. ``again`` is ``want`` rounded in other ways, which is asked for only where something differs.
    """
    assert set(want) == set(have), f"only on one side: {sorted(set(want) ^ set(have))[:5]}"
    for name, tensor in want.items():
        assert tensor.shape == have[name].shape, f"{name}: {have[name].shape}, expected {tensor.shape}"
    found = {n: (_largest(want[n] - have[n]), _largest(want[n])) for n in want}
    wrong = {n for n, (difference, scale) in found.items() if difference > EXACT * scale}
    noise = dict.fromkeys(wrong, 0.0)
    if any(not n.startswith("output ") for n in wrong):
        for other in again:
            noise = {n: max(noise[n], _largest(want[n] - other[n])) for n in wrong}
            wrong = {n for n in wrong if n.startswith("output ") or found[n][0] > MARGIN * noise[n]}
            if not wrong:
                break
    counted = wrong or {n for n, (difference, scale) in found.items() if difference <= EXACT * scale}
    return max((found[n][0] / max(found[n][1], 1e-300) for n in counted), default=0.0)


def rounding(want: Mapping[str, Tensor], again: Iterable[Learned]) -> dict[str, float]:
    """How far each tensor is at most from the same one rounded in other ways."""
    found = dict.fromkeys(want, 0.0)
    for other in again:
        for name, tensor in want.items():
            found[name] = max(found[name], _largest(tensor - other[name]))
    return found


def _largest(tensor: Tensor) -> float:
    return tensor.abs().nan_to_num(nan=torch.inf).max().item() if tensor.numel() else 0.0


def learned(root: nn.Module, result: Any, inputs: tuple[Any, ...], factor: float = 1.0) -> Learned:
    """Outputs of a forward, the gradients of a weighted sum of them, and the buffers that it left behind.

    The sum is scaled by ``factor``, which the gradients are then divided by.
    """
    outs = [t for t in tensors(result) if t.requires_grad]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outs)
    given = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    named = dict(root.named_parameters())
    gradients = torch.autograd.grad(factor * loss, [*named.values(), *given], allow_unused=True)
    found = {f"output {i}": t.detach() for i, t in enumerate(outs)}
    for name, gradient in zip([*named, *(f"input {i}" for i in range(len(given)))], gradients, strict=True):
        if gradient is not None:
            found[name if name.startswith("input ") else f"gradient {name}"] = gradient / factor
    floats = {n: b for n, b in root.named_buffers() if b.is_floating_point() and "_chase_constant" not in n}
    return {**found, **{f"buffer {n}": b.detach().clone() for n, b in floats.items()}}


def resampled(
    model: nn.Module, args: tuple[Any, ...], learn: Callable[[nn.Module, tuple[Any, ...], float], Learned]
) -> Iterator[Learned]:
    """What ``learn(model, args, factor)`` gives where everything is rounded in other ways. ``model`` stays as it is."""
    generator = torch.Generator().manual_seed(1)

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        step = 2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1
        return t.detach() * (1 + torch.finfo(t.dtype).eps * step)

    for factor in FACTORS:
        near = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in (*near.parameters(), *near.buffers()):
                tensor.copy_(moved(tensor))
        yield learn(near, tuple(map(moved, args)), factor)


def slim_gap(model: nn.Module, slim: nn.Module, args: tuple[Any, ...], *, training: bool) -> float:
    """How far the slim module is from the masked dense one; neither is changed."""
    return gap(*both(copy.deepcopy(model), copy.deepcopy(slim), args, training=training))


def both(
    model: nn.Module, slim: nn.Module, args: tuple[Any, ...], *, training: bool
) -> tuple[Learned, Learned, Iterator[Learned]]:
    """What the masked dense module learns, what the slim one does, and the former rounded in other ways.

    Both modules are left in that mode, and the slim one with what it learned in its buffers.
    """
    model.train(training)
    slim.train(training)

    def masked(root: nn.Module, args: tuple[Any, ...], factor: float = 1.0) -> Learned:
        return _masked(root, slim, _leaves(args), factor)

    want, given = masked(model, args), _leaves(args)
    seed()
    return want, learned(slim, slim(*given), given), resampled(model, args, masked)


def _leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in args)


def _masked(model: nn.Module, slim: nn.Module, args: tuple[Any, ...], factor: float) -> Learned:
    """What the masked dense model learns, cut to the kept slices."""
    result, masked = masked_run(model, slim, args, {})
    want, kept = learned(masked, result, args, factor), slim.plan.kept_indices()
    for key in want:
        kind, _, name = key.partition(" ")
        for dim, indices in enumerate(kept[name] if kind in ("gradient", "buffer") else ()):
            if indices is not None:
                want[key] = want[key].index_select(dim, indices)
    return want
