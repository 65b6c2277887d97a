"""Labelled grey images as tensors, ready for training.

Shape legend: N images, H = W = 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chase_fx.data.errors import DataError, DataUnavailableError
from chase_fx.data.idx import read_idx
from chase_fx.data.sources import FILES, find_files
from chase_fx.errors import ArgumentError

__all__ = ["Dataset", "Split", "load_digits", "load_fashion_mnist", "load_images"]

_SIDE = 28
_CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: float32 (N, 1, 28, 28), of mean 0 and standard deviation 1 over the training images.
        labels: int64 (N,), in [0, 10).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits and where they came from.

    Attributes:
        name: what the images are.
        source: one line for the user.
        train: what to train on.
        validation: held out of the training images; empty unless asked for.
        test: the data set's own test images (for the digits: a fixed fifth of them).
    """

    name: str
    source: str
    train: Split
    validation: Split
    test: Split


def load_images(directory: Path | None = None, *, fetch: bool = True, validation: int = 0) -> Dataset:
    """Fashion-MNIST, or scikit-learn's digits where it is not to be had; ``Dataset.source`` says which and why.

    Raises:
        DataError: neither is there, files that are there are damaged, or ``directory`` lacks one.
    """
    try:
        folder, source = find_files(directory, fetch=fetch)
    except DataUnavailableError as error:
        return load_digits(validation=validation, reason=str(error))
    return load_fashion_mnist(folder, source=source, validation=validation)


def load_fashion_mnist(folder: Path, *, source: str | None = None, validation: int = 0) -> Dataset:
    """Read Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) from its four files.

    Args:
        folder: where they are.
        source: what ``Dataset.source`` shall say.
        validation: how many training images to hold out, the same ones every time.

    Raises:
        DataError: a file is missing, damaged, or of another shape.
        ArgumentError: ``validation`` leaves nothing to train on.
    """
    train = _read_pair(folder, FILES["train images"], FILES["train labels"])
    test = _read_pair(folder, FILES["test images"], FILES["test labels"])
    return _assemble("Fashion-MNIST", source or str(folder), train, test, validation)


def load_digits(*, validation: int = 0, reason: str = "asked for") -> Dataset:
    """The 1,797 handwritten digits that scikit-learn carries, 8x8 enlarged to 28x28: a stand-in that needs no network.

    Raises:
        DataError: scikit-learn is not installed.
        ArgumentError: ``validation`` leaves nothing to train on.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise DataError(
            f"no image data: {reason} And scikit-learn, whose digits would stand in, is not installed: "
            "pip install scikit-learn."
        ) from error
    images, classes = read(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    pixels = torch.nn.functional.interpolate(pixels, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(classes, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    held = len(labels) // 5
    source = f"scikit-learn's digits, enlarged from 8x8, in place of Fashion-MNIST ({reason})"
    return _assemble("digits", source, (pixels[held:], labels[held:]), (pixels[:held], labels[:held]), validation)


def _read_pair(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    images = read_idx(folder / images_name, dims=3)
    labels = read_idx(folder / labels_name, dims=1)
    if images.shape != (len(labels), _SIDE, _SIDE):
        raise DataError(
            f"{folder / images_name} holds images of shape {images.shape}, expected ({len(labels)}, {_SIDE}, {_SIDE}) "
            f"for the {len(labels)} labels of {labels_name}."
        )
    if not len(labels) or labels.max() >= _CLASSES:
        raise DataError(f"{folder / labels_name}: expected labels in [0, {_CLASSES}), at least one.")
    pixels = torch.from_numpy(images.copy()).unsqueeze(1).float() / 255
    return pixels, torch.from_numpy(labels.astype("int64"))


def _assemble(
    name: str, source: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], validation: int
) -> Dataset:
    """Normalise by the training images and hold out ``validation`` of them."""
    images, labels = train
    if not 0 <= validation < len(labels):
        raise ArgumentError(
            f"validation={validation}: {name} has {len(labels)} training images, expected 0 to {len(labels) - 1}."
        )
    mean, std = images.mean(), images.std()
    images = (images - mean) / std
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[:validation], order[validation:]
    return Dataset(
        name=name,
        source=source,
        train=Split(images[kept], labels[kept]),
        validation=Split(images[held], labels[held]),
        test=Split((test[0] - mean) / std, test[1]),
    )
