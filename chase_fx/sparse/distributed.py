"""Several processes: what a decision depends on is made the same on all of them, and checked to be.

Gradients are averaged before they rank anything; random choices come from a generator that rank 0 hands out; and after
every change of masks or channels the ranks compare a digest of what they decided. Everything here does nothing in a
single process.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chase_fx.errors import ArgumentError, ChaseError

__all__ = [
    "RanksDisagreeError", "agree", "average_gradients", "broadcast", "gather", "rank", "rebuild", "refuse_sharded",
    "sum_over_ranks", "unwrap", "world_size",
]  # fmt: skip


class RanksDisagreeError(ChaseError):
    """The processes of one run have come to different masks, channels or settings."""


def world_size() -> int:
    """Number of processes; 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def unwrap(module: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The module inside wrappers of ``torch.compile`` and DDP, and the DDP wrapper or ``None``."""
    ddp: DistributedDataParallel | None = None
    while True:
        inner = getattr(module, "_orig_mod", None)  # what torch.compile gives has no public name for it
        if isinstance(module, DistributedDataParallel):
            ddp = module
            module = ddp.module
        elif isinstance(inner, nn.Module):
            module = inner
        else:
            return module, ddp


def refuse_sharded(module: nn.Module) -> None:
    """Raise where parameters are DTensors (FSDP2, tensor parallel), which masks can't be laid over.

    Raises:
        ArgumentError: naming the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            msg = (
                f"{name!r} is a DTensor: {type(module).__name__} is sharded (fully_shard or tensor parallel), so this "
                f"process holds a part of each weight, and neither ranking nor channel removal can work on a part. "
                f"Wrap it in DistributedDataParallel instead; DESIGN.md says how sharded modules will be trained"
            )
            raise ArgumentError(msg)


def _device() -> torch.device:
    """Where collectives run: NCCL has no CPU tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Make tensors of any dtype those of rank 0, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        wire = tensor.contiguous().view(torch.uint8).to(_device())
        dist.broadcast(wire, 0)
        tensor.copy_(wire.to(tensor.device).view(tensor.dtype).view(tensor.shape))


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, where ``values`` is; any shape."""
    if world_size() == 1:
        return values
    wire = values.to(_device(), copy=True)
    dist.all_reduce(wire)
    return wire.to(values.device)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes.

    For modules that no DDP wrapper trains. Where the caller has averaged them already this changes nothing. A parameter
    without a gradient on this rank counts as zero; one without a gradient on any rank stays without.
    """
    if world_size() == 1:
        return
    present = sum_over_ranks(torch.tensor([float(p.grad is not None) for p in parameters]))
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count:
            if parameter.grad is not None and parameter.grad.is_sparse:  # ranks have other rows
                parameter.grad = parameter.grad.to_dense()
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            wire = gradient.to(_device(), copy=True).div_(world_size())
            dist.all_reduce(wire)
            if parameter.grad is None:
                parameter.grad = gradient
            parameter.grad.copy_(wire)


def agree(what: str, tensors: Iterable[Tensor], *values: Any) -> None:
    """Compare ``tensors`` and ``values`` (anything JSON can write) with the other processes, by a digest of 8 bytes.

    Raises:
        RanksDisagreeError: on every rank, where one differs.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256(json.dumps(values, default=repr).encode())
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    mine = torch.tensor([int.from_bytes(digest.digest()[:8], "little", signed=True)], device=_device())
    everyone = [torch.zeros_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    digests = [int(other) for other in everyone]
    if len(set(digests)) > 1:
        odd = [r for r, other in enumerate(digests) if other != digests[0]]
        msg = (
            f"the {world_size()} processes of this run have different {what}: ranks {odd} differ from rank 0. Build "
            f"model, optimizer and trainer alike on every rank, wrap the module in DistributedDataParallel (or "
            f"average its gradients before optimizer.step()), and restore the same checkpoint everywhere"
        )
        raise RanksDisagreeError(msg)


def gather(value: Any) -> list[Any]:
    """``value`` (plain Python) of every process, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def rebuild(ddp: DistributedDataParallel) -> None:
    """Make a DDP wrapper fit parameters that have changed size, in place: whoever holds the wrapper keeps using it.

    Its buckets are laid out for the old sizes, so the wrapper is constructed anew with the arguments it had, its
    communication hooks and module hooks included.
    """
    hooks = {key: value for key, value in vars(ddp).items() if "_hooks" in key and isinstance(value, dict)}
    communication = list(getattr(ddp, "_comm_hooks", ()))
    training = ddp.training
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    skipped = {"self", "module", "bucket_cap_mb", "init_sync", "device_mesh", "process_group"}
    if "forward_sync_buffers" in known:
        skipped.add("broadcast_buffers")  # its deprecated name
    options = {name: getattr(ddp, name) for name in known if name not in skipped and hasattr(ddp, name)}
    if not getattr(ddp, "bucket_bytes_cap_default", True):
        options["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    DistributedDataParallel.__init__(ddp, ddp.module, init_sync=False, process_group=ddp.process_group, **options)
    for key, value in hooks.items():
        vars(ddp)[key].update(value)
    for hook, state in communication:
        ddp.register_comm_hook(state, hook)
    ddp.training = training
