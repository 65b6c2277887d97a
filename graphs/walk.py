"""The modules and tensors of a model as flat lists.

``nn.Module`` gives them by generators nested as deep as the modules are, and a capture asks for them many times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Modules", "buffers_in", "held_by", "modules_of", "parameters_in"]

Modules = list[tuple[str, nn.Module]]


def modules_of(root: nn.Module) -> Modules:
    """``root.named_modules(remove_duplicate=False)``."""
    found: Modules = [("", root)]
    _add_children(found, "", root)
    return found


def _add_children(found: Modules, prefix: str, module: nn.Module) -> None:
    for key, child in module._modules.items():
        if child is not None:
            name = prefix + key
            found.append((name, child))
            if child._modules:
                _add_children(found, name + ".", child)


def parameters_in(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """``root.named_parameters(remove_duplicate=False)``."""
    return {_join(owner, name): p for owner, m in modules for name, p in m._parameters.items() if p is not None}


def buffers_in(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, torch.Tensor]:
    """``root.named_buffers(remove_duplicate=False)``."""
    return {_join(owner, name): b for owner, m in modules for name, b in m._buffers.items() if b is not None}


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def held_by(value: Any) -> dict[str, Any]:
    """What an object has in its ``__dict__``; its own ``__getattr__`` may fail with any error, and is not asked."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return held if isinstance(held, dict) else {}
