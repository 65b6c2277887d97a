"""Whether the code of a module writes to what lives longer than a call: globals, classes, objects, closures.

A module that the graph calls as it is runs its code in every call, while the rest of the forward, which may read or
reset what it wrote, is a graph. What it keeps on itself is compared otherwise (see :mod:`.given`).
"""

from __future__ import annotations

import dis
import functools
import types

from torch import nn

from chase_fx.graphs.reach import codes_in, reachable_code

__all__ = ["writes_state"]

_MAKERS = frozenset({"__init__", "__new__", "__post_init__"})  # what they write to is new
_WRITES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
_CHANGING = frozenset(
    {"append", "appendleft", "clear", "extend", "insert", "pop", "popitem", "popleft", "remove", "setdefault", "update"}
)


def writes_state(module: nn.Module) -> bool:
    """Whether what a call of ``module`` runs may write to more than its own variables, its attributes and tensors."""
    own = {id(member) for cls in type(module).__mro__ for member in vars(cls).values()}
    functions = (f for f in reachable_code(module).functions if f.__name__ not in _MAKERS)
    return any(_writes(code, id(f) in own) for f in functions for code in codes_in(f.__code__))


@functools.lru_cache(maxsize=1000)
def _writes(code: types.CodeType, method: bool) -> bool:
    steps = list(dis.get_instructions(code))
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    made = set(code.co_varnames) - set(given)
    tensors = set(given[1:]) if method and code.co_name == "forward" else set()
    for i, step in enumerate(steps):
        name = step.opname
        if name in _WRITES or (name in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars):
            return True
        if name in ("STORE_ATTR", "DELETE_ATTR") and _loaded(steps, i - 1) not in (given[:1] if method else ()):
            return True
        if name in ("STORE_SUBSCR", "DELETE_SUBSCR") and _loaded(steps, _before(steps, i - 1)) not in made | tensors:
            return True
        if name == "LOAD_METHOD" and step.argval in _CHANGING and _loaded(steps, i - 1) not in made:
            return True
    return False


def _loaded(steps: list[dis.Instruction], i: int) -> str | None:
    """The variable that a step loads."""
    return str(steps[i].argval) if i >= 0 and steps[i].opname == "LOAD_FAST" else None


def _before(steps: list[dis.Instruction], i: int) -> int:
    """The step that gave what lies on the stack below the value that ends at ``i``; -1 where this is unclear."""
    need = 1
    while i >= 0 and need > 0:
        step = steps[i]
        if "JUMP" in step.opname or step.opname in ("SWAP", "COPY"):
            return -1
        need -= dis.stack_effect(step.opcode, step.arg)
        i -= 1
    return i
