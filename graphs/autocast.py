"""Regions of a forward in which torch casts automatically, or in which that is turned off.

``with torch.autocast(...)`` calls nothing that a recorder sees, so its ends are nodes of their own, which do to torch's
state what the two ends of the region do. A graph that is called inside another region counts on it, as the model does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import has_side_effect

from chase_fx.errors import CaptureError
from chase_fx.graphs.arguments import Arguments
from chase_fx.graphs.patches import Patch
from chase_fx.graphs.source import source_line

__all__ = [
    "AUTOCAST",
    "Regions",
    "casts",
    "enter_autocast",
    "exit_autocast",
    "outside_autocast",
    "preserved_modes",
    "region_settings",
    "remove_empty_regions",
]

_KINDS = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))

Settings = tuple[str, bool, torch.dtype, bool]  # type of device, enabled, dtype, weights are cast once


def region_settings(
    device: str | torch.device, enabled: bool, dtype: torch.dtype | None, cache: bool | None
) -> Settings:
    """What ``torch.autocast`` is told, with what it takes from the region around it."""
    kind = device.type if isinstance(device, torch.device) else device
    return (
        kind,
        enabled,
        torch.get_autocast_dtype(kind) if dtype is None else dtype,
        torch.is_autocast_cache_enabled() if cache is None else cache,
    )


def enter_autocast(settings: Settings) -> Settings:
    """Begin a region; gives what was set before."""
    kind = settings[0]
    before = _state(kind)
    _set(settings)
    torch.autocast_increment_nesting()
    return before


def exit_autocast(before: Settings) -> None:
    """End a region."""
    if torch.autocast_decrement_nesting() == 0:
        torch.clear_autocast_cache()
    _set(before)


# Kept although nobody reads their value, and in their places.
AUTOCAST: frozenset[Any] = frozenset({has_side_effect(enter_autocast), has_side_effect(exit_autocast)})


def casts(graph: Graph) -> bool:
    """Whether the graph has regions."""
    return any(node.target is enter_autocast for node in graph.nodes)


def _state(kind: str) -> Settings:
    return (
        kind,
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.is_autocast_cache_enabled(),
    )


def _states() -> list[Settings]:
    return [_state(kind) for kind in _KINDS]


def _set(settings: Settings) -> None:
    kind, enabled, dtype, cache = settings
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(cache)


@contextmanager
def preserved_modes(*, always: bool = False) -> Iterator[None]:
    """Puts torch's state back if what runs inside is left within a region, by an exception; or however it is left.

    That is what it casts, and whether gradients are enabled.
    """
    before = _states()
    gradients = torch.is_grad_enabled()
    depth = _depth()
    finished = False
    try:
        yield
        finished = not always
    finally:
        if not finished:
            for _ in range(_depth() - depth):
                torch.autocast_decrement_nesting()
            if depth == 0:
                torch.clear_autocast_cache()
            for settings in before:
                _set(settings)
            torch._C._set_grad_enabled(gradients)


@contextmanager
def outside_autocast() -> Iterator[None]:
    """No region inside the block."""
    with preserved_modes(always=True):
        for kind in _KINDS:
            torch.set_autocast_enabled(kind, False)
        yield


def _depth() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def remove_empty_regions(graph: Graph) -> None:
    """Erase the regions in which nothing runs that torch could cast."""
    opened: list[tuple[Node, bool]] = []
    for node in list(graph.nodes):
        if node.target is enter_autocast:
            opened.append((node, True))
        elif node.target is exit_autocast:
            enter, empty = opened.pop() if opened else (None, False)
            if enter is not None and empty and node.args[0] is enter and len(enter.users) == 1:
                graph.erase_node(node)
                graph.erase_node(enter)
            elif opened:
                opened[-1] = opened[-1][0], False
        elif opened and "tape" in node.meta:
            opened[-1] = opened[-1][0], False
    for node in reversed([n for n in graph.nodes if n.target is region_settings]):
        if not node.users:
            graph.erase_node(node)


class Regions:
    """Writes the regions of one forward while ``active`` says so."""

    def __init__(self, arguments: Arguments, active: Callable[[], bool]) -> None:
        self._arguments, self._active = arguments, active
        self._tape = arguments.tape
        self._settings: dict[int, tuple[Any, Node]] = {}
        self._begun: dict[int, tuple[Any, Node]] = {}  # the region is held, so that its identity stays unique
        self._open: list[tuple[int, Any, str]] = []
        self._expected = _states()
        self._casts = torch._C._is_any_autocast_enabled()

    def patches(self) -> list[Patch]:
        """Patches of ``torch.autocast``."""
        make: Callable[..., Any] = torch.autocast.__init__
        enter: Callable[..., Any] = torch.autocast.__enter__
        leave: Callable[..., Any] = torch.autocast.__exit__

        def made(
            self: Any,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            make(self, device_type, dtype, enabled, cache_enabled)
            if regions._active():
                works = enabled if device_type == "cuda" and not torch.cuda.is_available() else self._enabled
                kind = regions._kind(device_type)
                node = regions._call(region_settings, kind, bool(works), dtype, cache_enabled)
                regions._settings[id(self)] = self, node

        def entered(self: Any) -> Any:
            if not regions._active():
                return enter(self)
            regions._enter(self)
            out = enter(self)
            regions._expect()
            return out

        def left(self: Any, *error: Any) -> Any:
            if not regions._active():
                return leave(self, *error)
            regions._exit(self)
            out = leave(self, *error)
            regions._expect()
            return out

        regions = self
        new: dict[str, Callable[..., Any]] = {"__init__": made, "__enter__": entered, "__exit__": left}
        return [(torch.autocast, name, function) for name, function in new.items()]

    def check_call(self) -> None:
        """``check`` before a call: as long as torch casts nothing, the rest of its state does not matter.

        Raises:
            CaptureError: the forward set it otherwise than by a region.
        """
        if self._casts or torch._C._is_any_autocast_enabled():
            self.check()

    def check(self, end: str = "") -> None:
        """Refuse a forward that set torch's state otherwise than by a region, for nothing tells where that ends.

        Raises:
            CaptureError: it did.
        """
        if _states() != self._expected:
            raise CaptureError(
                f"the forward sets what torch casts by itself, before {end or source_line()}; use "
                "with torch.autocast(...), whose end is known"
            )

    def check_closed(self) -> None:
        """Refuse a forward that leaves a region open.

        Raises:
            CaptureError: it does.
        """
        self.check("its end")
        if self._open:
            raise CaptureError(
                f"the forward enters a region of torch.autocast at {self._open[-1][2]} and does not leave it, so what "
                "it casts depends on earlier calls; use a with statement"
            )

    def _expect(self) -> None:
        self._expected = _states()
        self._casts = torch._C._is_any_autocast_enabled()

    def _kind(self, device_type: str) -> Any:
        """A type of device that the forward names, or the device to read it from where the forward reads it."""
        device = self._arguments.device
        # A type that is read is a new string each time, not an interned one such as those that code names.
        named = sys.intern(device_type) is device_type
        return device_type if named or device is None or device.type != device_type else self._arguments.to_fx(device)

    def _call(self, fn: Callable[..., Any], *args: Any) -> Node:
        node = self._arguments.call(fn, args, plain=True)
        node.meta["source"] = source_line()
        return node

    def _enter(self, region: Any) -> None:
        self.check()
        told = region.device, region._enabled, region.fast_dtype
        known = self._settings.get(id(region))
        settings = (*told, region._cache_enabled) if known is None else known[1]  # made before the forward, or in it
        self._begun[id(region)] = region, self._call(enter_autocast, settings)
        self._open.append((id(region), told, source_line()))
        self._mark()

    def _exit(self, region: Any) -> None:
        places = [i for i, (found, _, _) in enumerate(self._open) if found == id(region)]
        if not places:
            raise CaptureError(
                f"the forward leaves a region of torch.autocast at {source_line()} that it did not enter, so what it "
                "casts depends on earlier calls; use a with statement"
            )
        self._call(exit_autocast, self._begun[id(region)][1])  # the last, if it was entered again inside: as torch does
        del self._open[places[-1]]
        self._mark()

    def _mark(self) -> None:
        self._tape.regions.append((len(self._tape.ops), tuple(settings for _, settings, _ in self._open)))
