"""Random draws of a forward: which the graph makes again, and what they decide.

A draw that Python decides by (LayerDrop) ends up as a node that tells its outcome; in train mode the other way is
captured too (see :mod:`.ways`). What no graph could draw again, or what Python computes from a draw beyond
arithmetic, can't be captured in train mode: every call would go on with the numbers of the capture.
"""

from __future__ import annotations

import functools
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from chase_fx.errors import CaptureError
from chase_fx.graphs.decisions import READS_DATA
from chase_fx.graphs.draws import (
    GENERATORS,
    OWN_GENERATORS,
    DrawnArray,
    certain,
    decided,
    drawn,
    draws,
    fresh_seed,
    is_drawn,
    reseed,
)
from chase_fx.graphs.guards import COMPARE
from chase_fx.graphs.live import LiveFloat, LiveInt, plain
from chase_fx.graphs.patches import Patch
from chase_fx.graphs.reach import Code
from chase_fx.graphs.reads import Reads
from chase_fx.graphs.source import source_line
from chase_fx.graphs.standins import StandIns
from chase_fx.graphs.traced import OutputLeaf
from chase_fx.graphs.whole import Function, bindings, named

__all__ = ["Drawing"]


class Drawing(Reads):
    """A recording of random draws."""

    def __init__(self, root: nn.Module, device: torch.device | None, code: Code, *, standins: StandIns | None) -> None:
        super().__init__(root, device, standins=standins)
        self.code = code
        self.training = root.training
        self.outputs: tuple[OutputLeaf, ...] = ()  # the tensors of the result
        self.lost_draw = ""  # what no graph can draw again
        self.drawers: dict[int, Callable[..., Any]] = {}  # what stands for a function that draws, by its identity
        self.generators: Callable[[], Any] = lambda: None
        self._known_state: Any = None
        self._own: list[tuple[Any, bytes]] = []

    # -- generators ---------------------------------------------------------------------------------------------------

    def watch_generators(self, state: Callable[[], Any]) -> None:
        """From here on a draw that is no call of ours is noticed by the generators' state."""
        self.generators, self._known_state = state, state()
        if self.training:
            found = {id(g): g for g in self._generators_of_model()}
            self._own = [(g, _state(g)) for g in found.values()]

    def check_generators(self) -> None:
        """What was drawn since the last look, drew without being seen."""
        if self.generators() != self._known_state:
            self._known_state = self.generators()
            self._lose("Python's or NumPy's random generator", "")
        if any(_state(g) != before for g, before in self._own):
            self._lose("a random generator of the model's own", "")
        if self.training and self.lost_draw:  # the model may have caught the exception
            raise CaptureError(self.lost_draw)

    @contextmanager
    def draws_itself(self) -> Iterator[None]:
        """What runs inside the block stays one call of the graph, which draws again by itself."""
        self.check_generators()
        yield
        self._known_state = self.generators()

    def _generators_of_model(self) -> Iterator[Any]:
        for _, module in self.modules:
            yield from (v for v in vars(module).values() if isinstance(v, OWN_GENERATORS))
        for function in self.code.functions:
            scope = function.__globals__
            yield from (v for n in function.__code__.co_names if isinstance(v := scope.get(n), OWN_GENERATORS))

    def _lose(self, what: str, line: str | None = None) -> None:
        """Numbers of the capture stay in the graph, which train mode refuses."""
        line = source_line() if line is None else line
        place = f" at {line}" if line else ""
        if self.training:
            self._refuse(
                f"{what}{place} draws numbers that a graph can't draw again, so every call would go on with those of "
                "the capture; draw them with torch operations"
            )
        self.specialised.append(f"numbers drawn by {what}{place}")

    def _refuse(self, reason: str) -> NoReturn:
        self.lost_draw = self.lost_draw or reason
        raise CaptureError(self.lost_draw)

    def redraws(self, what: str, start: int) -> None:
        """What a function drew since ``start`` its backward may draw in another way, to compute what it computed."""
        if self.training and any(map(draws, self.tape.ops[start:])):
            self._refuse(
                f"{what}, applied at {source_line()}, draws random numbers in code that its backward runs again, and a "
                "graph can't tell whether it draws the same ones there"
            )

    def draw_patches(self) -> list[Patch]:
        """For every function that draws or sets a seed."""
        patches: list[Patch] = []
        for module, home in GENERATORS.items():
            for name, function in vars(home).items():
                if isinstance(getattr(function, "__self__", None), OWN_GENERATORS) and not name.startswith("get"):
                    self.drawers[id(function)] = self._drawer(module, name, function)
                    patches.append((home, name, self.drawers[id(function)]))
        for home in (torch, torch.random):
            patches += [(home, "manual_seed", self._manual_seed(torch.random.manual_seed))]
            patches += [(home, "seed", self._fresh_seed(torch.random.seed))]
            patches += [(home, "set_rng_state", self._set_state(torch.random.set_rng_state))]
        for home in {id(f.__globals__): sys.modules.get(f.__module__) for f in self.code.functions}.values():
            for name, value in vars(home).items() if home is not None else ():
                if id(value) in self.drawers:  # from random import random
                    patches.append((home, name, self.drawers[id(value)]))
        return [*patches, *self._array_patches()]

    def _drawer(self, module: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def draw(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return function(*args, **kwargs)
            self.check_generators()
            out = function(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
            self._known_state = self.generators()
            numbers = all(v is None or isinstance(v, (int, float, str)) for v in (*args, *kwargs.values()))
            if not numbers or not (out is None or isinstance(out, float)):
                self._lose(f"{module}.{name}")
                return out
            node = self.graph.call_function(
                drawn, (module, name, *self.arguments.to_fx(args)), self.arguments.to_fx(kwargs)
            )
            node.meta["source"] = source_line()
            return None if out is None else self._number(float(out), node)

        return draw

    def _number(self, value: float, node: Node) -> LiveFloat:
        found: LiveFloat = LiveFloat(value, self, lambda: node)
        found.drawn = True
        return found

    def _manual_seed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def manual_seed(seed: Any) -> Any:
            if self._active:
                node = self.graph.call_function(reseed, (self.arguments.to_fx(seed),))
                node.meta["source"] = source_line()
            return original(plain(seed))

        return manual_seed

    def _fresh_seed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def seed() -> Any:
            value = original()
            if not self._active:
                return value
            node = self.graph.call_function(fresh_seed)
            node.meta["source"] = source_line()
            return LiveInt(value, self, lambda: node)

        return seed

    def _set_state(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_rng_state(state: Any) -> Any:
            if self._active:
                self._lose("set_rng_state")
            return original(state)

        return set_rng_state

    # -- functions of the model that draw arrays ----------------------------------------------------------------------

    def _array_patches(self) -> Iterator[Patch]:
        """Functions of the top level that draw with NumPy, in train mode."""
        for function in self.code.functions if self.training else ():
            scope, code = function.__globals__, function.__code__
            draws = "random" in code.co_names and any(scope.get(n) in (np, np.random) for n in code.co_names)
            if draws and named((function.__module__, function.__name__)) is function:
                for module, name in bindings(function, self.code.functions):
                    yield module, name, self._array_drawer(function)

    def _array_drawer(self, function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return function(*args, **kwargs)
            self.check_generators()
            states = random.getstate(), np.random.get_state(legacy=False), torch.random.get_rng_state()  # noqa: NPY002
            start = len(self.tape.ops)
            with self._paused(), torch._C.DisableTorchFunction():
                out = function(*_plain(args), **_plain(kwargs))
            if isinstance(out, np.ndarray) and self.generators() != self._known_state:
                self._known_state = self.generators()
                return self._array(function, (args, kwargs), out, start)
            del self.tape.ops[start:]  # it draws no array, so what it does is recorded like any other
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            _set_rng_state(states[2])
            return function(*args, **kwargs)

        return call

    def _array(
        self, function: Function, given: tuple[tuple[Any, ...], dict[str, Any]], out: np.ndarray, start: int
    ) -> DrawnArray:
        args, kwargs = given
        self._need_values(args, kwargs)
        node = self._node("call_function", function, args, kwargs, start)
        node.meta["draws"] = True
        for op in self.tape.ops[start:]:
            op.whole = "the forward draws all of it"
        self._finish(node, (), args, kwargs, start, in_place=False)
        return DrawnArray(out, node, source_line())

    # -- decisions ----------------------------------------------------------------------------------------------------

    def decide(self, left: Any, comparison: str, right: Any, holds: bool) -> bool:
        """The forward goes on with the outcome of a comparison of numbers that were drawn."""
        return self._drawn_truth(self.arguments.number(COMPARE[comparison], (left, right)), holds)

    def _drawn_truth(self, node: Node, found: bool) -> bool:
        return found if certain(node) else self._settle(decided, node, found)

    def lose(self, number: Any) -> None:
        """Python goes on with a whole or plain number that was made from a draw."""
        self._lose(f"a number such as {plain(number)}")

    def _python_value(self, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward reads from a tensor; if it was drawn, the graph follows."""
        tensor = args[0] if args and name in READS_DATA else None
        node = self.arguments.node_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if node is None or not is_drawn(node):
            return super()._python_value(name, out, args, kwargs)
        if name in ("__bool__", "is_nonzero"):
            return self._drawn_truth(node, bool(out))
        if name != "item" or not isinstance(out, (bool, float)):
            self._lose(f"'{name}' of a tensor")
            return out
        number = self.graph.call_method("item", (node,))
        number.meta["source"] = source_line()
        return self._drawn_truth(number, out) if isinstance(out, bool) else self._number(out, number)


_set_rng_state = torch.random.set_rng_state


def _state(generator: Any) -> bytes:
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    return pickle.dumps(generator.getstate() if isinstance(generator, random.Random) else generator.__getstate__())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else plain(value)
