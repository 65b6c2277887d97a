"""Old constructors of tensors, ``torch.FloatTensor(n, c)``, which read numbers without asking them."""

from __future__ import annotations

import types
from typing import Any

import torch

from chase_fx.graphs.live import is_live

__all__ = ["CONSTRUCTORS", "TORCH", "sizes_of_new"]


def _has_live(value: Any) -> bool:
    """Whether a number, or one in nested lists of numbers, is live."""
    return any(map(_has_live, value)) if isinstance(value, (list, tuple)) else is_live(value)


class _Constructor:
    """An old constructor of tensors: live sizes, ``torch.FloatTensor(n, c)``, go to ``torch.empty``.

    Live numbers in a list, ``torch.LongTensor([n])``, go to ``torch.tensor``.
    """

    def __init__(self, cls: Any) -> None:
        self._cls = cls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sizes = args[0] if len(args) == 1 and isinstance(args[0], torch.Size) else args
        dtype = torch.get_default_dtype() if self._cls is torch.Tensor else self._cls.dtype
        if kwargs or not any(map(_has_live, sizes)):
            return self._cls(*args, **kwargs)
        if len(args) == 1 and isinstance(args[0], (list, tuple)) and sizes is args:
            return torch.tensor(args[0], dtype=dtype, device="cpu")
        return torch.empty(*sizes, dtype=dtype, device="cpu")

    def __getattr__(self, name: str) -> Any:  # ``torch.Tensor.add(x, y)``
        return getattr(self._cls, name)


def sizes_of_new(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The sizes in ``x.new(...)``, which is ``x.new_empty(sizes)`` then; none where it is given data."""
    sizes = args[1] if len(args) == 2 and isinstance(args[1], torch.Size) else args[1:]
    return tuple(sizes) if not kwargs and all(isinstance(size, int) for size in sizes) else None


class _Torch(types.ModuleType):
    """The names of torch, as they are at any time, but for what is set here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_NAMES = [
    f"{kind}Tensor" for kind in ("", "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Bool")
]
TORCH = _Torch("torch")
vars(TORCH).update({name: _Constructor(getattr(torch, name)) for name in _NAMES})
# By the identity of the class that stands in torch.
CONSTRUCTORS: dict[int, _Constructor] = {id(getattr(torch, name)): vars(TORCH)[name] for name in _NAMES}
