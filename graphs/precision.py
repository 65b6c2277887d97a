"""Constants that follow the model's precision: ``y.to(x.dtype)``, ``torch.finfo(x.dtype).min``.

A dtype that the forward reads from a tensor is the same object as one that it names, so one capture can't tell
``to(x.dtype)``, which has to follow ``module.to(bfloat16)``, from ``to(torch.float32)``, which must not. A second
capture in another precision can: what differs between the two followed the model. It runs on meta tensors, so it costs
the Python of a forward and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from chase_fx.graphs.trees import map_tensors

__all__ = [
    "Change",
    "apply_changes",
    "compare",
    "complex_of",
    "in_precision",
    "limit_of",
    "may_follow",
    "other_precision",
]

_LIMITS = ("min", "max", "eps", "tiny", "resolution")
_FACTORS = frozenset(
    {1.0, 2.0, 4.0, 8.0, 10.0, 100.0, 0.5, 0.25, 0.125, 0.1, 0.01}
)  # multiples that a forward may take
_LEAST = 1e-3  # the least share of the largest number that one may take


@dataclass(frozen=True)
class Change:
    """An argument that follows the model's precision.

    Attributes:
        node: the node's name.
        path: keys that lead to the argument from ``(args, kwargs)``.
        make: the function of the dtype that gives the value, and its further arguments; none for the dtype itself.
    """

    node: str
    path: tuple[Any, ...]
    make: tuple[Any, ...]


def limit_of(dtype: torch.dtype, name: str, factor: float) -> float:
    """A multiple of one of the limits of a floating-point type, such as half of its minimum."""
    return float(getattr(torch.finfo(dtype), name)) * factor


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex type of a floating-point type; one that operators support, and spelt so that compilers follow."""
    if dtype is torch.float64:
        return torch.complex128
    return torch.complex32 if dtype is torch.float16 else torch.complex64


