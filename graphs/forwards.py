"""The code that is generated from graphs, and the ``forward`` of a module that has one for each mode."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph
from torch.fx.graph import PythonCode
from torch.fx.graph_module import _forward_from_src, _loader

from chase_fx.errors import CaptureError
from chase_fx.graphs.autocast import casts, preserved_modes
from chase_fx.graphs.branches import python_code
from chase_fx.graphs.enabled import enables
from chase_fx.graphs.variants import Forward

__all__ = ["Texts", "by_mode", "compiled", "forward_of", "has_regions", "own_code", "preserving"]

# Functions that were compiled, by their text.
Texts = Mapping[str, types.FunctionType]

_GENERATING = threading.RLock()


def forward_of(graphs: Sequence[Graph], train_error: str | None, flag: str) -> Forward:
    """The code of the graphs of one capture, the one in eval mode first; module ``flag`` tells which of two runs."""
    evaluate, *train = (compiled(python_code(graph), {}) for graph in graphs)
    forward = by_mode(evaluate, train[0] if train else None, train_error, flag)
    return preserving(forward) if any(map(has_regions, graphs)) else forward


def compiled(code: PythonCode, known: Texts) -> types.FunctionType:
    """The forward that ``code`` defines.

    To compile a long one takes longer than to generate it, so if its text is ``known`` that function is copied: its
    code is an object of its own, as what torch.compile remembers of a function belongs to that.
    """
    found = known.get(code.src)
    if found is None or any(found.__globals__.get(name) is not value for name, value in code.globals.items()):
        return cast("types.FunctionType", _forward_from_src(code.src, code.globals, {}))
    place = _loader.cache(code.src, code.globals)  # where tracebacks find the text
    own = found.__code__.replace(co_filename=place)
    made = types.FunctionType(own, dict(found.__globals__), found.__name__, copy.deepcopy(found.__defaults__))
    made.__kwdefaults__, made.__annotations__ = copy.deepcopy(found.__kwdefaults__), dict(found.__annotations__)
    return made


@contextmanager
def own_code(graph: Graph) -> Iterator[PythonCode]:
    """The code of ``graph``; FX, told to compile it inside the block, is given none: that would be done twice."""
    with _GENERATING:
        code = python_code(graph)
        graph.__dict__["python_code"] = lambda **_: replace(code, src="def forward(self): ...")
        try:
            yield code
        finally:
            del graph.__dict__["python_code"]


def has_regions(graph: Graph) -> bool:
    """Whether the graph casts, or enables gradients, in a part of it: modes that an error might leave on."""
    return casts(graph) or enables(graph)


def by_mode(evaluate: Forward, train: Forward | None, train_error: str | None, flag: str) -> Forward:
    """The forward of a module in either mode; its submodule ``flag`` tells which, if there is code for both."""
    if train_error is not None:
        return _choosing(evaluate, _refusal(train_error), lambda module: module.training)
    if train is not None:
        return _choosing(evaluate, train, lambda module: getattr(module, flag)())
    return evaluate


def preserving(run: Forward) -> Forward:
    """``run``, which leaves modes as they were also where it fails."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        with preserved_modes():
            return run(self, *args, **kwargs)

    return forward


def _refusal(train_error: str) -> Forward:
    def refuse(_module: nn.Module, *_args: Any, **_kwargs: Any) -> Any:
        raise CaptureError(f"this graph has no train mode: {train_error}")

    return refuse


def _choosing(evaluate: Forward, train: Forward, trains: Callable[[nn.Module], bool]) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return train(self, *args, **kwargs) if trains(self) else evaluate(self, *args, **kwargs)

    return forward
