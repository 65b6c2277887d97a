"""A run in a process of its own that ``test_checkpoint.py`` kills: ``killed.py FOLDER LIVE_SHRINK [PLACE STEP]``.

It resumes from the folder's checkpoint if there is one, saves after every step, and writes ``end.safetensors`` with
everything at the end. With PLACE and STEP it kills itself at that place of saving that step.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from chase_fx.errors import CheckpointError
from chase_fx.sparse import Chase, checkpoint_file
from tests.sparse.hand_net import ResidualNet, Shrinker, channels_of, rewrite

STEPS = 24


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str) -> None:
    """Die at the next time that a save comes by ``place``."""
    save, replace = checkpoint_file.save_file, os.replace
    moves = []

    def torn(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    def counted(source: Path, target: Path) -> None:
        moves.append(target)
        if place == f"move {len(moves)}":
            die()
        replace(source, target)

    if place == "writing":
        checkpoint_file.save_file = torn
    os.replace = counted


def main(folder: Path, live_shrink: bool, place: str = "", at: int = 0) -> None:
    torch.manual_seed(0)
    random.seed(0)
    net = ResidualNet().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    trainer = Chase(
        net, optimizer, total_steps=STEPS, sparsity=0.6, channel_sparsity=0.5, update_interval=3, channel_interval=4,
        live_shrink=live_shrink, channels=channels_of(net), rewrite=rewrite, shrink=Shrinker() if live_shrink else None,
    )  # fmt: skip
    trainer.follow(average)
    others = {"scheduler": scheduler, "average": average}
    path = folder / "run.ckpt"
    if path.exists():
        try:
            trainer.restore(path, **others)
        except CheckpointError:
            trainer.restore(path, previous=True, **others)
    while trainer.steps_done < STEPS:
        # Data and dropout come from the global generators: they have to continue as well.
        x, y = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randint(10, (4,))
        x = nn.functional.dropout(x, random.random() / 2)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        trainer.step()
        average.update_parameters(net)
        optimizer.zero_grad()
        scheduler.step()
        if place and trainer.steps_done == at:
            arm(place)
        trainer.save(path, **others)
        sys.stdout.write(f"{trainer.steps_done}\n")
        sys.stdout.flush()
    state = {f"net.{k}": v for k, v in net.state_dict().items()}
    state |= {f"average.{k}": v for k, v in average.state_dict().items()}
    state |= {f"mask.{k}": v for k, v in trainer.masks.items()}
    for name, parameter in net.named_parameters():
        state |= {f"{k}.{name}": v for k, v in optimizer.state[parameter].items()}
    state["lr"] = torch.tensor(scheduler.get_last_lr(), dtype=torch.float64)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "end.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(Path(sys.argv[1]), sys.argv[2] == "shrink", *sys.argv[3:4], *map(int, sys.argv[4:5]))
