"""An oracle for pruned models that knows no labels.

It needs the original module and the kept indices of each parameter, nothing else: the removed slices are set to zero in
a copy of the dense model, and normalisation layers see kept channels only. What that copy computes is what the slim
module has to compute.

A signal that has lost nine tenths of its channels in each of fifty layers is gone, and a slim module could then agree
by its last bias alone. So the comparison is made twice: with the weights as they are, and with weights that are
rescaled, layer by layer in both modules alike, until the signal that is left has unit variance everywhere.

A layer norm, group norm or RMS norm is recognised by its weight, whose kept indices tell which channels exist; a norm
without weight can't be judged this way.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

EXACT = 1e-9
Kept = Mapping[str, tuple[Tensor | None, ...]]


def randomise(model: nn.Module, args: tuple[Any, ...] | None = None, seed: int = 0) -> nn.Module:
    """Make every tensor of ``model`` matter, in place, and put it in double precision and eval mode.

    Gammas and layer scales get a sign and a size, biases and whatever was initialised with zeros or ones gets values of
    the scale of its surroundings. With ``args`` the batch statistics are those of the signal, so that it neither
    vanishes nor explodes on its way, and then moved a little.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def gamma(shape: torch.Size) -> Tensor:
        sign = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
        return sign * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))

    model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
                if (name == "weight" and parameter.dim() == 1) or "scale" in name or name == "gamma":
                    parameter.copy_(gamma(parameter.shape))
                elif parameter.dim() <= 1:
                    parameter.copy_(normal(parameter.shape, 0.3))
                elif constant:
                    parameter.copy_(normal(parameter.shape, parameter[0].numel() ** -0.5))
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(normal(module.running_mean.shape, 0.3))
                module.running_var.copy_(gamma(module.running_var.shape).abs())
        if args is not None:
            _calibrate(model, args)
            for module in model.modules():
                if isinstance(module, _BatchNorm) and module.running_mean is not None:
                    spread = module.running_var.sqrt()
                    module.running_mean.add_(normal(spread.shape, 0.2) * spread)
                    module.running_var.mul_(gamma(spread.shape).abs())
                    module.num_batches_tracked.fill_(3)
    return model


def _calibrate(model: nn.Module, args: tuple[Any, ...]) -> None:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return
    momentum = [m.momentum for m in norms]
    rng = torch.get_rng_state()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        model(*args)
    finally:  # also for a model that double precision stops
        model.eval()
        for norm, value in zip(norms, momentum, strict=True):
            norm.momentum = value
            norm.running_var.add_(1e-3)
        torch.set_rng_state(rng)


