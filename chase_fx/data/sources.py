"""Where the four Fashion-MNIST files come from.

In order: a directory that the caller or ``CHASE_FX_DATA`` names, the cache, Debian's installed package, the same
package fetched and unpacked without root, torchvision's downloader. Whatever is fetched ends in the cache, which
lives in ``$XDG_CACHE_HOME/chase-fx/fashion-mnist``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from chase_fx.data.errors import DataError, DataUnavailableError

__all__ = ["DATA_VARIABLE", "FILES", "cache_dir", "find_files"]

DATA_VARIABLE = "CHASE_FX_DATA"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
FILES = {
    "train images": "train-images-idx3-ubyte.gz",
    "train labels": "train-labels-idx1-ubyte.gz",
    "test images": "t10k-images-idx3-ubyte.gz",
    "test labels": "t10k-labels-idx1-ubyte.gz",
}
_FETCH_SECONDS = 120


def cache_dir() -> Path:
    """The folder that fetched files are kept in, following the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "chase-fx" / "fashion-mnist"


def find_files(directory: Path | None = None, *, fetch: bool = True) -> tuple[Path, str]:
    """Find the folder with the four files, fetching them when they are nowhere on this machine.

    Args:
        directory: where they must be; ``None``: ``$CHASE_FX_DATA`` if set, else look in the places listed above.
        fetch: whether anything may be fetched.

    Returns:
        The folder, and one line that says where its files came from.

    Raises:
        DataError: the named directory lacks a file.
        DataUnavailableError: no source has them; the message lists what was tried.
    """
    named = directory or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if named is not None:
        missing = [name for name in FILES.values() if not (named / name).is_file()]
        if missing:
            raise DataError(f"{named} lacks {', '.join(missing)}. Fashion-MNIST needs {', '.join(FILES.values())}.")
        return named, f"the directory {named}"
    cache, installed = cache_dir(), Path("/") / DEBIAN_FOLDER
    if _complete(cache):
        return cache, f"the cache {cache}"
    if _complete(installed):
        return installed, f"Debian's package {DEBIAN_PACKAGE}"
    if not fetch:
        raise DataUnavailableError(f"Fashion-MNIST is not on this machine: looked in {cache} and {installed}.")
    return cache, _fetch_into(cache)


def _fetch_into(cache: Path) -> str:
    """Try each fetcher into a scratch folder beside the cache, so that the cache holds all four files or none."""
    fetchers: dict[str, Callable[[Path], Path]] = {
        f"Debian's package {DEBIAN_PACKAGE}, unpacked without root": _from_debian,
        "torchvision's downloader": _from_torchvision,
    }
    refusals = []
    cache.parent.mkdir(parents=True, exist_ok=True)
    for label, fetcher in fetchers.items():
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            try:
                folder = fetcher(Path(scratch))
            except DataError as error:
                refusals.append(f"{label}: {error}")
                continue
            cache.mkdir(exist_ok=True)
            for name in FILES.values():
                (folder / name).replace(cache / name)
            return label
    raise DataUnavailableError("Fashion-MNIST cannot be had. " + " | ".join(refusals))


def _from_debian(scratch: Path) -> Path:
    """``apt-get download`` and ``dpkg-deb -x``; with package lists of its own where the system has none."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"no {tool} on this machine")
    try:
        _run(["apt-get", "download", DEBIAN_PACKAGE], scratch)
    except DataError:
        private = _private_apt(scratch)
        _run(["apt-get", *private, "update"], scratch)
        _run(["apt-get", *private, "download", DEBIAN_PACKAGE], scratch)
    package = next(scratch.glob(f"{DEBIAN_PACKAGE}_*.deb"), None)
    if package is None:
        raise DataError("apt-get left no package file")
    _run(["dpkg-deb", "-x", package.name, "unpacked"], scratch)
    folder = scratch / "unpacked" / DEBIAN_FOLDER
    if not _complete(folder):
        raise DataError(f"the package has no {DEBIAN_FOLDER} with the four files")
    return folder


def _private_apt(scratch: Path) -> list[str]:
    """Options that let apt-get keep lists and cache in ``scratch``, which needs no root."""
    for folder in ("lists/partial", "archives/partial"):
        (scratch / folder).mkdir(parents=True)
    return ["-o", f"Dir::State::lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch}"]


def _from_torchvision(scratch: Path) -> Path:
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise DataError("torchvision is not installed") from error
    try:
        FashionMNIST(str(scratch), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{error}") from error
    return scratch / "FashionMNIST" / "raw"


def _run(command: list[str], folder: Path) -> None:
    try:
        # No shell, and every word of the command is a constant of this file or a path that it made.
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_FETCH_SECONDS)  # noqa: S603
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()
        raise DataError(f"{' '.join(command[:2])} failed: {said[-1] if said else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{' '.join(command[:2])} failed: {error}") from error


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES.values())
