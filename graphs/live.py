"""Numbers that remember where they come from.

``x.shape[0]`` read during a capture is a :class:`LiveInt`: an ``int`` in every respect, whose arithmetic also writes
nodes to the graph, so that the graph works at another batch size, resolution or sequence length. The node is only
made when somebody uses the number as an argument.

Python can't be asked to go both ways of an ``if``. So whatever turns such a number into something that holds for the
example alone (a comparison, a truth value, a plain ``int``) is reported to the recorder, which writes a guard to the
graph: where the outcome would be another, the graph refuses to run (see :mod:`chase_fx.graphs.guards`).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch.fx import Node

__all__ = [
    "HashedError",
    "LiveFloat",
    "LiveInt",
    "NumberRecorder",
    "Watchful",
    "derive",
    "fix",
    "forget_texts",
    "is_live",
    "plain",
    "read_text",
]


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

    def guard(self, left: Any, comparison: str, right: Any, holds: bool) -> None:
        """The forward goes on with the outcome of ``left comparison right``, which is ``holds`` in the capture."""

    def decide(self, left: Any, comparison: str, right: Any, holds: bool) -> bool:
        """The outcome to go on with where random draws decide."""

    def lose(self, number: Any) -> None:
        """The forward goes on with a whole or plain number that was made from a random draw."""


class _Live:
    """Shared by both kinds of numbers: the recorder, a node that is made on first use, and whether it was drawn."""

    _recorder: NumberRecorder
    _build: Callable[[], Node]
    _node: Node | None
    drawn: bool = False  # by a random generator

    def __new__(cls, value: Any, recorder: Any = None, build: Any = None) -> Any:
        """``value`` with the recorder that it came from, and how to make its node."""
        if recorder is None:  # ``type(n)(value)``
            return (int if issubclass(cls, int) else float)(fix(value))
        self = super().__new__(cls, value)  # type: ignore[call-arg]
        self._recorder, self._build, self._node = recorder, build, None
        return self

    def node(self) -> Node:
        """The FX node whose value is this number."""
        if self._node is None:
            self._node = self._build()
            self._node.meta["value"] = plain(self)  # what a rewrite takes for it on dims that are no batch or space
        return self._node

    def __hash__(self) -> int:
        if self._recorder.recording() and not self._recorder.may_hash:
            raise HashedError
        return hash(fix(self))  # a dict or set that does not have it asks no more

    def __format__(self, specification: str) -> str:
        text = format(plain(self), specification)
        _written.append((text, self))
        return text

    def __str__(self) -> str:
        return self.__format__("")

    __repr__ = __str__

    @property
    def real(self) -> Any:
        """The number itself."""
        return self

    def conjugate(self) -> Any:
        """The number itself."""
        return self

    def __reduce__(self) -> Any:
        value = plain(self)
        return type(value), (value,)

    def __copy__(self) -> Any:
        return self if self._recorder.recording() else plain(self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """NumPy's functions of single numbers are those of Python."""
        known = _UFUNCS.get(ufunc.__name__)
        numbers = all(isinstance(i, (int, float)) for i in inputs)
        if known is not None and method == "__call__" and numbers and not kwargs:
            return derive(known, inputs)
        return getattr(ufunc, method)(*map(fix, inputs), **kwargs)


class LiveInt(_Live, int):
    """An int with provenance."""

    @property
    def numerator(self) -> Any:
        """The number itself."""
        return self

    def bit_length(self) -> int:
        """As of an int."""
        found: int = derive(bit_length, (self,))
        return found

    def as_integer_ratio(self) -> Any:
        """As of an int."""
        return int.as_integer_ratio(fix(self))

    def __index__(self) -> int:
        return int.__index__(fix(self))

    def bit_count(self) -> int:
        """As of an int."""
        return int.bit_count(fix(self))

    def to_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        """As of an int."""
        return int.to_bytes(fix(self), *args, **kwargs)


class LiveFloat(_Live, float):
    """A float with provenance, such as ``head_dim ** -0.5``."""

    def as_integer_ratio(self) -> tuple[int, int]:
        """As of a float."""
        return float.as_integer_ratio(fix(self))

    def is_integer(self) -> bool:
        """As of a float."""
        return bool(self % 1 == 0)


class Watchful(float):
    """A plain float that notices a live int on its right: ``0.5 * n`` asks nobody but the float."""

    __slots__ = ()


def bit_length(number: int) -> int:
    """``number.bit_length()`` as a function with a name that a graph can import."""
    return number.bit_length()


def is_live(value: Any) -> bool:
    """Whether ``value`` is a number with provenance."""
    return isinstance(value, _Live)


def plain(value: Any) -> Any:
    """``value`` without its provenance; for what only measures, for nothing is guarded."""
    if isinstance(value, LiveInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, (LiveFloat, Watchful)) else value


def fix(value: Any) -> Any:
    """``value`` as a plain number that the forward goes on with: the graph only serves inputs that give the same."""
    number = plain(value)
    if is_live(value) and value._recorder.recording():
        if value.drawn:
            value._recorder.lose(value)
        value._recorder.guard(value, "==", number, True)
    return number


# Texts that live numbers were written to. Most are messages, so a text is a decision only where it is a key.
_written: list[tuple[str, Any]] = []


def forget_texts() -> None:
    """A recording begins or ends."""
    _written.clear()


def read_text(text: str) -> None:
    """The forward goes on with what ``text`` means, so the live numbers that are written in it are fixed."""
    for part, number in _written:
        if re.search(rf"(?<!\d){re.escape(part)}(?!\d)", text):
            fix(number)


