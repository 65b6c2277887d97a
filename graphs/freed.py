"""``tensor.set_()``: a forward lets go of a tensor's memory, as reversible blocks do.

``Tensor.set_`` is the one method that modes of the torch API do not see. Without arguments the tensor is an empty one
from there on, and nothing else is: no other tensor of the same memory changes. So it is a value of its own in the
graph, which is dead if nobody reads it. Memory that is put into a tensor would show in the tensor's gradient and in its
version only, which a graph can't follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chase_fx.errors import CaptureError
from chase_fx.graphs.patches import Patch
from chase_fx.graphs.source import source_line

__all__ = ["setting"]


def setting(active: Callable[[], bool], let_go: Callable[[torch.Tensor], bool]) -> Patch:
    """What ``Tensor.set_`` is during a recording; ``let_go`` tells whether the tensor is one of the forward's own."""
    original: Callable[..., torch.Tensor] = torch.Tensor.set_

    def set_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not active():
            return original(tensor, *args, **kwargs)
        if args or kwargs or not let_go(tensor):
            raise CaptureError(
                f"Tensor.set_ at {source_line()} puts other memory into a tensor, or takes that of an input or of a "
                "parameter, which a graph can't follow; assign a new tensor instead, or let the memory of "
                "intermediate tensors go by set_() without arguments"
            )
        return tensor

    return torch.Tensor, "set_", set_
