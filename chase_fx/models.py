"""The network of the demo: a CIFAR-style residual CNN for small grey images.

Shape legend: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every PyTorch program uses

__all__ = ["BasicBlock", "ResNet20", "resnet20"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions added to a shortcut: (N, inputs, H, W) -> (N, width, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride=stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, width, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 (He et al. 2016, section 4.2) with a stride-2 stem and 1x1 convolutions as projection shortcuts.

    Three stages of three blocks each, of widths (width, 2 width, 4 width). Every stage's residual stream couples the
    filters of its last convolutions, its shortcut and the norms between them.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        width: channels of the stem and the first stage.
    """

    def __init__(self, classes: int = 10, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inputs: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(inputs, width, stride),
            BasicBlock(width, width, 1),
            BasicBlock(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return cast("Tensor", self.fc(x))


def resnet20() -> ResNet20:
    """ResNet-20 for 28x28 grey images and ten classes, as ``chase-fx inspect chase_fx.models:resnet20`` needs it."""
    return ResNet20()
