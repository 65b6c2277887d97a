"""Random generators around a capture, and the draws of Python's and NumPy's as calls that a graph can make.

torch's own draws are calls like any other. Python's and NumPy's give plain numbers, which Python decides by or computes
with: a call of one that gives a float becomes a node. The functions here are the targets of such nodes; they have names
that a graph can import, and act on the generators of the whole process, as the model does.
"""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import has_side_effect

from chase_fx.errors import CaptureError, OtherPathError
from chase_fx.graphs.tape import TapedOp

__all__ = [
    "DRAWS",
    "GENERATORS",
    "OWN_GENERATORS",
    "DrawnArray",
    "certain",
    "decided",
    "drawn",
    "draws",
    "fresh_seed",
    "given_arrays",
    "is_drawn",
    "reseed",
    "restored_generators",
    "saved_generators",
]

GENERATORS: dict[str, Any] = {"random": random, "numpy.random": np.random}  # what has a generator of its own
OWN_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
# Calls that only say how the values given shape the result; by what they read, a number depends on no data.
_MEASURES = frozenset({"size", "numel", "stride", "dim"})
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def drawn(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """What a function of Python's ``random`` or of ``numpy.random`` draws."""
    return getattr(GENERATORS[module], name)(*args, **kwargs)


def reseed(seed: int) -> None:
    """``torch.manual_seed``; the generator that it gives is that of the process."""
    torch.manual_seed(seed)


def fresh_seed() -> int:
    """``torch.seed``: a new seed from the system, set and given."""
    return torch.seed()


def decided(outcome: Any, expected: bool, where: str) -> None:
    """Refuse a draw that decides otherwise than it did when the graph was captured."""
    if bool(outcome) is not expected:
        raise OtherPathError(
            f"a random draw decides at {where}: it was {expected} when the graph was captured and is {not expected} "
            "now, so the model would run other code than the graph has",
            where,
        )


# The graph keeps these nodes although nobody reads their value: what is drawn later depends on them.
DRAWS: frozenset[Any] = frozenset(
    {has_side_effect(drawn), has_side_effect(reseed), has_side_effect(fresh_seed), has_side_effect(decided)}
)


def draws(op: TapedOp) -> bool:
    """Whether an ATen call draws from a generator, so that leaving it out would change what is drawn later."""
    if not _seeded(op.op):
        return False
    given = {
        a.name: op.arg(i, a.name, a.default_value) for i, a in enumerate(op.op._schema.arguments)
    }  # attention and recurrent layers draw for their dropout only
    dropout = given.get("dropout_p", given.get("dropout"))
    return dropout != 0 and given.get("train") is not False and given.get("training") is not False


@functools.cache
def _seeded(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operator.tags


def is_drawn(node: Node) -> bool:
    """Whether the value of ``node`` comes from random draws, and depends on no input but for sizes."""
    if _measures(node):
        return False
    found, stack, seen = False, [node], {node}
    while stack:
        last = stack.pop()
        if last.op == "placeholder":
            return False
        found = found or last.target in DRAWS or bool(last.meta.get("draws"))
        more = [n for n in last.all_input_nodes if n not in seen and not _measures(n)]
        seen.update(more)
        stack += more
    return found


def certain(node: Node) -> bool:
    """Whether a comparison with a draw goes one way whatever is drawn: layers left out with a chance of 0."""
    name = _operation(node)
    if len(node.args) != 2 or node.users or name not in _MIRRORED:
        return False
    draw, bound = node.args
    if isinstance(bound, Node):
        draw, bound, name = bound, draw, _MIRRORED[name]
    if not isinstance(draw, Node) or not isinstance(bound, (int, float)):
        return False
    least = _least(draw)
    return least is not None and (bound < least or (bound == least and name in ("lt", "ge")))


def _least(node: Node) -> float | None:
    """What no number that ``node`` draws is below. It is only read and compared, so that nothing writes to it."""
    if any(_operation(user) not in ("item", *_MIRRORED) for user in node.users):
        return None
    given = node.args
    if node.target == "item":
        return _least(node.all_input_nodes[0])
    if node.target is torch.rand:
        return 0.0
    if node.target is not drawn or node.kwargs:
        return None
    if given[1] in ("random", "rand", "random_sample"):
        return 0.0
    numbers = [v for v in given[2:] if isinstance(v, (int, float))]
    return min(numbers) if given[1] == "uniform" and len(numbers) == 2 and numbers == sorted(numbers) else None


def _operation(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _measures(node: Node) -> bool:
    """Whether ``node`` is a size, a device or a type, or arithmetic of such."""
    if node.target in _MEASURES or (node.target is getattr and node.args[1] in ("device", "dtype")):
        return True
    return "slot" not in node.meta and bool(node.all_input_nodes) and all(map(_measures, node.all_input_nodes))


class DrawnArray:
    """An array of random numbers that a function of the model drew: it can become a tensor, and nothing else."""

    def __init__(self, value: np.ndarray, node: Node, line: str) -> None:
        self.value, self.node, self._line = value, node, line

    def __getattr__(self, name: str) -> NoReturn:
        raise CaptureError(
            f"the forward uses '{name}' of an array of random numbers drawn at {self._line}; in train mode a graph can "
            "only make a tensor of it with torch.tensor"
        )


def _refused(name: str) -> Callable[..., NoReturn]:
    return lambda self, *_: self.__getattr__(name)


for _name in ("add", "and", "bool", "eq", "getitem", "gt", "invert", "iter", "len", "lt", "mul", "or", "sub"):
    setattr(DrawnArray, f"__{_name}__", _refused(_name))


def given_arrays(values: Iterable[Any]) -> list[Any]:
    """``values`` with the arrays themselves."""
    return [v.value if isinstance(v, DrawnArray) else v for v in values]


def saved_generators() -> Callable[[], None]:
    """Puts torch's, Python's and NumPy's generators back to where they are now."""
    rng = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator)

    def restore() -> None:
        torch.set_rng_state(rng)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002

    return restore


@contextmanager
def restored_generators() -> Iterator[Callable[[], Any]]:
    """Puts all generators back at the end. Yields what tells the state of Python's and of NumPy's."""
    restore = saved_generators()

    def state() -> Any:
        return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002

    try:
        yield state
    finally:
        restore()
