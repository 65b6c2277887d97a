"""Checkpoint files: one safetensors file with JSON in its header, a checksum over both, written all or nothing.

A file is first written beside its target and forced to the disk; then the target becomes ``<name>.previous``, then the
new file takes its name. Whenever the process dies, at least one of the two is whole: a target that is damaged never
replaces the previous one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chase_fx.checksum import checksum
from chase_fx.errors import ArgumentError, CheckpointError

__all__ = ["FORMAT", "previous_of", "read", "write"]

FORMAT = "chase-fx-run-1"


def previous_of(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint before the one at ``path`` is kept.

    >>> previous_of("run.ckpt").name
    'run.ckpt.previous'
    """
    target = Path(path)
    return target.with_name(target.name + ".previous")


def write(path: str | os.PathLike[str], content: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write ``content`` (JSON) and ``tensors`` to ``path``; the file there becomes :func:`previous_of`."""
    target, text = Path(path), json.dumps(content, separators=(",", ":"))
    if target.exists() and not target.is_file():
        raise ArgumentError(f"{target} is a folder or a device; name a file to save the run to")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to save to", str(target.parent))
    metadata = {"format": FORMAT, "content": text, "sha256": checksum(text, tensors)}
    # One fixed name: what a killed process leaves behind is overwritten by the next one.
    temporary = target.with_name(target.name + ".tmp")
    save_file(dict(tensors), str(temporary), metadata)
    _sync(temporary)
    if target.exists() and _sound(target):
        _keep(target)
    os.replace(temporary, target)  # noqa: PTH105  (as os.fsync, by name in the tests)
    _sync(target.parent)


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """Content and tensors of the file at ``path``.

    Raises:
        CheckpointError: there is none, or it is truncated, tampered with or of another format. The message says whether
            the previous one is sound.
    """
    try:
        return _read(Path(path))
    except CheckpointError as error:
        previous = previous_of(path)
        if not previous.exists():
            raise
        state = "is sound: load it with previous=True" if _sound(previous) else "is damaged as well"
        raise CheckpointError(f"{error}. The checkpoint before it, {previous}, {state}") from error


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no checkpoint; expected a file that save() wrote")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata: dict[str, str] = f.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: expected format {FORMAT!r}, found {metadata.get('format')!r}")
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, ValueError, OSError) as e:
        raise CheckpointError(f"{path} is no complete safetensors file, probably truncated: {e}") from e
    text, expected = metadata.get("content", ""), metadata.get("sha256")
    found = checksum(text, tensors)
    if found != expected:
        msg = f"{path} was changed after it was written: expected checksum {expected}, found {found}"
        raise CheckpointError(msg)
    return json.loads(text), tensors


def _sound(path: Path) -> bool:
    try:
        _read(path)
    except CheckpointError:
        return False
    return True


def _keep(target: Path) -> None:
    """Make the target the previous checkpoint, if possible without a moment in which there is no target."""
    previous, link = previous_of(target), target.with_name(target.name + ".link")
    link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a file system without hard links
        os.link(target, link)
    os.replace(link if link.exists() else target, previous)  # noqa: PTH105


def _sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