def derive(fn: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """``fn(*operands)``, live if an operand is."""
    try:
        value = fn(*map(plain, operands))
    except (ArithmeticError, ValueError):  # the forward may catch it
        for operand in operands:
            fix(operand)
        raise
    recorder = next((o._recorder for o in operands if isinstance(o, _Live) and o._recorder.recording()), None)
    if recorder is None or isinstance(value, complex):
        return value
    # The operands are kept, not their nodes: a number that nobody uses leaves no trace in the graph.
    build = partial(recorder.call, fn, operands)
    if isinstance(value, bool):  # math.isnan and the like
        recorder.guard(LiveInt(value, recorder, build), "==", int(value), True)
        return value
    found: LiveInt | LiveFloat
    found = LiveInt(value, recorder, build) if isinstance(value, int) else LiveFloat(value, recorder, build)
    found.drawn = any(isinstance(o, _Live) and o.drawn for o in operands)
    if found.drawn and isinstance(found, int):  # a list that is indexed by it reads it without asking
        recorder.lose(found)
    return found


def _binary(fn: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Any, other: Any, *modulus: Any) -> Any:
        if modulus:  # ``pow(n, 2, 5)``
            return pow(fix(self), *map(fix, (other, *modulus)))
        return derive(fn, (self, other)) if isinstance(other, (int, float)) else _without(self, other)

    def backward(self: Any, other: Any) -> Any:
        return derive(fn, (other, self)) if isinstance(other, (int, float)) else _without(self, other)

    return forward, backward


def _without(number: Any, other: Any) -> Any:
    """``[x] * n``, ``1j * n``: Python goes on with the plain number."""
    if isinstance(other, (list, tuple, str, bytes, complex)):
        fix(number)
    return NotImplemented


def _unary(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: derive(fn, (self, *args))


def _comparison(symbol: str, fn: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        holds = bool(fn(plain(self), plain(other)))  # numbers of numpy have truths of their own
        if self._recorder.recording():
            if self.drawn or (isinstance(other, _Live) and other.drawn):
                return self._recorder.decide(self, symbol, other, holds)
            self._recorder.guard(self, symbol, other, holds)
        return holds

    return compare


def _watching(name: str, fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    own = getattr(float, name)

    def forward(self: Any, other: Any) -> Any:
        if is_live(other):
            return derive(fn, (plain(self), other))
        found = own(self, other)
        return Watchful(found) if type(found) is float else found

    return forward


def _watching_comparison(name: str, mirrored: str) -> Callable[[Any, Any], Any]:
    own = getattr(float, name)
    return lambda self, other: getattr(other, mirrored)(plain(self)) if is_live(other) else own(self, other)


def _divmod(self: Any, other: Any) -> Any:
    return (self // other, self % other) if isinstance(other, (int, float)) else NotImplemented


def _rdivmod(self: Any, other: Any) -> Any:
    if not isinstance(other, (int, float)):
        return NotImplemented
    return derive(operator.floordiv, (other, self)), derive(operator.mod, (other, self))


def _truth(self: Any) -> bool:
    return bool(self != 0)


def _to_int(self: Any) -> int:
    found: int = fix(self if isinstance(self, int) else derive(int, (self,)))
    return found


def _to_float(self: Any) -> float:
    return float(fix(self))


_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "abs": operator.abs,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
}
_BITS: dict[str, Callable[[Any, Any], Any]] = {
    "rshift": operator.rshift,
    "lshift": operator.lshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "eq": ("==", operator.eq),
    "ne": ("!=", operator.ne),
    "lt": ("<", operator.lt),
    "le": ("<=", operator.le),
    "gt": (">", operator.gt),
    "ge": (">=", operator.ge),
}
_UFUNCS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "ceil", "floor")},
    "absolute": abs,
    "add": operator.add,
    "divide": operator.truediv,
    "floor_divide": operator.floordiv,
    "maximum": max,
    "minimum": min,
    "multiply": operator.mul,
    "negative": operator.neg,
    "power": operator.pow,
    "remainder": operator.mod,
    "subtract": operator.sub,
}


def _complete(cls: type, methods: dict[str, Callable[..., Any]]) -> None:
    for name, method in methods.items():
        setattr(cls, f"__{name}__", method)


for _cls, _binaries in ((LiveInt, _BINARY | _BITS), (LiveFloat, _BINARY)):
    for _name, _fn in _binaries.items():
        _forward, _backward = _binary(_fn)
        _complete(_cls, {_name: _forward, f"r{_name}": _backward})
    _complete(_cls, {name: _unary(fn) for name, fn in _UNARY.items()})
    _complete(_cls, {name: _comparison(symbol, fn) for name, (symbol, fn) in _COMPARISONS.items()})
    _complete(_cls, {"divmod": _divmod, "rdivmod": _rdivmod, "bool": _truth, "int": _to_int, "float": _to_float})
_complete(LiveInt, {"invert": _unary(operator.invert)})
for _name, _fn in _BINARY.items():
    _complete(Watchful, {n: _watching(f"__{n}__", _fn) for n in (_name, f"r{_name}")})
for _name, _mirrored in (("eq", "eq"), ("ne", "ne"), ("lt", "gt"), ("le", "ge"), ("gt", "lt"), ("ge", "le")):
    _complete(Watchful, {_name: _watching_comparison(f"__{_name}__", f"__{_mirrored}__")})
_complete(
    Watchful,
    {
        "hash": float.__hash__,
        "divmod": lambda self, other: _rdivmod(other, plain(self)) if is_live(other) else float.__divmod__(self, other),
        "round": lambda self, *digits: float.__round__(self, *map(fix, digits)),
    },
)
