"""The accelerator that tests run on, and small nets for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import SwinTransformer
from transformers.modeling_outputs import ModelOutput

__all__ = ["CPU", "DEVICE", "NETS", "close", "images", "moved", "needs_device"]

CPU = torch.device("cpu")
# CHASE_FX_DEVICE=cpu runs these tests without a GPU, which shows at least that they run.
DEVICE = torch.device(os.environ.get("CHASE_FX_DEVICE", "cuda:0"))
needs_device = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU that CUDA runs on"
)


def images(batch: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    """Values that depend on the sizes alone, in double precision on the CPU."""
    generator = torch.Generator().manual_seed(batch * size)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def rows(batch: int = 2, length: int = 7) -> Tensor:
    """Sequences of 12 features, likewise."""
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randn(batch, length, 12, generator=generator, dtype=torch.float64)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    """Numbers of tokens below 50, likewise."""
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(batch * length))


class Recurrent(nn.Module):
    """A recurrent layer of two directions and two layers, then a step of a cell."""

    def __init__(self, layer: Any, cell: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 10), nn.Linear(14, 5)
        self.layer = layer(10, 8, 2, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.3)  # that of the layer draws from a generator of cuDNN's own
        self.cell = cell(16, 14)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(self.drop(self.layer(self.first(x).tanh())[0][:, -1]))
        return self.last(y[0] if isinstance(y, tuple) else y)


class Attention(nn.Module):
    """A transformer layer, and a layer of attention whose masks and positions the forward makes where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 5)
        self.place = nn.Embedding(32, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        y = self.first(x) + self.place(torch.arange(length, device=x.device))
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        decay = torch.linspace(0.5, 1.0, length, device=x.device, dtype=x.dtype)[:, None]
        y = self.encoder(y * decay, src_mask=later)
        bias = x.new_full((length, length), -0.5).tril() + torch.tensor([0.1], device=x.device, dtype=x.dtype)
        y = y + self.attention(y, y, y, attn_mask=bias, need_weights=False)[0]
        return self.last(y.mean(1))


def llama() -> nn.Module:
    """Two layers with eight heads over two groups of keys."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    """A vision transformer for images of 32 x 32."""
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, dropout=0.1, num_classes=5)


def convnext() -> nn.Module:
    """Depthwise convolutions, layer norms over channels, layer scale."""
    return torchvision.models.ConvNeXt([CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)], num_classes=5)


def swin() -> nn.Module:
    """Attention in shifted windows."""
    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)


# name -> (builder, example inputs by batch and size)
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), images),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), images),
    "convnext": (convnext, images),
    "vit": (vit, images),
    "swin": (swin, images),
    "lstm": (lambda: Recurrent(nn.LSTM, nn.LSTMCell), rows),
    "gru": (lambda: Recurrent(nn.GRU, nn.GRUCell), rows),
    "attention": (Attention, rows),
    "llama": (llama, tokens),
}


def moved(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """``module`` itself on ``device``, in eval mode."""
    return module.to(device, dtype).eval()


def close(have: Any, want: Any, tolerance: float) -> bool:
    """Whether two results are equal up to ``tolerance``, relative to the largest value."""
    if isinstance(want, ModelOutput):
        have, want = have["logits"], want["logits"]
    assert have.shape == want.shape
    assert have.dtype is want.dtype
    scale = want.abs().max().clamp_min(1e-12)
    return bool(((have.to(want.device) - want).abs().max() / scale).item() <= tolerance)
