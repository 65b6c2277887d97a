"""The inputs of a capture: bound to the forward's signature, checked, and made fresh."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.nn.parameter import is_lazy

from chase_fx.errors import ArgumentError, CaptureError, DeviceMismatchError, NothingToPruneError
from chase_fx.graphs.alone import alone
from chase_fx.graphs.arguments import NO_DEFAULT, Arguments
from chase_fx.graphs.binding import bind_default, bind_input, default_of
from chase_fx.graphs.trees import holds_tensor, map_tensors, tensors_in
from chase_fx.graphs.walk import modules_of, parameters_in

__all__ = ["Blank", "add_inputs", "check_devices", "check_model", "faked", "given", "shapes"]

Blank = Callable[[torch.Tensor], torch.Tensor]
Bind = Callable[[Arguments, Any, Node, str], None]


def given(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any], inspect.BoundArguments]:
    """Positional arguments (a tuple, a list, or a single value), keyword arguments, and both by name."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentError(f"kwargs must be a mapping from names to inputs, found {type(kwargs).__name__}")
    positional = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    keywords = dict(kwargs or {})
    try:
        return positional, keywords, inspect.signature(model.forward).bind(*positional, **keywords)
    except TypeError as e:
        raise CaptureError(
            f"the example inputs don't fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {e}"
        ) from e


def check_model(model: Any) -> None:
    """Refuses what is no module, and modules of which no copy with a shape and Python code can be had."""
    if not isinstance(model, nn.Module):
        call = f"; call it to make one: {model.__name__}(...)" if isinstance(model, type) else ""
        raise ArgumentError(f"model must be a torch.nn.Module, found {type(model).__name__}{call}")
    for name, module in modules_of(model):
        of = f"'{name}' of {type(model).__name__}" if name else type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{of} is compiled by TorchScript, which hides its operations; trace the Python model, not compiled"
            )
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                raise CaptureError(
                    f"'{own}' of {of} ({type(module).__name__}) has no shape before its first forward; "
                    "call the model once on its inputs, then trace it"
                )


def check_devices(model: nn.Module, inputs: Any) -> torch.device | None:
    """The device of the model, ``None`` if it has several; inputs that hold nothing are refused."""
    state = list(parameters_in(modules_of(model)).values())
    if not state:
        raise NothingToPruneError(f"{type(model).__name__} has no parameters, so there is nothing to prune")
    if any(t.is_nested for t in tensors_in(inputs)):
        raise CaptureError("nested tensors hold no sizes to follow; give the example inputs padded to one size")
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
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def add_inputs(
    arguments: Arguments,
    blank: Blank | None,
    bound: inspect.BoundArguments,
    positional: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Placeholders for the whole signature, and the arguments to call the forward with.

    What was given by position stays by position, keywords stay keywords, and what was not given is not passed, for
    decorators of the forward may look at that. Tensors are aliased, so that no two arguments are the same object. Where
    there is no data, ``blank`` makes a tensor of the layout of another.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    nodes: list[tuple[Any, Node, str, Bind]] = []
    for name, parameter in bound.signature.parameters.items():
        given = name in bound.arguments
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            value = _fresh(bound.arguments.get(name, ()), blank)
            nodes.append((value, arguments.add_input(f"*{name}", NO_DEFAULT), f"*{name}", bind_input))
            args.extend(value)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            value = _fresh(bound.arguments.get(name, {}), blank)
            nodes.append((value, arguments.add_input(f"**{name}", NO_DEFAULT), f"**{name}", bind_input))
            kwargs.update(value)
        else:
            default = NO_DEFAULT if parameter.default is inspect.Parameter.empty else parameter.default
            value = _fresh(bound.arguments[name], blank) if given else default
            node = arguments.add_input(name, default_of(default))
            nodes.append((value, node, name, bind_input if given else bind_default))
            if given and parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(args) < positional:
                args.append(value)
            elif given:
                kwargs[name] = value
    for value, node, name, bind in sorted(nodes, key=lambda found: not holds_tensor(found[0])):
        bind(arguments, value, node, name)  # tensors first: a device may be that of one
    return tuple(args), kwargs


def _fresh(value: Any, blank: Blank | None) -> Any:
    """``value`` with tensors of its own, for a forward may write to its inputs."""
    return map_tensors(value, lambda tensor: alone(tensor if blank is None else blank(tensor)))


def shapes(bound: inspect.BoundArguments) -> str:
    """The inputs in short, for messages."""
    parts = []
    for name, value in bound.arguments.items():
        found = [str(tuple(t.shape)) for t in tensors_in(value)]
        parts.append(f"{name}: {', '.join(found)}" if found else f"{name}={value!r}")
    return "; ".join(parts)