def masked_copy(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of ``model`` in which the removed slices of each parameter are zero."""
    masked = copy.deepcopy(model)
    for own, module in zip(masked.modules(), model.modules(), strict=True):
        own.training = module.training  # a copy of a feature extractor comes in train mode
    names = {name for name, _ in masked.named_parameters(remove_duplicate=False)}
    assert names <= set(kept), "kept_indices() must name every parameter"
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            for dim, indices in enumerate(kept[name]):
                if indices is not None:
                    gone = torch.ones(parameter.shape[dim], dtype=torch.bool, device=parameter.device)
                    gone[indices] = False
                    parameter.index_fill_(dim, gone.nonzero().flatten(), 0)
    return masked


class _KeptNorms(TorchFunctionMode):
    """Norm layers see the kept channels of their own weight."""

    def __init__(self, model: nn.Module, kept: Kept) -> None:
        super().__init__()
        self.kept = {id(p): kept[name] for name, p in model.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        norm = {F.layer_norm: _layer_norm, F.rms_norm: _rms_norm, F.group_norm: _group_norm}.get(func)
        if norm is None:
            return func(*args, **kwargs)
        return norm(self.kept, *args, **kwargs)


def _layer_norm(  # noqa: PLR0917  (the arguments of F.layer_norm)
    kept: Mapping[int, Any], x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    (indices,) = kept[id(weight)]
    if indices is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    few = F.layer_norm(x[..., indices], (len(indices),), weight[indices], None if bias is None else bias[indices], eps)
    return torch.zeros_like(x).index_copy(-1, indices, few)


def _rms_norm(kept: Mapping[int, Any], x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    (indices,) = kept[id(weight)]
    if indices is None:
        return F.rms_norm(x, shape, weight, eps)
    return torch.zeros_like(x).index_copy(
        -1, indices, F.rms_norm(x[..., indices], (len(indices),), weight[indices], eps)
    )


def _group_norm(  # noqa: PLR0917  (the arguments of F.group_norm)
    kept: Mapping[int, Any], x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    (indices,) = kept[id(weight)]
    if indices is None:
        return F.group_norm(x, groups, weight, bias, eps)
    width = x.shape[1] // groups
    out = torch.zeros_like(x)
    for group in range(groups):  # every group on its own: no assumption that they are left equally wide
        own = indices[indices // width == group]
        if len(own):
            few = F.group_norm(x[:, own], 1, weight[own], None if bias is None else bias[own], eps)
            out = out.index_copy(1, own, few)
    return out


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


class UninformativeError(AssertionError):
    """An output that would agree with anything: near zero, constant, or the same for every sample."""


def assert_informative(value: Any) -> None:
    """Each output is finite, far from zero, and differs between samples and within one."""
    for out in tensors(value):
        if not out.isfinite().all():
            raise UninformativeError("the output is not finite")
        scale = out.abs().max().item()
        if scale < 1e-3:
            raise UninformativeError(f"the output is near zero ({scale})")
        if out[0].numel() > 1 and out.flatten(1).std(1).min() < 1e-3 * scale:
            raise UninformativeError("the output is constant within a sample")
        if len(out) < 2 or out.std(0).max() < 1e-2 * scale:
            raise UninformativeError("the output is the same for every sample")


def difference(expected: Any, found: Any, *, centred: bool = False) -> float:
    """Largest difference of any output, relative to its largest absolute value.

    With ``centred`` relative to what is left of it after the mean over the samples is taken off.
    """
    worst = 0.0
    for want, have in zip(list(tensors(expected)), list(tensors(found)), strict=True):
        assert want.shape == have.shape, f"output {tuple(have.shape)}, expected {tuple(want.shape)}"
        assert want.dtype == have.dtype == torch.float64
        scale = (want - want.mean(0) if centred else want).abs().max().clamp_min(1e-12)
        worst = max(worst, ((want - have).abs().max() / scale).item())
    return worst


def assert_exact(
    model: nn.Module, slim: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> None:
    """``slim`` in eval mode computes what ``model`` computes without the units that the plan removes.

    Both must be in eval mode; ``slim`` gets its weights and statistics back.
    """
    kwargs = kwargs or {}
    assert not model.training
    assert not slim.training
    home = next(slim.parameters()).device
    kept = {n: tuple(i if i is None else i.to(home) for i in dims) for n, dims in slim.plan.kept_indices().items()}
    masked = masked_copy(model, kept)
    own = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    with torch.no_grad():
        expected, found = _run(masked, kept, args, kwargs), slim(*args, **kwargs)
        assert type(found) is type(expected)
        worst = difference(expected, found)
        assert worst <= EXACT, f"the slim module differs by {worst:.1e}"
        _amplify(masked, kept, args, kwargs)
        try:
            dense = masked.state_dict()
            slim.load_state_dict({name: _slice(dense[name], kept[name]) for name in own})
            expected, found = _run(masked, kept, args, kwargs), slim(*args, **kwargs)
            assert_informative(expected)
            worst = difference(expected, found, centred=True)
            assert worst <= EXACT, f"the slim module differs by {worst:.1e} once the signal is amplified"
        finally:
            slim.load_state_dict(own)


def _slice(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    for dim, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(dim, indices)
    return tensor


def _run(masked: nn.Module, kept: Kept, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with torch.no_grad(), _KeptNorms(masked, kept):
        return masked(*args, **kwargs)


def _amplify(masked: nn.Module, kept: Kept, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Rescale each contraction, and set the statistics of each batch norm, so that the signal has unit variance."""
    done: set[nn.Module] = set()

    def rescale(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        if module in done:  # shared by several layers
            return None
        done.add(module)
        dim = -1 if isinstance(module, nn.Linear) else 1
        others = [d for d in range(out.dim()) if d != dim % out.dim()]
        if module.bias is not None:
            # A removed channel has a mean of zero, and so keeps its zero bias.
            mean = out.mean(others)
            module.bias.sub_(0.9 * mean)
            out = out - 0.9 * mean.view([-1 if d == dim % out.dim() else 1 for d in range(out.dim())])
        alive = out.abs().amax(others) > 0
        scale = out.movedim(dim, -1)[..., alive].std().item() if alive.any() else 0.0
        if scale > 0:
            module.weight.div_(scale)
            if module.bias is not None:
                module.bias.div_(scale)
            return out / scale
        return out

    def measure(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module not in done:
            done.add(module)
            (x,) = inputs
            others = [d for d in range(x.dim()) if d != 1]
            module.running_mean.copy_(x.mean(others))
            module.running_var.copy_(x.var(others, unbiased=False) + 1e-3)

    handles = []
    for module in masked.modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            handles.append(module.register_forward_hook(rescale))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(measure))
    _run(masked, kept, args, kwargs)
    for handle in handles:
        handle.remove()
