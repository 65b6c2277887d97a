"""Every classification model of torchvision, on images as small as it allows."""

from __future__ import annotations

import torch
import torchvision

from tests.zoo import Case

__all__ = ["NAMES", "build"]

# Five gigabytes in double precision, and nothing that their smaller siblings lack.
TOO_LARGE = frozenset({"regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"})
NAMES = tuple(name for name in torchvision.models.list_models(torchvision.models) if name not in TOO_LARGE)
SIZES = {"inception_v3": 80, "maxvit_t": 224, "alexnet": 64}


def build(name: str) -> Case:
    """A model with random weights and images for it."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        options["image_size"] = 64
    model = torchvision.models.get_model(name, weights=None, **options)
    side = options.get("image_size", SIZES.get(name, 64))
    return Case(model.eval(), (torch.randn(2, 3, side, side),))
