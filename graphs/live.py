"""Numbers that remember where they come from.

``x.shape[0]`` read during a capture is a :class:`LiveInt`: an ``int`` in every respect, whose arithmetic also writes
nodes to the graph, so that the graph works at another batch size, resolution or sequence length. The node is only
made when somebody uses the number as an argument.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self

from torch.fx import Node

__all__ = ["HashedError", "LiveFloat", "LiveInt", "NumberRecorder", "is_live", "live_math"]


class HashedError(BaseException):
    """A live number is about to be looked up, maybe in a cache of results; no error that a model may catch."""


class NumberRecorder(Protocol):
    """What live numbers need from the recorder.

    Attributes:
        may_hash: whether live numbers can be looked up: no cached function sees them.
    """

    may_hash: bool

    def recording(self) -> bool:
        """Whether arithmetic is to be written down right now."""

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write ``fn(*args)`` to the graph."""


class _Live:
    """Shared by both kinds of numbers: the recorder and a node that is made on first use."""

    _recorder: NumberRecorder
    _build: Callable[[], Node]
    _node: Node | None

    def node(self) -> Node:
        """The FX node whose value is this number."""
        if self._node is None:
            self._node = self._build()
            self._node.meta["value"] = self.__copy__()  # what a rewrite takes for it on dims that are no batch or space
        return self._node

    def __hash__(self) -> int:
        if self._recorder.recording() and not self._recorder.may_hash:
            raise HashedError
        return hash(_plain(self))

    def __reduce__(self) -> Any:
        value = _plain(self)
        return type(value), (value,)

    def __copy__(self) -> Any:
        return _plain(self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__()


class LiveInt(_Live, int):
    """An int with provenance."""

    def __new__(cls, value: int, recorder: NumberRecorder, build: Callable[[], Node]) -> Self:
        """``value`` with the recorder that it came from, and how to make its node."""
        self = int.__new__(cls, value)
        self._recorder, self._build, self._node = recorder, build, None
        return self


class LiveFloat(_Live, float):
    """A float with provenance, such as ``head_dim ** -0.5``."""

    def __new__(cls, value: float, recorder: NumberRecorder, build: Callable[[], Node]) -> Self:
        """``value`` with the recorder that it came from, and how to make its node."""
        self = float.__new__(cls, value)
        self._recorder, self._build, self._node = recorder, build, None
        return self


def is_live(value: Any) -> bool:
    """Whether ``value`` is a number with provenance."""
    return isinstance(value, _Live)


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else value


def _derive(fn: Callable[..., Any], recorder: NumberRecorder, operands: tuple[Any, ...]) -> Any:
    value = fn(*map(_plain, operands))
    if not recorder.recording() or isinstance(value, (bool, complex)):
        return value
    # The operands are kept, not their nodes: a number that nobody uses leaves no trace in the graph.
    build = partial(recorder.call, fn, operands)
    return LiveInt(value, recorder, build) if isinstance(value, int) else LiveFloat(value, recorder, build)


def _binary(fn: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return _derive(fn, self._recorder, (self, other))

    def backward(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return _derive(fn, self._recorder, (other, self))

    return forward, backward


def _unary(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: _derive(fn, self._recorder, (self,))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "abs": operator.abs,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
}
_SHIFTS = {"rshift": operator.rshift, "lshift": operator.lshift}
_BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
}
for _cls in (LiveInt, LiveFloat):
    for _name, _fn in _BINARY.items():
        _forward, _backward = _binary(_fn)
        setattr(_cls, f"__{_name}__", _forward)
        setattr(_cls, f"__r{_name}__", _backward)
    for _name, _operator in _UNARY.items():
        setattr(_cls, f"__{_name}__", _unary(_operator))
for _name, _fn in _SHIFTS.items():
    _forward, _backward = _binary(_fn)
    setattr(LiveInt, f"__{_name}__", _forward)
    setattr(LiveInt, f"__r{_name}__", _backward)


def live_math(function: Callable[..., Any], recorder: NumberRecorder) -> Callable[..., Any]:
    """A function of Python's ``math`` that gives a live number for a live number."""

    def call(*args: Any) -> Any:
        return _derive(function, recorder, args) if any(map(is_live, args)) else function(*args)

    return call
