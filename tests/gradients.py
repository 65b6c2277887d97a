"""Whether a slim module learns as the masked dense model does: outputs, gradients and statistics, in either mode.

Parameters and inputs of the slim module must get the gradients of the kept slices of a dense model whose removed
slices are zero (:mod:`tests.kept_means`), and its buffers must become the kept slices of the dense one's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.kept_means import masked_run
from tests.oracle import EXACT, tensors

__all__ = ["gap", "learned", "slim_gap"]

Learned = dict[str, Tensor]


def gap(want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> float:
    """Largest difference between tensors of the same name, relative to the largest value of all of their kind."""
    assert set(want) == set(have), f"only on one side: {sorted(set(want) ^ set(have))[:5]}"
    worst = 0.0
    for kind in ("output", "gradient", "buffer", "input"):
        names = [n for n in want if n.startswith(kind + " ")]
        scale = max((want[n].abs().max().item() for n in names if want[n].numel()), default=0.0)
        for name in names:
            assert want[name].shape == have[name].shape, f"{name}: {have[name].shape}, expected {want[name].shape}"
            if want[name].numel():
                worst = max(worst, (want[name] - have[name]).abs().max().item() / max(scale, 1e-9))
    return worst


def learned(root: nn.Module, result: Any, inputs: tuple[Any, ...]) -> Learned:
    """Outputs of a forward, the gradients of a weighted sum of them, and the buffers that it left behind."""
    outs = [t for t in tensors(result) if t.requires_grad]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outs)
    given = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    named = dict(root.named_parameters())
    gradients = torch.autograd.grad(loss, [*named.values(), *given], allow_unused=True)
    found = {f"output {i}": t.detach() for i, t in enumerate(outs)}
    for name, gradient in zip([*named, *(f"input {i}" for i in range(len(given)))], gradients, strict=True):
        if gradient is not None:
            found[name if name.startswith("input ") else f"gradient {name}"] = gradient
    floats = {n: b for n, b in root.named_buffers() if b.is_floating_point() and "_chase_constant" not in n}
    return {**found, **{f"buffer {n}": b.detach().clone() for n, b in floats.items()}}


def slim_gap(model: nn.Module, slim: nn.Module, args: tuple[Any, ...], *, training: bool) -> float:
    """How far the slim module is from the masked dense one; neither is changed.

    A gradient can amplify rounding a millionfold where little is left (a norm of one channel). So a difference that is
    no larger than ten times what rounding of the inputs does to the reference itself counts as none.
    """
    want = _masked(model, slim, args, training)
    thin = copy.deepcopy(slim).train(training)
    args = _leaves(args)
    torch.manual_seed(3)
    found = gap(want, learned(thin, thin(*args), args))
    if found <= EXACT:
        return found
    nearly = tuple(t * (1 + 1e-15 * torch.randn_like(t)) if t.is_floating_point() else t for t in args)
    rounding = gap(want, _masked(model, slim, nearly, training))
    return 0.0 if found <= min(10 * rounding, 1e-3) else found


def _leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in args)


def _masked(model: nn.Module, slim: nn.Module, args: tuple[Any, ...], training: bool) -> Learned:
    """What the masked dense model learns, cut to the kept slices."""
    model, slim = (copy.deepcopy(m).train(training) for m in (model, slim))
    args = _leaves(args)
    torch.manual_seed(3)
    result, masked = masked_run(model, slim, args, {})
    want, kept = learned(masked, result, args), slim.plan.kept_indices()
    for key in want:
        kind, _, name = key.partition(" ")
        for dim, indices in enumerate(kept[name] if kind in ("gradient", "buffer") else ()):
            if indices is not None:
                want[key] = want[key].index_select(dim, indices)
    return want
