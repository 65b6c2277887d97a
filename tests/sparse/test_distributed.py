"""Two gloo processes decide alike and end where one process with twice the batch ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chase_fx.errors import ArgumentError
from chase_fx.sparse import Chase
from tests.sparse.ranks import RUNS, PlainNet

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, root = tmp_path_factory.mktemp("ranks"), str(HERE.parents[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "ranks.py"), str(folder)], cwd=root, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_ranks_agree_after_every_step_resume_together_and_notice_when_they_part(ended) -> None:
    assert sorted(path.name for path in ended.glob("done*")) == ["done 0", "done 1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_with_twice_the_batch(ended, name) -> None:
    two, one = load_file(ended / f"{name}.safetensors"), RUNS[name]().result()
    assert two.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    if "shrink" in name:
        assert two["net.conv2.weight"].numel() < 12 * 8 * 9


def test_a_wrapper_around_another_module_is_not_followed(monkeypatch) -> None:
    net = PlainNet()
    trainer = Chase(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=5, channel_sparsity=0.0)
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = PlainNet()
    with pytest.raises(ArgumentError, match=r"trainer\.module"):
        trainer.follow(wrapper)
