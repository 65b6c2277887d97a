"""The weights of recurrent layers are laid in one piece, for cuDNN, wherever their tensors are replaced."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.sparse import Chase


class Joined(nn.GRU):
    """Notes of which tensors and sizes its weights are laid together, which does nothing on a CPU."""

    joined: tuple[int, ...] = ()

    def flatten_parameters(self) -> None:
        super().flatten_parameters()
        self.joined = self.now()

    def now(self) -> tuple[int, ...]:
        return self.input_size, self.hidden_size, *(weight.data_ptr() for weight in self.parameters())


class Net(nn.Module):
    """A recurrent layer between two linear ones; x: (N, L, 6) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 8), Joined(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x))[0][:, -1])


X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def is_joined(module: nn.Module, width: int) -> bool:
    """Whether the layer is of that width, and was joined as it is."""
    layer = module.get_submodule("layer")
    assert isinstance(layer, Joined)
    return layer.hidden_size == width and layer.joined == layer.now()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_copies(net: Net, tmp_path: Path) -> None:
    """Captures, slim modules, their copies, and what is read from pickles and files, there in another precision."""
    traced = chase_fx.trace(net, X)
    assert is_joined(traced, 8)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    assert is_joined(slim, 4)
    assert is_joined(copy.deepcopy(slim), 4)
    assert is_joined(pickle.loads(pickle.dumps(slim)), 4)
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    read = chase_fx.load(tmp_path / "slim.safetensors", copy.deepcopy(net).double(), X.double())
    assert next(read.parameters()).dtype is torch.float32
    assert is_joined(read, 4)


def test_live_shrink(net: Net) -> None:
    """A layer that gets narrower while it trains."""
    traced = chase_fx.trace(net, X)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    trainer = Chase(
        traced, optimizer, total_steps=20, sparsity=0.5, channel_sparsity=0.5, update_interval=2, live_shrink=True
    )
    for _ in range(20):
        optimizer.zero_grad()
        traced(X).square().mean().backward()
        optimizer.step()
        trainer.step()
    width = traced.get_submodule("layer").hidden_size
    assert width < 8
    assert is_joined(traced, width)
