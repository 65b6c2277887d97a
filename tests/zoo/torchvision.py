"""The models of torchvision that pruning has to get right, in double precision with nothing trivially zero.

Images are as small as the model allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from tests.oracle import randomise


@dataclass(frozen=True)
class Entry:
    """A model by name, its image size, another size that it takes, and the share of parameters left at 50 %."""

    name: str
    size: int = 64
    other: int = 96
    left: float = 0.36

    def inputs(self, batch: int = 2, size: int | None = None, seed: int = 1) -> tuple[Tensor]:
        """Random images."""
        generator = torch.Generator().manual_seed(seed)
        size = size or self.size
        return (torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64),)

    def build(self) -> nn.Module:
        """The randomised model in eval mode."""
        builder = getattr(torchvision.models, self.name)
        options = {"init_weights": False} if self.name in ("googlenet", "inception_v3") else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return randomise(builder(weights=None, **options), self.inputs(4))


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("resnet18"),
        Entry("resnet50"),
        Entry("wide_resnet50_2"),
        Entry("resnext50_32x4d"),
        Entry("vgg16_bn"),
        Entry("densenet121"),
        Entry("googlenet"),
        Entry("inception_v3", size=299, other=299 + 32),
        Entry("squeezenet1_0"),
        Entry("shufflenet_v2_x1_0", left=0.42),
        Entry("mobilenet_v2"),
        Entry("mobilenet_v3_large"),
        Entry("mnasnet1_0"),
        Entry("efficientnet_b0"),
        Entry("regnet_y_400mf"),
        Entry("convnext_tiny"),
    )
}
