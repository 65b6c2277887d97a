"""The code of graphs: compiled once for each text, and a function of its own for each module."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.graph import PythonCode

import chase_fx
from chase_fx.graphs import forwards
from chase_fx.graphs.duplicate import copied_graph
from chase_fx.graphs.forwards import compiled


class Scaled(nn.Module):
    """Keeps its text when it is pruned; has arguments with defaults of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.outer(self.inner(x).relu() * scale)


class Viewed(nn.Module):
    """Another text when it is pruned, and another graph in train mode, which keeps its text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return self.outer(y.relu() if self.training else y.view(-1, 8).tanh())


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts that are compiled in a test."""
    found: list[str] = []
    original: Any = forwards._forward_from_src

    def noted(src: str, *args: Any) -> Any:
        found.append(src)
        return original(src, *args)

    monkeypatch.setattr(forwards, "_forward_from_src", noted)
    return found


def _pruned(traced: chase_fx.TracedModule) -> chase_fx.TracedModule:
    return chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(channel_sparsity=0.5))


def test_a_slim_module_of_the_same_text_is_not_compiled_again(compilations: list[str]) -> None:
    traced = chase_fx.trace(Scaled(), torch.zeros(3, 4))
    assert len(compilations) == 1
    slim, twin = _pruned(traced), copy.deepcopy(traced)
    assert len(compilations) == 1
    assert slim.code == traced.code == twin.code
    own: list[Any] = [type(module).forward for module in (traced, slim, twin)]
    assert len({id(forward.__code__) for forward in own}) == 3  # torch.compile remembers what it knows by this
    assert len({forward.__code__.co_filename for forward in own}) == 3
    for forward in own:
        assert "".join(linecache.getlines(forward.__code__.co_filename)).strip() == traced.code.strip()
    x = torch.randn(3, 4)
    assert torch.equal(slim(x, 2.0), slim.outer(slim.inner(x).relu() * 2.0))
    assert torch.equal(twin(x, mask=None), traced(x))


def test_only_what_reads_differently_is_compiled(compilations: list[str]) -> None:
    traced = chase_fx.trace(Viewed(), torch.zeros(3, 4))
    assert traced.train_graph is not None
    assert len(compilations) == 2
    slim = _pruned(traced)
    assert len(compilations) == 3
    assert "4" in slim.code
    assert slim.code != traced.code
    report = chase_fx.verify(traced, slim)
    assert report.difference <= report.tolerance
    assert torch.equal(slim.train()(torch.ones(3, 4)), slim.outer(slim.inner(torch.ones(3, 4)).relu()))


def test_an_edit_of_the_graph_comes_along_whether_it_was_recompiled_or_not() -> None:
    traced = chase_fx.trace(Scaled(), torch.zeros(3, 4))
    relu = next(node for node in traced.graph.nodes if node.target == "relu")
    relu.target = "tanh"
    x = torch.randn(3, 4)
    for slim in (_pruned(traced), copy.deepcopy(traced)):
        assert torch.equal(slim(x), slim.outer(slim.inner(x).tanh() * 2.0))


def test_the_same_text_about_other_objects_is_compiled() -> None:
    text = "def forward(self, x):\n    return operation(x)\n"
    first = compiled(PythonCode(text, {"operation": abs}, None), {})
    other = compiled(PythonCode(text, {"operation": str}, None), {text: first})
    assert (first(None, -1), other(None, -1)) == (1, "-1")


def test_a_copied_graph_is_what_deepcopy_makes() -> None:
    graph = chase_fx.trace(Scaled(), torch.zeros(3, 4)).graph
    own, want = copied_graph(graph), copy.deepcopy(graph)
    for node, other, original in zip(own.nodes, want.nodes, graph.nodes, strict=True):
        assert (node.name, node.op, node.target, node.type) == (other.name, other.op, other.target, other.type)
        assert str(node.args) == str(other.args)
        assert str(node.kwargs) == str(other.kwargs)
        assert node.meta == other.meta
        assert node.meta is not original.meta
        assert all(part.graph is own for part in node.all_input_nodes)
    own.lint()
    assert own.python_code("self").src == want.python_code("self").src


def test_metadata_of_the_profiler_are_those_that_fx_gives() -> None:
    with torch.fx.experimental._config.patch(enrich_profiler_metadata=True):
        traced = chase_fx.trace(Scaled(), torch.zeros(3, 4))
        slim = _pruned(traced)
    assert "_RecordFunctionFast" in slim.code
    assert torch.equal(slim(torch.ones(3, 4)), slim.outer(slim.inner(torch.ones(3, 4)).relu() * 2.0))


class Named(nn.Module):
    """Children of the names that a traced module uses itself; a default that calls change."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled_texts, self.moved = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, seen: list[int] = []) -> torch.Tensor:  # noqa: B006
        seen.append(1)
        return self.moved(self.compiled_texts(x).relu())


def test_names_and_defaults_belong_to_each_module() -> None:
    slim = _pruned(chase_fx.trace(Named(), torch.zeros(3, 4)))
    assert copy.deepcopy(slim)(torch.zeros(3, 4)).shape == slim(torch.zeros(3, 4)).shape == (3, 2)


def test_threads_may_recompile_one_module() -> None:
    slim = _pruned(chase_fx.trace(Scaled(), torch.zeros(3, 4)))
    text = slim.code
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: slim.recompile().src, range(200)))
    assert set(codes) == {text}
