"""Children of a model whose names a ``torch.fx.GraphModule`` has for itself, such as ``code``, ``graph`` or ``meta``.

``self.code`` of a graph module is its source, whatever the model calls its layers. The graph reads such a child under
another name, a property of the module's class; in ``state_dict`` and among the children it keeps its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

__all__ = ["given_path", "graph_path", "show_shadowed"]

_PREFIX = "_chase_own_"
_TAKEN = frozenset(dir(GraphModule(nn.Module(), Graph()))) - frozenset(dir(nn.Module()))
# What a traced or slim module has besides; it is defined where names are known already.
_TAKEN |= {"info", "plan", "train_graph", "graphs", "build", "channel_graphs", "variants", "moved", "compiled_texts"}
_TAKEN |= {"_dtypes", "_is_foreign"}


def graph_path(path: str) -> str:
    """How a graph reads the parameter, buffer or submodule at ``path``."""
    return _PREFIX + path if path.partition(".")[0] in _TAKEN else path


def given_path(path: str) -> str:
    """The inverse: the model's own name for what a graph reads."""
    return path.removeprefix(_PREFIX)


def show_shadowed(module: GraphModule) -> None:
    """Give the class of ``module``, which is its own, a property for each shadowed child."""
    for name in _TAKEN:
        if any(name in children for children in (module._modules, module._parameters, module._buffers)):
            setattr(type(module), _PREFIX + name, property(_reader(name)))


def _reader(name: str) -> Any:
    def read(self: nn.Module) -> Any:
        for children in (self._modules, self._parameters, self._buffers):
            if name in children:
                return children[name]
        raise AttributeError(name)

    return read
