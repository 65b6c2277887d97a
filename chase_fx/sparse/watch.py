"""What flows through a module: recorded in the forward pass just before a channel event, and only there.

Weights alone do not show how strongly a channel speaks, nor how often a weight is used. Forward hooks on convolutions
and linear layers do, for the one step whose event needs it: a record over several steps would have to travel with
checkpoints, and a record of every step would cost time. Micro-batches of that step add up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from chase_fx.sparse.distributed import sum_over_ranks

__all__ = ["Watch"]


class Watch:
    """Records per contraction weight, while ``armed``.

    Attributes:
        armed: whether forward passes are recorded.
        inputs: weight name -> Tensor (C_in,): the sum of ``|x|`` per channel of the module's input.
        seen: weight name -> entries that each of these sums has.
        uses: weight name -> how often each weight was multiplied: output positions times images.
    """

    def __init__(self, module: nn.Module) -> None:
        self.armed = False
        self.inputs: dict[str, Tensor] = {}
        self.seen: dict[str, float] = {}
        self.uses: dict[str, float] = {}
        self._parts = {
            f"{name}.weight" if name else "weight": part
            for name, part in module.named_modules()
            if isinstance(part, (_ConvNd, nn.Linear))
        }
        self._handles: list[RemovableHandle] = [
            part.register_forward_hook(_Recorder(self, name)) for name, part in self._parts.items()
        ]

    def input_dim(self, name: str) -> int | None:
        """The dimension of the weight whose indices are the channels of the module's input; ``None``: of no one."""
        part = self._parts.get(name)
        if part is None or (isinstance(part, _ConvNd) and part.groups != 1):
            return None
        return 0 if isinstance(part, _ConvTransposeNd) else 1

    def collect(self) -> None:
        """Add up over all processes, so that every rank sees the whole batch."""
        names = list(self._parts)
        widths = [self._width(name) for name in names]
        mine = [
            torch.cat([
                self.inputs[name].double().cpu() if name in self.inputs else torch.zeros(width, dtype=torch.float64),
                torch.tensor([self.seen.get(name, 0.0), self.uses.get(name, 0.0)], dtype=torch.float64),
            ])
            for name, width in zip(names, widths, strict=True)
        ]  # fmt: skip
        total = sum_over_ranks(torch.cat(mine)) if mine else torch.zeros(0)
        for name, part in zip(names, total.split([width + 2 for width in widths]), strict=True):
            seen, uses = part[-2:].tolist()
            if uses:
                self.inputs[name], self.seen[name], self.uses[name] = part[:-2], seen, uses

    def arm(self, armed: bool) -> None:
        """Forget what was recorded, and record the forward passes that follow or not."""
        self.armed = armed
        self.inputs, self.seen, self.uses = {}, {}, {}

    def remove(self) -> None:
        """Take the hooks off the module."""
        self.armed = False
        for handle in self._handles:
            handle.remove()

    def record(self, name: str, part: nn.Module, x: Tensor, y: Tensor) -> None:
        """One forward pass of ``part``. x, y: input and output, (N, C, *spatial) or (*, C)."""
        spatial = len(part.kernel_size) if isinstance(part, _ConvNd) else 0
        width, outputs = x.shape[x.dim() - spatial - 1], y.shape[y.dim() - spatial - 1]
        others = [dim for dim in range(x.dim()) if dim != x.dim() - spatial - 1]
        total = x.detach().abs().sum(others, dtype=torch.float64) if others else x.detach().abs().double()
        self.inputs[name] = self.inputs[name] + total if name in self.inputs else total
        self.seen[name] = self.seen.get(name, 0.0) + x.numel() / width
        # A transposed convolution uses its weights once per place of its input.
        uses = x.numel() / width if isinstance(part, _ConvTransposeNd) else y.numel() / outputs
        self.uses[name] = self.uses.get(name, 0.0) + uses

    def _width(self, name: str) -> int:
        part = self._parts[name]
        dim = 0 if isinstance(part, _ConvTransposeNd) else 1
        groups = part.groups if isinstance(part, _ConvNd) and dim == 1 else 1
        return math.prod((part.weight.shape[dim], groups))


class _Recorder:
    """A forward hook; copies of the module get a silent one."""

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.watch.armed and part.training and args and isinstance(args[0], Tensor):
            self.watch.record(self.name, part, args[0], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Silent:
        return _Silent()


class _Silent:
    """What the hook is in copies of the module (averages, slim copies): their passes are not the training's."""

    def __call__(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record nothing."""
