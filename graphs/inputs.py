"""The inputs of a capture: bound to the forward's signature, checked, and made fresh."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from chase_fx.errors import CaptureError, DeviceMismatchError, NothingToPruneError
from chase_fx.graphs.arguments import NO_DEFAULT, Arguments
from chase_fx.graphs.trees import tensors_in

__all__ = ["add_inputs", "as_tuple", "bind", "check_devices", "faked", "shapes"]


def as_tuple(args: Any) -> tuple[Any, ...]:
    """Positional arguments as ``trace`` takes them: a tuple, a list, or a single value."""
    if isinstance(args, tuple):
        return args
    return tuple(args) if isinstance(args, list) else (args,)


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments by the names of the forward's signature."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is compiled by TorchScript, which hides its operations; trace the Python model"
        )
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise CaptureError(
            f"the example inputs don't fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {e}"
        ) from e


def check_devices(model: nn.Module, inputs: Any) -> torch.device | None:
    """The device of the model, ``None`` if it has several; inputs that hold nothing are refused."""
    state = list(model.parameters())
    if not state:
        raise NothingToPruneError(f"{type(model).__name__} has no parameters, so there is nothing to prune")
    sizes = [t.numel() for t in tensors_in(inputs)]
    if sizes and not any(sizes):
        raise CaptureError(
            "the example inputs hold no element, and torch takes other ways then; give at least one sample"
        )
    home = {t.device for t in state}
    given = {t.device for t in tensors_in(inputs)}
    # Zero-dim tensors may live anywhere; more than one home is a model split over devices, which knows its own ways.
    if len(home) == 1 and given and not given & home:
        raise DeviceMismatchError(
            f"{type(model).__name__} is on {next(iter(home))} but its example inputs are on "
            f"{', '.join(sorted(map(str, given)))}; move one of them with .to()"
        )
    return next(iter(home)) if len(home) == 1 else None


def faked(fake: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout without data.

    A meta tensor has no real device, so tensors that the code makes would mix devices: its fake one claims the CPU.
    """
    device = torch.device("cpu") if value.is_meta else value.device
    with fake:
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return nn.Parameter(tensor, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else tensor


def add_inputs(
    arguments: Arguments,
    fake: FakeTensorMode | None,
    bound: inspect.BoundArguments,
    positional: int,
    guard: Callable[..., Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Placeholders for the whole signature, and the arguments to call the forward with.

    What was given by position stays by position, keywords stay keywords, and what was not given is not passed, for
    decorators of the forward may look at that. Tensors are aliased, so that no two arguments are the same object.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    nodes: list[tuple[Any, Node, str]] = []
    for name, parameter in bound.signature.parameters.items():
        given = name in bound.arguments
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            value = _fresh(bound.arguments.get(name, ()), fake)
            nodes.append((value, arguments.add_input(f"*{name}", NO_DEFAULT), name))
            args.extend(value)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            value = _fresh(bound.arguments.get(name, {}), fake)
            nodes.append((value, arguments.add_input(f"**{name}", NO_DEFAULT), name))
            kwargs.update(value)
        else:
            value = _fresh(bound.arguments.get(name, parameter.default), fake)
            default = NO_DEFAULT if parameter.default is inspect.Parameter.empty else parameter.default
            nodes.append((value, arguments.add_input(name, default), name))
            if given and parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(args) < positional:
                args.append(value)
            elif given:
                kwargs[name] = value
    for value, node, name in nodes:
        arguments.bind_input(value, node, name, guard)
    return tuple(args), kwargs


def _fresh(value: Any, fake: FakeTensorMode | None) -> Any:
    if isinstance(value, torch.Tensor):
        if fake is not None:
            value = faked(fake, value)
        return value.detach().clone()  # a forward may write to its inputs
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_fresh(v, fake) for v in value))
    if type(value) in (tuple, list):
        return type(value)(_fresh(v, fake) for v in value)
    if type(value) is dict:
        return {k: _fresh(v, fake) for k, v in value.items()}
    return value


def shapes(bound: inspect.BoundArguments) -> str:
    """The inputs in short, for messages."""
    parts = []
    for name, value in bound.arguments.items():
        found = [str(tuple(t.shape)) for t in tensors_in(value)]
        parts.append(f"{name}: {', '.join(found)}" if found else f"{name}={value!r}")
    return "; ".join(parts)
