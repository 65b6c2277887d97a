"""Attributes of classes and modules, replaced for the time of a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Patch", "patched"]

Patch = tuple[Any, str, Any]  # owner, attribute, what it is meanwhile
_INHERITED = object()


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Attributes of classes and modules replaced inside the block."""
    originals = [(owner, name, owner.__dict__.get(name, _INHERITED)) for owner, name, _ in patches]
    try:
        for owner, name, replacement in patches:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in originals:
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
