"""The corpora: every model that pruning is judged on, each with real inputs.

A corpus is a module with ``NAMES`` and ``build(name)``. A model's full name is ``corpus:name``, such as ``hf:bert``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["CORPORA", "Case", "build", "corpus", "names"]


@dataclass(frozen=True)
class Case:
    """A model with its example inputs.

    Attributes:
        batch: whether dim 0 of every input tensor is the batch.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch: bool = True


CORPORA: Mapping[str, str] = {
    "shape": "tests.zoo.shapes",
    "hf": "tests.zoo.transformers_models",
    "hfx": "tests.zoo.transformers_more",
    "timm": "tests.zoo.timm_models",
    "tv": "tests.zoo.torchvision_classification",
    "tvx": "tests.zoo.torchvision_detection",
}


def corpus(name: str) -> ModuleType:
    """The module of a corpus."""
    return importlib.import_module(CORPORA[name])


def names() -> list[str]:
    """The full name of every model."""
    return [f"{prefix}:{name}" for prefix in CORPORA for name in corpus(prefix).NAMES]


def build(full_name: str, seed: int = 0) -> Case:
    """A model by full name, with freshly initialised weights."""
    prefix, _, name = full_name.partition(":")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        case = corpus(prefix).build(name)
    assert isinstance(case, Case)
    return case
