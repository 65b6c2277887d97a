"""Nested Python values as JSON beside a flat table of tensors: what checkpoints are made of, without pickle.

Numbers, strings, ``None`` and lists are themselves. Everything else is an object with one key that says what it is:
``{"tensor": name}``, ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"counter": ...}``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chase_fx.errors import ArgumentError

__all__ = ["Encoder", "decode"]


class Encoder:
    """Encodes values and collects their tensors.

    A tensor met twice (tied weights) is stored once.

    >>> encoder = Encoder()
    >>> encoder.encode({"lr": 0.1, "betas": (0.9, 0.99), "mean": torch.ones(2)}, "adam")
    {'dict': [['lr', 0.1], ['betas', {'tuple': [0.9, 0.99]}], ['mean', {'tensor': 'adam.mean'}]]}
    >>> encoder.tensors
    {'adam.mean': tensor([1., 1.])}
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        """``value`` as JSON. path: names its tensors, and itself in errors.

        Raises:
            ArgumentError: a value that is neither of the kinds above nor a tensor.
        """
        if isinstance(value, Tensor):
            return {"tensor": self._store(value, path)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return _plain(value)
        if isinstance(value, list):
            return [self.encode(v, f"{path}.{i}") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [self.encode(v, f"{path}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, Mapping):
            if bad := next((key for key in value if not isinstance(key, (bool, int, float, str))), None):
                raise ArgumentError(f"{path} has a key of type {type(bad).__name__}; expected a number or a string")
            pairs = [[_plain(k), self.encode(v, f"{path}.{k}")] for k, v in value.items()]
            return {"counter" if isinstance(value, Counter) else "dict": pairs}
        msg = (
            f"{path} is a {type(value).__name__}, which a checkpoint can't hold: expected tensors, numbers, strings, "
            f"None, lists, tuples and dicts. Leave it out and build it again when the run resumes"
        )
        raise ArgumentError(msg)

    def _store(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ArgumentError(f"{path} is a {tensor.layout} tensor; a checkpoint holds dense ones only")
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        key = (storage, tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if storage and key in self._names:
            return self._names[key]
        self._names[key] = path
        flat = tensor.cpu().contiguous()
        # safetensors refuses tensors that share memory; only the copy that needs one costs memory.
        if flat.data_ptr() == tensor.data_ptr() and storage in self._storages:
            flat = flat.clone()
        self._storages.add(storage)
        self.tensors[path] = flat
        return path


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that :meth:`Encoder.encode` was given.

    Raises:
        KeyError, TypeError, ValueError: the JSON is not what an encoder makes.
    """
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(decode(v, tensors) for v in content)
    if kind in ("dict", "counter"):
        pairs = {key: decode(v, tensors) for key, v in content}
        return pairs if kind == "dict" else Counter(pairs)
    raise ValueError(f"unknown kind {kind!r}")


def _plain(value: Any) -> Any:
    # A subclass (numpy.float64, an enum) would come back as its base anyway. json keeps every float exactly.
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return float(value)
    return int(value) if isinstance(value, int) else str(value)
