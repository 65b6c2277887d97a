"""Which outputs of a forward must keep their shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from chase_fx.errors import ArgumentError
from chase_fx.graphs.traced import TraceInfo

__all__ = ["Outputs", "select_outputs"]

Outputs = str | int | Sequence[str | int] | Callable[[str], bool] | None


def select_outputs(info: TraceInfo, outputs: Outputs) -> tuple[str, ...]:
    """The paths that ``outputs`` means, in the order of the forward's result; ``None`` means all.

    Raises:
        ArgumentError: an output that the model does not have, none at all, or something that names no output.
    """
    paths = list(dict.fromkeys(leaf.path for capture in info.captures for leaf in capture.outputs))
    if outputs is None:
        return tuple(paths)
    if callable(outputs):
        chosen = [p for p in paths if outputs(p)]
    else:
        chosen = [p for want in _wanted(outputs) for p in _matching(want, paths)]
    if not chosen:
        raise ArgumentError(f"outputs selects none of {', '.join(paths)}; at least one output must keep its shape")
    return tuple(dict.fromkeys(chosen))


def _wanted(outputs: object) -> list[str | int]:
    items: list[object] = [outputs]
    if isinstance(outputs, Iterable) and not isinstance(outputs, (str, bytes)):
        items = list(outputs)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise ArgumentError(
                f"outputs must be a name, an index, several of them, or a predicate on names, found {item!r}"
            )
    return items  # type: ignore[return-value]  # checked one by one


def _matching(want: str | int, paths: list[str]) -> list[str]:
    if isinstance(want, int):
        if not -len(paths) <= want < len(paths):
            raise ArgumentError(f"no output {want}; there are {len(paths)}: {', '.join(paths)}")
        return [paths[want]]
    match = [p for p in paths if p == want or p.startswith(f"{want}.")]
    if not match:
        raise ArgumentError(f"no output {want!r}; there are {', '.join(paths)}")
    return match
