"""Python's own functions of numbers, live while a forward is recorded.

``int(n)``, ``len(x)``, ``range(n)`` are decided inside the interpreter: no method of ``n`` can make their result live.
So while recording, *calls* of these names in the model's code go to functions of our own. Only calls do:
``isinstance(n, int)``, ``type(n) is int``, ``dtype=int`` or an annotation mean the class itself, and bytecode tells the
two apart (the lowest bit of ``LOAD_GLOBAL``'s argument says that the name is loaded in order to be called). The code
of every function is put back when the recording ends. What no function of ours reaches is guarded wherever Python lets
us notice.
"""

from __future__ import annotations

import builtins
import dis
import functools
import itertools
import math
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from chase_fx.graphs.caches import Uncached
from chase_fx.graphs.constructors import CONSTRUCTORS, TORCH
from chase_fx.graphs.live import Watchful, derive, fix, forget_texts, is_live, plain, read_text
from chase_fx.graphs.pyoperators import (
    OPERATORS,
    fixing,
    import_hook,
    redirect_calls,
    redirect_imports,
    redirect_operators,
    write_text,
)
from chase_fx.graphs.reach import Code
from chase_fx.graphs.readers import READERS, Extended, Readers, is_extension, leads_to_extension

__all__ = ["live_calls"]

_LOAD_GLOBAL, _EXTENDED_ARG = dis.opmap["LOAD_GLOBAL"], dis.opmap["EXTENDED_ARG"]


