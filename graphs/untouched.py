"""Whether a capture, which runs copies of a model, left the model itself alone.

What a copy can't reach is what functions reach by global names: a hook that writes to ``RESULTS``, which the model
holds as an attribute. The copy then reads another container than the hook writes to, and finds what was left there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from chase_fx.errors import CaptureError
from chase_fx.graphs.restored import tensors_of
from chase_fx.graphs.walk import modules_of

__all__ = ["check_untouched", "held_tensors"]

_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset({type(None), bool, int, float, str, tuple, type})


def held_tensors(model: nn.Module) -> dict[str, list[Any]]:
    """The tensors that the modules hold in attributes, other than parameters and buffers, by the attribute."""
    found: dict[str, list[Any]] = {}
    seen: set[int] = set()  # a configuration is the same object in every module
    for owner, module in modules_of(model):
        for name, value in module.__dict__.items():
            if name not in _OWN and type(value) not in _PLAIN and id(value) not in seen:
                seen.add(id(value))
                found[f"{owner}.{name}" if owner else name] = list(tensors_of(value))
    return found


def check_untouched(model: nn.Module, before: Mapping[str, list[Any]], copy: nn.Module) -> None:
    """Refuse a model that holds other tensors than ``before``, unless its ``copy`` has the very same object.

    Raises:
        CaptureError: it does.
    """
    now = held_tensors(model)
    changed = [path for path in now if list(map(id, now[path])) != list(map(id, before.get(path, [])))]
    modules, copies = (dict(modules_of(root)) if changed else {} for root in (model, copy))
    for path in changed:
        owner, _, name = path.rpartition(".")
        if owner not in copies or copies[owner].__dict__.get(name) is not modules[owner].__dict__[name]:
            raise CaptureError(
                f"the forward changes '{path}' of the model by another way than through self (a global variable that "
                "is the same object), so a copy of the model reads something else; let hooks and functions reach it "
                "through the module"
            )
