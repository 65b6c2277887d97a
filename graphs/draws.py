"""Random generators around a capture: left as they were, and draws that no graph can make again are noticed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["restored_generators"]


@contextmanager
def restored_generators() -> Iterator[Callable[[], bool]]:
    """Puts torch's, Python's and NumPy's generators back at the end.

    Yields whether Python's or NumPy's has drawn since: what it drew decided something that no node of a graph decides
    again, such as which layers LayerDrop leaves out.
    """
    rng = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator)

    def drawn() -> bool:
        return random.getstate() != python or not _same(np.random.get_state(legacy=False), numpy)  # noqa: NPY002

    try:
        yield drawn
    finally:
        torch.set_rng_state(rng)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _same(state: Any, other: Any) -> bool:
    """Whether two states of NumPy's generator, dictionaries of dictionaries, arrays and numbers, are the same."""
    if isinstance(state, Mapping):
        return all(_same(value, other[key]) for key, value in state.items())
    return np.array_equal(state, other)
