"""What a forward wrote to, as it was before the capture: parameters, and tensors that modules hold as attributes.

The graph writes likewise in every call, so the capture must not count as one. A tensor that nobody holds may be made
anew in every call (from an array, say) or be a global variable, which no capture tells apart: writing to that is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from chase_fx.errors import CaptureError
from chase_fx.graphs.tape import Tape
from chase_fx.graphs.trees import SEQUENCES
from chase_fx.graphs.walk import held_by

__all__ = ["restore", "tensors_of"]


def restore(root: nn.Module, model: nn.Module | None, tape: Tape, constants: Mapping[str, torch.Tensor]) -> None:
    """Give what the forward of ``root`` wrote to the values that it has in ``model``, of which ``root`` is a copy.

    Without a ``model`` there are no values.

    Raises:
        CaptureError: the forward wrote to a tensor that neither is computed in it nor held by a module.
    """
    writers = [op for op in tape.ops if op.op._schema.is_mutable]
    if model is None or not writers:
        return
    storages = {slot.storage for op in writers for slot in op.writes()}
    written = {slot.name for slot in tape.slots if slot.kind == "parameter" and slot.storage in storages}
    with torch.no_grad():
        for name in map(str, written):
            root.get_parameter(name).copy_(model.get_parameter(name))
        memory = {_memory(tape.tensor_of(slot)): op for op in writers for slot in op.writes()} if constants else {}
        for tensor in constants.values():
            op = memory.get(_memory(tensor)) if tensor.numel() else None
            if op is not None:
                tensor.copy_(_original(tensor, root, model, op.source))


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor lies: an array and what is made of it share no more than that."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse ones have none
        return id(tensor)


def tensors_of(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """The tensors in an attribute, also those that an object in it has as attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (type, nn.Module)):
        inside = value if isinstance(value, (dict, *SEQUENCES)) else held_by(value)
        for item in inside.values() if isinstance(inside, dict) else inside:
            yield from tensors_of(item, depth - 1)


def _original(tensor: torch.Tensor, root: nn.Module, model: nn.Module, line: str) -> torch.Tensor:
    """What a tensor, which a module of ``root`` holds, is in ``model``."""
    modules = dict(model.named_modules())
    for name, module in root.named_modules():
        for attribute, value in vars(module).items():
            held = vars(modules[name]).get(attribute) if name in modules else None
            for own, before in zip(tensors_of(value), tensors_of(held), strict=False):
                if own is tensor:
                    return before
    raise CaptureError(
        f"the forward writes at {line} to a tensor of shape {tuple(tensor.shape)} that no torch operation made and no "
        "module holds, so it may be another one in every call; write to a clone of it, or make it a buffer"
    )
