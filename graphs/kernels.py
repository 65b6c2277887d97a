"""Which kernels run while the calls of a forward are recorded, and while they are found again in a graph.

torch picks kernels by device, precision and what is installed. A capture asks for those that are recorded call by call,
so that the same channels are found everywhere, and that a graph makes the same calls in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from chase_fx.graphs.walk import modules_of, parameters_in

__all__ = ["plain_kernels"]


@contextmanager
def plain_kernels(root: nn.Module) -> Iterator[None]:
    """Recurrent layers step by step, and on accelerators attention as two products around a softmax.

    oneDNN and cuDNN would run a whole recurrent layer as one call that nothing is known of. The fused attention of
    accelerators is chosen by precision, and there is none for double; on the CPU it is one for all.
    """
    modules = modules_of(root)
    recurrent = any(isinstance(module, nn.RNNBase) for _, module in modules)
    elsewhere = any(p.device.type not in ("cpu", "meta") for p in parameters_in(modules).values())
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(onednn and not recurrent)
    torch._C._set_cudnn_enabled(cudnn and not recurrent)
    try:
        with sdpa_kernel(SDPBackend.MATH) if elsewhere else nullcontext():
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)
