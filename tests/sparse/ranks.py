"""What ``test_distributed.py`` runs in two processes (``ranks.py FOLDER`` under torchrun) and again in one.

Every scenario trains a net without batch norm on the same data: in two processes each rank takes its half of the batch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import chase_fx
from chase_fx.errors import ArgumentError, CheckpointError
from chase_fx.sparse import SET, SNIP, Chase, RanksDisagreeError, RigL
from tests.sparse.hand_net import Channels, Group, Member, one_to_one

STEPS = 30
OPTIONS = {"sparsity": 0.6, "channel_sparsity": 0.5, "channel_interval": 4}


class PlainNet(nn.Module):
    """Two convolutions and a classifier; nothing that depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def channels() -> Channels:
    def group(name: str, size: int, reader: str) -> Group:
        maker = (
            Member(f"{name}.weight", 0, one_to_one(size), producer=True),
            Member(f"{name}.bias", 0, one_to_one(size)),
        )
        return Group(name, size, (*maker, Member(f"{reader}.weight", 1, one_to_one(size))))

    return Channels((group("conv1", 8, "conv2"), group("conv2", 12, "fc")))


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Run:
    """One training run; ``wrap`` says who averages gradients."""

    def __init__(self, method: Any = Chase, *, wrap: str = "ddp", optimizer: str = "SGD", **options: Any) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = PlainNet().double()
        options = {"channels": channels(), "shrink": lambda *_: None, **options}
        if options.pop("traced", False):
            self.net = chase_fx.trace(self.net, torch.zeros(2, 3, 6, 6, dtype=torch.float64))
            options |= {"channels": None, "shrink": None}
        rate = {"SGD": {"lr": 0.2, "momentum": 0.9}, "AdamW": {"lr": 0.01}}[optimizer]
        self.optimizer = getattr(torch.optim, optimizer)(self.net.parameters(), **rate)
        self.forward, self.wrap = self.net, wrap if world()[1] > 1 else "none"
        arguments = options.pop("arguments", {})
        self.micro = options.pop("micro", 1)
        if self.wrap in ("ddp", "follow"):
            self.forward = DDP(self.net, **{"gradient_as_bucket_view": self.wrap == "follow", **arguments})
        self.steps = 0
        if method is SNIP:
            self.backward(average=False)
        options = {**OPTIONS, "total_steps": STEPS, **options}
        self.trainer = method(self.forward if self.wrap == "ddp" else self.net, self.optimizer, **options)
        if self.wrap == "follow":
            self.trainer.follow(self.forward)

    def backward(self, *, average: bool = True) -> None:
        rank, size = world()
        generator = torch.Generator().manual_seed(self.steps)
        x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64).chunk(size)[rank]
        y = torch.randint(10, (8,), generator=generator).chunk(size)[rank]
        nn.functional.cross_entropy(self.forward(x), y).backward()
        if self.wrap == "by hand" and average:
            for p in self.net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= size

    def step(self, count: int = STEPS) -> Run:
        for _ in range(count):
            for left in reversed(range(self.micro)):
                self.steps += 1
                with self.forward.no_sync() if left and self.forward is not self.net else nullcontext():
                    self.backward()
            self.optimizer.step()
            self.trainer.step()
            self.optimizer.zero_grad()
            if self.wrap != "no one":
                self.check_ranks()
        return self

    def check_ranks(self) -> None:
        """Masks, units, shapes and weights are the same on every rank after every step."""
        if world()[1] > 1:
            state = [
                *self.trainer.masks.values(),
                *self.trainer.kept.values(),
                *(p.detach() for p in self.net.parameters()),
            ]
            mine = torch.cat([t.double().flatten() for t in state])
            sizes = [torch.zeros(1) for _ in range(2)]
            dist.all_gather(sizes, torch.tensor([float(len(mine))]))
            assert sizes[0] == sizes[1]
            everyone = [torch.zeros_like(mine) for _ in range(2)]
            dist.all_gather(everyone, mine)
            assert torch.equal(*everyone), self.steps

    def result(self) -> dict[str, Tensor]:
        state = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        return state | {f"mask.{name}": value for name, value in self.trainer.masks.items()}


RUNS: dict[str, Callable[[], Run]] = {
    "Chase, DDP": lambda: Run(update_interval=3).step(),
    "Chase, DDP, live shrink": lambda: Run(update_interval=3, live_shrink=True, optimizer="AdamW").step(),
    "RigL, followed DDP, live shrink": lambda: Run(RigL, wrap="follow", update_interval=3, live_shrink=True).step(),
    "Chase, static graph, live shrink": lambda: Run(live_shrink=True, arguments={"static_graph": True}).step(),
    "Chase, accumulated without sync, live shrink": lambda: Run(
        live_shrink=True, micro=3, arguments={"gradient_as_bucket_view": True}
    ).step(),
    "Chase, averaged by hand": lambda: Run(wrap="by hand", update_interval=3, live_shrink=True).step(),
    "traced, DDP, live shrink": lambda: Run(traced=True, update_interval=3, live_shrink=True).step(),
    "SNIP, Taylor": lambda: Run(SNIP, channel_score="taylor").step(),
    "SNIP, averaged by the trainer": lambda: Run(SNIP, wrap="by hand").step(),
    "activation per flop": lambda: Run(channel_score="activation", channel_cost="flops", live_shrink=True).step(),
    "SET, another seed per rank": lambda: Run(SET, update_interval=2, seed=world()[0]).step(),
}


def resume(folder: Path) -> None:
    """Both ranks save, go on, and are met by a run that restores; each rank has its own random numbers."""
    first = Run(update_interval=3, live_shrink=True).step(13)
    torch.manual_seed(world()[0])
    first.trainer.save(folder / "run.ckpt")
    numbers = torch.rand(4)
    first.step(STEPS - 13)
    second = Run(update_interval=3, live_shrink=True)
    second.trainer.restore(folder / "run.ckpt")
    assert torch.equal(torch.rand(4), numbers)
    second.steps = 13
    second.step(STEPS - 13)
    assert all(torch.equal(a, b) for a, b in zip(first.result().values(), second.result().values(), strict=True))
    if world()[0] == 1:
        (folder / "damaged").write_bytes(b"")
    dist.barrier()
    with pytest.raises(CheckpointError, match="damaged"):
        Run(live_shrink=True).trainer.restore(folder / "damaged")


def sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    net = PlainNet()
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="sharded"):
        Chase(net, optimizer, total_steps=5, channel_sparsity=0.0)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = world()[0]
    for name, run in RUNS.items():
        result = run().result()
        if rank == 0:
            save_file({key: value.contiguous() for key, value in result.items()}, folder / f"{name}.safetensors")
    resume(folder)
    # Without averaging the weights of the ranks part, and so do the masks that they rank: noticed in the first update.
    with pytest.raises(RanksDisagreeError, match="different masks"):
        Run(wrap="no one", update_interval=3).step()
    with pytest.raises(RanksDisagreeError, match="different settings"):
        Run(update_interval=3 + rank)
    with pytest.raises(RanksDisagreeError, match="different settings"):
        Run(channel_score="random", seed=rank)
    sharded()
    (folder / f"done {rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    main(Path(sys.argv[1]))
