"""Parts of the small nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import Case

Builder = Callable[[], Case]

IMAGE = (2, 3, 16, 16)
TOKENS = (2, 9, 20)


def shape(make: Builder) -> Builder:
    """Mark a builder as a member of the corpus."""
    make.is_shape = True  # type: ignore[attr-defined]
    return make


def randn(*size: int) -> Tensor:
    """Inputs in single precision; the judge makes them double."""
    return torch.randn(*size)


class _Net(nn.Module):
    def __init__(self, parts: dict[str, nn.Module | Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


def Net(run: Callable[..., Any], **parts: nn.Module | Tensor) -> nn.Module:
    """A module from parts, and a function of it and its inputs for its forward."""
    return type("Net", (_Net,), {"forward": run})(parts)


def parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size) * 0.2)


def conv_bn(i: int, o: int, k: int = 3, **kw: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


def head(width: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
