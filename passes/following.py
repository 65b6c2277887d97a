"""Interpreters of graphs in which data decide which of two ways runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.fx import Graph, Interpreter, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from chase_fx.graphs.branches import BEGINNINGS, follow, join, otherwise
from chase_fx.graphs.traced import TracedModule

__all__ = ["Following", "plain", "ways"]


def ways(graph: Graph) -> Iterator[dict[str, bool]]:
    """For each way of each thing that data decide in ``graph``: which decisions lead there, itself the last."""
    around: dict[str, bool] = {}
    for node in graph.nodes:
        if node.target in (otherwise, join):
            name, _ = around.popitem()
            if node.target is otherwise:
                around[name] = False
        elif node.target in BEGINNINGS:
            if node.target is follow:
                yield from ({**around, node.name: taken} for taken in (True, False))
            around[node.name] = True


def plain(value: Any) -> Any:
    """Arguments of a node with the lists and dicts of the generated code, where the graph has immutable ones."""
    if isinstance(value, immutable_dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, immutable_list):
        return [plain(item) for item in value]
    if type(value) is tuple:
        return tuple(plain(item) for item in value)
    return value


class Following(Interpreter):
    """Runs the nodes that the generated code would run; every other one gives None.

    Args:
        module: whose parameters and submodules it runs on.
        graph: one of its graphs.
        forced: which ways to go, whatever the data decide there.

    Attributes:
        taken: which ways it went.
    """

    def __init__(self, module: TracedModule, graph: Graph, forced: Mapping[str, bool]) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.forced = forced
        self.taken: dict[str, bool] = {}
        self.at = ""
        self._ways: list[tuple[bool, bool]] = []  # of each block around: whether it is reached, and its first way taken
        self._runs = True

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        """The result for ``args``, one for each placeholder.

        ``Interpreter.run`` would make a progress bar for each run, shown or not, and a thread that watches it.
        """
        self._ways, self._runs, self.env, self.args_iter = [], True, {}, iter(args)
        out = None
        for node in self.graph.nodes:
            out = self.env[node] = self.run_node(node)
            for used in self.user_to_last_uses.get(node, ()):
                del self.env[used]
            if not node.users:
                del self.env[node]
        return out

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002  (torch's signature)
        """One value for each placeholder, also for ``*args`` and ``**kwargs``."""
        return next(self.args_iter)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Functions may ask what they are given, and write to it."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return plain(args), plain(kwargs)

    def run_node(self, n: Node) -> Any:
        """One node, if the way that it lies on was taken."""
        self.at = n.name
        if n.target in BEGINNINGS:
            taken = bool(super().run_node(n)) if self._runs else False
            if self._runs:
                taken = self.taken[n.name] = self.forced.get(n.name, taken)
            self._ways.append((self._runs, taken))
            self._runs = self._runs and taken
            return taken
        if n.target is otherwise:
            reached, taken = self._ways[-1]
            self._runs = reached and not taken
            return not taken
        if n.target is join:
            self._runs = self._ways.pop()[0]
            return None
        return self.compute(n) if self._runs else None

    def compute(self, node: Node) -> Any:
        """The value of a node that runs."""
        return super().run_node(node)
