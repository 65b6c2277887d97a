"""The net that tests of captures build on."""

from __future__ import annotations

from torch import nn


class Body(nn.Module):
    """Two linear layers; subclasses say what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 2)