def other_precision(root: nn.Module, *, casts: bool) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtype of most floating-point parameters and one to compare with; ``None`` if there are none.

    Where torch ``casts`` automatically, that is one that it casts, too: it leaves doubles as they are.
    """
    counts: dict[torch.dtype, int] = {}
    for p in root.parameters():
        if p.is_floating_point():
            counts[p.dtype] = counts.get(p.dtype, 0) + 1
    if not counts:
        return None
    own = max(counts, key=lambda dtype: counts[dtype])
    if own is not torch.float32:
        return own, torch.float32
    return own, torch.bfloat16 if casts else torch.float64


@contextmanager
def in_precision(
    root: nn.Module, own: torch.dtype, other: torch.dtype, device: torch.device | None
) -> Iterator[Callable[[Any], Any]]:
    """Inside the block the tensors of ``root`` whose dtype is ``own`` are in the ``other`` one, on ``device`` if given.

    Yields the function that does the same to inputs.
    """
    memo: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            dtype = other if tensor.dtype is own else tensor.dtype
            if device is not None and tensor.layout is torch.strided:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
            else:
                new = tensor.detach().to(device=device, dtype=dtype, copy=True)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = new
        return memo[id(tensor)]

    def mapped(value: Any) -> Any:
        return map_tensors(value, moved)

    homes: list[dict[str, Any]] = [home for m in root.modules() for home in (m._parameters, m._buffers)]
    before = [dict(home) for home in homes]
    try:
        for home in homes:
            home.update(mapped(dict(home)))
        yield mapped
    finally:
        for home, tensors in zip(homes, before, strict=True):
            home.update(tensors)


def compare(
    graph: Graph, found: Graph, own: torch.dtype, other: torch.dtype, *, strict: bool = False
) -> list[Change] | None:
    """What of ``graph``, captured in ``own`` precision, follows it; ``found`` is the same forward in the ``other`` one.

    ``None`` where the two have different structures, and, if ``strict``, where a constant differs that was not made
    from the precision in any way that is known.
    """
    ours, theirs = list(graph.nodes), list(found.nodes)
    if list(map(_call, ours)) != list(map(_call, theirs)):
        return None
    twin = dict(zip(ours, theirs, strict=True))
    changes: list[Change] = []

    def walk(a: Any, b: Any, node: Node, path: tuple[Any, ...]) -> bool:
        if isinstance(a, Node):
            return twin.get(a) is b
        if isinstance(a, (tuple, list)):
            same = isinstance(b, (tuple, list)) and len(a) == len(b)
            return same and all(walk(x, y, node, (*path, i)) for i, (x, y) in enumerate(zip(a, b, strict=True)))
        if isinstance(a, dict):
            return isinstance(b, dict) and set(a) == set(b) and all(walk(a[k], b[k], node, (*path, k)) for k in a)
        make = _made(a, b, own, other)
        if make is not None:
            changes.append(Change(node.name, path, make))
        return make is not None or not strict or _same(a, b)

    alike = all(walk((a.args, a.kwargs), (b.args, b.kwargs), a, ()) for a, b in twin.items())
    return changes if alike else None


def _same(a: Any, b: Any) -> bool:
    """Whether two constants are one, whatever they are made of."""
    return type(a) is type(b) and str(a) == str(b)


def _call(node: Node) -> tuple[Any, ...]:
    return (node.op,) if node.op == "get_attr" else (node.op, node.target)  # constants have other names in train mode


def may_follow(graph: Graph, own: torch.dtype) -> bool:
    """Whether any argument in ``graph`` looks as if it was made from dtype ``own``."""
    found = False

    def look(value: Any) -> None:
        nonlocal found
        if isinstance(value, (tuple, list)):
            for v in value:
                look(v)
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (float, torch.dtype)):
            found = found or any(True for _ in _ways(value, own))

    for node in graph.nodes:
        look((node.args, node.kwargs))
        if found:
            return True
    return False


def _made(a: Any, b: Any, own: torch.dtype, other: torch.dtype) -> tuple[Any, ...] | None:
    """How constant ``a`` was made from dtype ``own``, if ``b`` was made in the same way from ``other``."""
    if type(a) is not type(b) or (isinstance(a, float) and a == b):
        return None
    return next((way for way in _ways(a, own) if way in _ways(b, other)), None)


def _ways(value: Any, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Every way to make a constant from a dtype: the dtype itself, its complex one, a multiple of its limits."""
    if isinstance(value, torch.dtype):
        if value is dtype:
            yield ()
        elif value is dtype.to_complex():
            yield (complex_of,)
    elif isinstance(value, float):
        for name in _LIMITS:
            factor = value / limit_of(dtype, name, 1.0)
            if abs(factor) in _FACTORS:
                yield (limit_of, name, factor)
            elif name in ("min", "max") and _LEAST < abs(factor) < 1:  # so large that hardly anything else is meant
                yield (limit_of, name, float(f"{factor:.12g}"))  # which rounding does not tell apart


def apply_changes(graph: Graph, changes: Sequence[Change], root: nn.Module, own: torch.dtype) -> None:
    """Let the arguments in ``changes`` follow the dtype of the first parameter of ``root`` whose dtype is ``own``."""
    if not changes:
        return
    parameter = next(name for name, p in root.named_parameters() if p.dtype is own)
    nodes = {node.name: node for node in graph.nodes}
    made: dict[tuple[Any, ...], Node] = {}

    def call(target: Any, args: tuple[Any, ...]) -> Node:
        node = graph.create_node("get_attr", target, (), {}) if not args else graph.call_function(target, args)
        node.meta["source"] = ""
        return node

    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        dtype = made[()] = call(getattr, (call(parameter, ()), "dtype"))
        for change in changes:
            if change.make not in made:
                made[change.make] = call(change.make[0], (dtype, *change.make[1:]))
    for change in changes:
        node = nodes[change.node]
        node.args, node.kwargs = _replaced((node.args, node.kwargs), change.path, made[change.make])


def _replaced(value: Any, path: tuple[Any, ...], new: Node) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {k: _replaced(v, rest, new) if k == key else v for k, v in value.items()}
    items = [_replaced(v, rest, new) if i == key else v for i, v in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
