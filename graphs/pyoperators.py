"""Python's operators and subscripts on operands that nobody asks, live while a forward is recorded.

``0.5 / n`` asks the float alone, ``scales[n]`` the list alone, ``x.shape.numel()`` nobody: all read an int without
asking it. So while recording, these instructions in the model's code call functions of our own. One instruction calls a
function with two operands and is as short as any of them: ``IMPORT_NAME``, which calls ``__import__``. It gets a name
that no module has, and an ``__import__`` that knows it.
"""

from __future__ import annotations

import builtins
import dis
import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from chase_fx.graphs.constructors import CONSTRUCTORS, TORCH
from chase_fx.graphs.live import derive, fix, is_live, read_text
from chase_fx.graphs.reach import is_own

__all__ = [
    "OPERATORS",
    "fixed",
    "fixing",
    "import_hook",
    "redirect_calls",
    "redirect_imports",
    "redirect_operators",
    "subscript",
    "write_text",
]

_PREFIX = "_chase_operator_"
_CALL = _PREFIX + "()"
_CACHE, _NOP = 0, dis.opmap["NOP"]
_IMPORT_NAME, _EXTENDED_ARG = dis.opmap["IMPORT_NAME"], dis.opmap["EXTENDED_ARG"]
_METHOD_CALL = "LOAD_METHOD" if "LOAD_METHOD" in dis.opmap and sys.version_info < (3, 12) else "LOAD_ATTR"
_REDIRECTED = ("BINARY_SUBSCR", "BINARY_OP", "COMPARE_OP", "CONTAINS_OP", _METHOD_CALL)
_KINDS = {dis.opmap[k]: k for k in _REDIRECTED if k in dis.opmap}
# Methods of containers, and functions of torch, that read numbers without asking them.
_METHODS = frozenset(
    {
        "numel", "pop", "get", "reshape", "repeat", "take", "insert", "rotate", "indices", "ljust", "rjust", "zfill",
        "get_submodule", "get_parameter", "get_buffer",
    }
    | {n for n in vars(TORCH) if n.endswith("Tensor")}
)  # fmt: skip
_SYMBOLS = {
    "+": operator.add, "&": operator.and_, "//": operator.floordiv, "<<": operator.lshift, "@": operator.matmul,
    "*": operator.mul, "%": operator.mod, "|": operator.or_, "**": operator.pow, ">>": operator.rshift,
    "-": operator.sub, "/": operator.truediv, "^": operator.xor,
    "+=": operator.iadd, "&=": operator.iand, "//=": operator.ifloordiv, "<<=": operator.ilshift,
    "@=": operator.imatmul, "*=": operator.imul, "%=": operator.imod, "|=": operator.ior, "**=": operator.ipow,
    ">>=": operator.irshift, "-=": operator.isub, "/=": operator.itruediv, "^=": operator.ixor,
    "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
# A compare instruction has the operator in the upper bits of its argument.
_COMPARE_SHIFT = {11: 0, 12: 4}.get(sys.version_info.minor, 5)
_MIRRORED = {"<": ">", "<=": ">=", "==": "==", "!=": "!=", ">": "<", ">=": "<="}


def redirect_imports(names: list[str], text: bytearray, modules: Collection[str]) -> None:
    """Make imports of some modules in the code ``text`` import their live copies; ``names`` gets the imports."""
    extended = 0
    for at in range(0, len(text), 2):
        op, argument = text[at], text[at + 1] | extended
        extended = argument << 8 if op == _EXTENDED_ARG else 0
        if op != _IMPORT_NAME or names[argument] not in modules:
            continue
        name = _PREFIX + names[argument]
        index = names.index(name) if name in names else len(names)
        if index > 255 >= argument:  # no room for a longer argument
            continue
        if index == len(names):
            names.append(name)
        text[at + 1] = index & 255
        if argument > 255:
            text[at - 1] = index >> 8


def redirect_calls(
    code: types.CodeType, names: list[str], text: bytearray, constants: tuple[Any, ...], call: Callable[..., Any]
) -> tuple[Any, ...]:
    """Make calls of values that no global name gave, ``f(n)``, call ``call(f, n)``; returns the constants for it.

    Where a function is no method of an object, Python leaves a mark on its stack. ``call`` in its place makes the
    function the object. The mark comes first up to Python 3.12. ``f(*args)`` has two operands, and needs no mark.
    """
    index = len(constants)
    if sys.version_info >= (3, 13) or index > 255 or dis.opmap["PUSH_NULL"] not in code.co_code[::2]:
        return constants
    steps = [step for step in dis.get_instructions(code) if step.opcode != _CACHE]
    places = {step.offset: i for i, step in enumerate(steps)}
    used = False
    for i, step in enumerate(steps):
        end = _end_of_call(steps, places, i) if step.opname == "PUSH_NULL" else None
        if end is None:
            continue
        if end.opname == "CALL":
            used = True
            text[step.offset : step.offset + 2] = bytes([dis.opmap["LOAD_CONST"], index])
        elif end.arg == 0 and len(names) < 255:  # no keywords
            if _CALL not in names:
                names.append(_CALL)
            text[step.offset : step.offset + 2] = bytes([_NOP, 0])
            text[end.offset : end.offset + 2] = bytes([_IMPORT_NAME, names.index(_CALL)])
    return (*constants, call) if used else constants


def _end_of_call(steps: list[dis.Instruction], places: Mapping[int, int], at: int) -> dis.Instruction | None:
    """The call that takes the mark that is made at ``at``, as one way through the arguments shows it."""
    depth, at = 1, at + 1
    while at < len(steps):
        step = steps[at]
        if step.opname.startswith(("JUMP_BACKWARD", "RETURN", "RAISE", "RERAISE")):
            return None
        depth += dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if depth <= 1:
            return step if step.opname in ("CALL", "CALL_FUNCTION_EX") else None
        at = places[step.argval] if step.opname == "JUMP_FORWARD" else at + 1
    return None


def redirect_operators(names: list[str], text: bytearray) -> None:
    """Make operators, subscripts and some method calls in the code ``text`` import; ``names`` gets the imports."""
    extended = 0
    for at in range(0, len(text), 2):
        op, argument = text[at], text[at + 1] | extended
        extended = argument << 8 if op == _EXTENDED_ARG else 0
        if op not in _KINDS or (name := _import_name(_KINDS[op], argument, names)) is None:
            continue
        if name not in names:
            names.append(name)
        index, end = names.index(name), at + 2
        while end < len(text) and text[end] == _CACHE:
            end += 2
        new = ([_EXTENDED_ARG, index >> 8] if index > 255 else []) + [_IMPORT_NAME, index & 255]
        if name.removeprefix(_PREFIX) in _METHODS:  # from (object) to (NULL, method)
            new = [dis.opmap["COPY"], 1, *new, dis.opmap["PUSH_NULL"], 0, dis.opmap["SWAP"], 2]
        if len(new) <= end - at:
            text[at:end] = bytes(new + [_NOP, 0] * ((end - at - len(new)) // 2))


def _import_name(kind: str, argument: int, names: list[str]) -> str | None:
    """The name to import in place of an instruction, if it is to be replaced."""
    if kind == "BINARY_SUBSCR":
        return _PREFIX + "[]"
    if kind == "BINARY_OP":
        return _PREFIX + str(dis._nb_ops[argument][1])  # type: ignore[attr-defined]
    if kind == "CONTAINS_OP":
        return _PREFIX + ("not in" if argument else "in")
    if kind == "COMPARE_OP":
        return _PREFIX + dis.cmp_op[argument >> _COMPARE_SHIFT]
    name = names[argument if kind == "LOAD_METHOD" else argument >> 1]
    return _PREFIX + name if name in _METHODS and (kind == "LOAD_METHOD" or argument & 1) else None


def import_hook(modules: Mapping[str, types.ModuleType], call: Callable[..., Any]) -> Callable[..., Any]:
    """An ``__import__`` that computes operators and gives ``modules`` to redirected code; all else it imports."""
    functions: dict[str, Callable[[Any, Any], Any]] = {**_FUNCTIONS, _CALL: lambda fn, args: call(fn, *args)}
    copies = {_PREFIX + name: module for name, module in modules.items()}
    original = builtins.__import__

    def imported(
        name: str,
        scope: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        fromlist: Any = (),
        level: Any = 0,
    ) -> Any:
        if name in copies:
            return copies[name]
        function = functions.get(name)
        if function is None:
            return original(name, scope, local, fromlist, level)
        return function(level, fromlist)

    return imported


def subscript(container: Any, index: Any) -> Any:
    """``container[index]``. A container that reads the index without asking it gets a plain one, which is guarded."""
    if type(index) is int:
        return container[index]
    if type(index) is str:
        read_text(index)
    elif not isinstance(container, (torch.Tensor, dict)) and _holds_live(index):
        method = getattr(type(container), "__getitem__", None)
        if not isinstance(method, types.FunctionType) or not is_own(method.__module__):
            index = fixed(index)
    return container[index]


def _holds_live(value: Any) -> bool:
    if isinstance(value, slice):
        return is_live(value.start) or is_live(value.stop) or is_live(value.step)
    if type(value) is dict:
        return any(map(_holds_live, value.values()))
    return any(map(_holds_live, value)) if isinstance(value, (tuple, list)) else is_live(value)


def fixed(value: Any) -> Any:
    """``value`` with plain numbers for the live ones in it, each of which is guarded."""
    if not _holds_live(value):
        return value
    if isinstance(value, slice):
        return slice(fix(value.start), fix(value.stop), fix(value.step))
    if isinstance(value, dict):
        return {key: fixed(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(map(fixed, value))
    return fix(value)


def _binary(symbol: str) -> Callable[[Any, Any], Any]:
    function, pure = _SYMBOLS[symbol], _SYMBOLS[symbol.removesuffix("=")]

    def call(a: Any, b: Any) -> Any:
        if is_live(b):
            if isinstance(a, float):
                return derive(pure, (a, b))
            if isinstance(a, complex):
                b = fix(b)
        if function is operator.mod and type(a) is str:
            write_text(b)
        return function(a, b)

    return call


def write_text(value: Any) -> None:
    """``value`` is written to a text by code that does not ask the numbers in it."""
    if isinstance(value, (tuple, list)):
        for item in value:
            write_text(item)
    elif is_live(value):
        str(value)


def fixing(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, which reads numbers without asking them, with plain ones that are guarded."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*fixed(args), **{name: fixed(value) for name, value in kwargs.items()})

    return call


def _method(name: str) -> Callable[[Any, Any], Any]:
    def find(owner: Any, _: Any) -> Any:
        if isinstance(owner, torch.Size) and name == "numel":
            return functools.partial(functools.reduce, operator.mul, owner, 1)
        found = getattr(owner, name)
        if id(found) in CONSTRUCTORS:
            return CONSTRUCTORS[id(found)]
        if isinstance(owner, slice):
            return functools.partial(fixing(slice.indices), owner)
        if isinstance(owner, (list, deque, str, np.ndarray)):
            return fixing(found)
        by_name = isinstance(owner, dict) or (isinstance(owner, torch.nn.Module) and name.startswith("get_"))
        return functools.partial(_get, found) if by_name else found

    return find


def _get(method: Callable[..., Any], key: Any, *default: Any) -> Any:
    if type(key) is str:
        read_text(key)
    return method(key, *default)


def _comparison(symbol: str) -> Callable[[Any, Any], Any]:
    function, mirrored = _SYMBOLS[symbol], _SYMBOLS[_MIRRORED[symbol]]

    def call(a: Any, b: Any) -> Any:
        if is_live(b) and isinstance(a, float):
            return mirrored(b, a)
        if type(a) is str and type(b) is str:
            read_text(a)
            read_text(b)
        return function(a, b)

    return call


def _contains(item: Any, container: Any) -> bool:
    """``item in container``, where a text that numbers were written to is a decision by them."""
    if type(item) is str:
        read_text(item)
    return item in container


# The functions of the module ``operator`` that do the same.
OPERATORS: dict[str, Callable[..., Any]] = {
    **{f.__name__: _comparison(s) if s in _MIRRORED else _binary(s) for s, f in _SYMBOLS.items()},
    "getitem": subscript,
    "itemgetter": fixing(operator.itemgetter),
    "index": lambda number: number if is_live(number) and isinstance(number, int) else operator.index(number),
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    **{_PREFIX + symbol: OPERATORS[function.__name__] for symbol, function in _SYMBOLS.items()},
    **{_PREFIX + name: _method(name) for name in _METHODS},
    _PREFIX + "[]": subscript,
    _PREFIX + "in": _contains,
    _PREFIX + "not in": lambda item, container: not _contains(item, container),
}