def _derived(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, with a live result for live arguments."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_number, args))
        for text in args:
            if type(text) is str:
                read_text(text)
        return derive(fn, args) if not kwargs and _live_numbers(args) else fn(*args, **kwargs)

    return call


def _number(value: Any) -> Any:
    """A tensor of one number as that number, which is live: what Python makes of the tensor itself would not be."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C.DisableTorchFunction():
        single = value.numel() == 1 and not value.is_complex()
    return value.item() if single else value


def _live_numbers(values: tuple[Any, ...]) -> bool:
    """Numbers of which one is live. Among tensors, the data decides."""
    return any(map(is_live, values)) and all(isinstance(value, (int, float)) for value in values)


def _extreme(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            return fn(*args, **kwargs)
        items = tuple(args[0]) if len(args) == 1 else args
        return derive(fn, items) if len(items) > 1 and _live_numbers(items) else fn(items)

    return call


def _sum(items: Iterable[Any], /, start: Any = 0) -> Any:
    items = list(items)
    return functools.reduce(_add, items, start) if any(map(is_live, items)) else sum(items, start)


def _add(a: Any, b: Any) -> Any:
    return derive(operator.add, (a, b)) if is_live(b) and isinstance(a, (int, float)) else a + b


def _product(items: Any, *args: Any, **kwargs: Any) -> Any:
    if not args and not kwargs and isinstance(items, (tuple, list)) and any(map(is_live, items)):
        return math.prod(items)
    return np.prod(items, *args, **kwargs)


def _len(value: Any, /) -> Any:
    if type(value) is str:
        read_text(value)
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else len(value)


def _steps(start: int, stop: int, step: int) -> int:
    return len(range(start, stop, step))


def _range(*args: Any) -> Any:
    """How often a loop runs is part of the graph, so it is fixed; where it starts and in which steps it goes is not."""
    if not any(map(is_live, args)):
        return range(*args)
    start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
    plainly = plain(start) == 0 and plain(step) == 1 and not is_live(start) and not is_live(step)
    count = fix(stop if plainly else derive(_steps, (start, stop, step)))
    if is_live(start) or is_live(step):
        return [start + i * step for i in range(count)]
    return range(*map(plain, args))


def _enumerate(items: Iterable[Any], start: Any = 0) -> Iterator[tuple[Any, Any]]:
    return enumerate(items, start) if not is_live(start) else ((start + i, item) for i, item in enumerate(items))


def _map(fn: Callable[..., Any], /, *items: Iterable[Any]) -> Iterator[Any]:
    return map(_CALLED.get(id(fn), fn), *items)


def _call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """A call of a value that no global name gave, such as ``LongTensor`` after an import inside of a function."""
    known = _CALLED.get(id(fn))
    if known is None:
        known = fixing(fn) if is_extension(fn) else fn
    return known(*args, **kwargs)


def _type(*args: Any, **kwargs: Any) -> Any:
    return type(plain(args[0])) if len(args) == 1 else type(*args, **kwargs)


def _str(value: Any = "", *args: Any, **kwargs: Any) -> str:
    if isinstance(value, torch.Size):
        write_text(value)
    return str(value, *args, **kwargs)


def _pow(base: Any, exponent: Any, *modulus: Any) -> Any:
    if not modulus and _live_numbers((base, exponent)):
        return derive(operator.pow, (base, exponent))
    return pow(base, exponent, *modulus)


def _divmod(a: Any, b: Any, /) -> Any:
    return (derive(operator.floordiv, (a, b)), derive(operator.mod, (a, b))) if _live_numbers((a, b)) else divmod(a, b)


def _getattr(owner: Any, name: str, *default: Any) -> Any:
    read_text(name)
    return getattr(owner, name, *default)


def _with(module: types.ModuleType, functions: Mapping[str, Callable[..., Any]]) -> types.ModuleType:
    """A copy of a module's names, with other functions.

    To patch the module itself would leak into whatever is imported while a forward runs.
    """
    copy = types.ModuleType(module.__name__)
    vars(copy).update(vars(module))
    vars(copy).update(functions)
    return copy


_MATH = {
    name: _derived(fn)
    for name, fn in vars(math).items()
    if callable(fn) and not name.startswith("_") and name not in ("prod", "fsum", "dist", "sumprod")
}
_NUMPY: dict[str, Callable[..., Any]] = {
    name: fixing(fn)
    for name, fn in vars(np).items()
    if callable(fn) and not isinstance(fn, (type, np.ufunc)) and not name.startswith("_")
}
_FIXED = (hash, bin, hex, oct, chr, complex, bytes, bytearray)
_ITERTOOLS: dict[str, Callable[..., Any]] = {
    name: fixing(fn) for name, fn in vars(itertools).items() if callable(fn) and not name.startswith("_")
}
# Every name that has a live meaning, by the identity of what it means: functions, and modules of functions.
_LIVE: dict[int, Any] = {
    id(int): _derived(int),
    id(float): _derived(float),
    id(min): _extreme(min),
    id(max): _extreme(max),
    id(sum): _sum,
    id(len): _len,
    id(range): _range,
    id(map): _map,
    id(enumerate): _enumerate,
    id(type): _type,
    id(np.prod): _product,
    id(math): _with(math, _MATH),
    id(np): _with(np, {**_NUMPY, "prod": _product}),
    id(pow): _pow,
    id(divmod): _divmod,
    id(str): _str,
    id(torch): TORCH,
    id(torch.Tensor): CONSTRUCTORS[id(torch.Tensor)],
    id(getattr): _getattr,
    id(itertools): _with(itertools, _ITERTOOLS),
    id(operator): _with(operator, OPERATORS),
    **{id(getattr(operator, name)): live for name, live in OPERATORS.items()},
    **{id(fn): fixing(fn) for fn in _FIXED},
    **{id(home): Readers(home, names) for home, names in READERS.items()},
    **{id(getattr(home, name)): fixing(getattr(home, name)) for home, names in READERS.items() for name in names},
    **{id(getattr(itertools, name)): live for name, live in _ITERTOOLS.items()},
    **{id(getattr(np, name)): live for name, live in _NUMPY.items() if name != "prod"},
    **{id(getattr(math, name)): live for name, live in _MATH.items()},
}
# What a value that is called means, wherever it comes from.
_CALLED: dict[int, Any] = {**_LIVE, **CONSTRUCTORS}
_PREFIX = "_chase_live_"
# Modules that mean the same where nothing is called; classes in torch do not, as in ``isinstance(x, torch.Tensor)``.
_MODULES = {
    _PREFIX + str(key)
    for key, live in _LIVE.items()
    if isinstance(live, types.ModuleType) and live is not TORCH and key not in set(map(id, READERS))
}
# What ``import`` inside a function gives; a class of torch is no function.
_IMPORTS = {live.__name__: live for live in (_LIVE[id(home)] for home in (math, np, itertools, operator))}
_floats: dict[str, Watchful] = {}  # global variables of modules
_extensions: dict[str, Any] = {}  # functions in C that global variables name, and modules that have such
_hooks: dict[str, Callable[..., Any]] = {}  # of imports: the one that was there, and ours around it
_redirected: WeakKeyDictionary[types.FunctionType, tuple[types.CodeType, types.CodeType]] = WeakKeyDictionary()


@contextmanager
def live_calls(code: Code) -> Iterator[None]:
    """Inside the block, calls of number functions by name in the model's code go to live ones.

    Caches that live in closures, where nobody else can replace them, run uncached for live numbers.
    """
    undo: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    forget_texts()
    redirected = [(function, new) for function in code.functions if (new := _of(function)) is not function.__code__]
    with _names_of_live_calls({part for _, new in redirected for part in _nested(new)}):
        try:
            for cell in code.caches:
                change(cell, "cell_contents", Uncached(cell.cell_contents))
            for function, new in redirected:
                change(function, "__code__", new)
            for function in code.functions:
                if function.__defaults__ and any(type(value) is float for value in function.__defaults__):
                    change(function, "__defaults__", tuple(_constant(value, {}) for value in function.__defaults__))
            yield
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)


def _of(function: types.FunctionType) -> types.CodeType:
    """The redirected code of ``function``."""
    original = function.__code__
    known = _redirected.get(function)
    if known is None or known[0] is not original:
        known = _redirected[function] = original, _redirect(original, function.__globals__)
    return known[1]


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


@contextmanager
def _names_of_live_calls(changed: set[types.CodeType]) -> Iterator[None]:
    """What redirected code needs: there before any of it can run, and as long as another thread is inside of it.

    The functions are everybody's, so a thread may call one meanwhile and return from it afterwards. Then all stays for
    good, which changes nothing for other code, and the next block takes it over.
    """
    if builtins.__import__ is not _hooks.get("ours"):
        _hooks.update(original=builtins.__import__, ours=import_hook(_IMPORTS, _call))
    names = {**{_PREFIX + str(key): live for key, live in _LIVE.items()}, **_floats, **_extensions}
    vars(builtins).update(names)
    vars(builtins)["__import__"] = _hooks["ours"]
    try:
        yield
    finally:
        if not _runs_elsewhere(changed):
            vars(builtins)["__import__"] = _hooks["original"]
            for name in [name for name in vars(builtins) if name in _floats or name.startswith(_PREFIX)]:
                del vars(builtins)[name]


def _runs_elsewhere(codes: set[types.CodeType]) -> bool:
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        at: types.FrameType | None = None if thread == own else frame
        while at is not None:
            if at.f_code in codes:
                return True
            at = at.f_back
    return False


def _redirect(code: types.CodeType, scope: Mapping[str, Any]) -> types.CodeType:
    """``code`` whose calls of functions in ``_LIVE`` load another name; the very same object if it has none."""
    nested = tuple(_constant(c, scope) for c in code.co_consts)
    live = {i: new for i, name in enumerate(code.co_names) if (new := _live_name(scope, name, code))}
    same = all(a is b for a, b in zip(nested, code.co_consts, strict=True))
    names, text = list(code.co_names), bytearray(code.co_code)
    nested = redirect_calls(code, names, text, nested, _call)
    redirect_imports(names, text, _IMPORTS)
    redirect_operators(names, text)
    extended = 0
    for at in range(0, len(text), 2):
        op, argument = text[at], text[at + 1] | extended
        extended = argument << 8 if op == _EXTENDED_ARG else 0
        if op != _LOAD_GLOBAL or argument >> 1 not in live:
            continue
        called = argument & 1
        new = live[argument >> 1]
        if not called and new not in _floats and new not in _MODULES and type(_extensions.get(new)) is not Extended:
            continue
        index = names.index(new) if new in names else len(names)
        if index >= (1 << 15 if argument > 255 else 1 << 7):  # no room for a longer argument: guards have to do
            continue
        if index == len(names):
            names.append(new)
        text[at + 1] = index << 1 & 255 | called
        if argument > 255:
            text[at - 1] = index >> 7
    if same and text == code.co_code:
        return code
    return code.replace(co_code=bytes(text), co_names=tuple(names), co_consts=nested)


def _constant(value: Any, scope: Mapping[str, Any]) -> Any:
    if isinstance(value, types.CodeType):
        return _redirect(value, scope)
    if type(value) is frozenset:  # ``n in {1, 2}``: a tuple asks the number itself, whatever it is
        return tuple(value)
    return Watchful(value) if type(value) is float else value


def _live_name(scope: Mapping[str, Any], name: str, code: types.CodeType) -> str | None:
    found = scope.get(name)
    if found is None:
        found = vars(builtins).get(name)
    if type(found) is float:
        name = f"{_PREFIX}float_{found!r}"
        _floats[name] = Watchful(found)
        return name
    live = _PREFIX + str(id(found))
    if id(found) in _LIVE:
        return live
    if isinstance(found, types.ModuleType):
        if not leads_to_extension(found, code.co_names):
            return None
        _extensions.setdefault(live, Extended(found))
    elif found is not None and is_extension(found):
        _extensions.setdefault(live, fixing(found))
    return live if live in _extensions else None
