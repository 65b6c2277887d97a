"""Where the weights of recurrent layers lie."""

from __future__ import annotations

from torch import nn

from chase_fx.graphs.walk import modules_of

__all__ = ["join_weights"]


def join_weights(root: nn.Module) -> None:
    """Lay the weights of each recurrent layer in one piece, where cuDNN runs it; in place, without a change of values.

    cuDNN takes them in one piece only, and would put them together in every call. torch does so when a layer is made or
    moved, but not when its tensors are copied or replaced one by one.
    """
    for _, module in modules_of(root):
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
