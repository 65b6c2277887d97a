"""Random numbers while a slim graph is compared with the masked dense one.

Dropout that is on in eval mode, or noise of the size of an activation, draws fewer numbers in a slim graph, so the two
runs would see different ones. Both get the same value in every place instead: a dropout keeps everything, noise is a
constant of its distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ConstantDraws"]

aten = torch.ops.aten


def _dropout(x: torch.Tensor, p: float, train: bool | None = True) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


def _normal(x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> torch.Tensor:
    return x.fill_(mean + 0.6 * std)


def _uniform(x: torch.Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> torch.Tensor:
    return x.fill_(low + 0.6 * (high - low))


def _exponential(x: torch.Tensor, rate: float = 1.0, **_: Any) -> torch.Tensor:
    return x.fill_(1.0 / rate)


def _kept(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.fill_(1)


_DRAWS: dict[Any, Callable[..., Any]] = {
    aten.native_dropout: _dropout,
    aten.normal_: _normal,
    aten.uniform_: _uniform,
    aten.exponential_: _exponential,
    aten.bernoulli_: _kept,
}


class ConstantDraws(TorchDispatchMode):
    """Replaces draws by constants. Goes outside of other modes, which see the calls first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _DRAWS.get(func.overloadpacket, func)(*args, **(kwargs or {}))
