"""The detection, segmentation, video and optical flow models of torchvision.

Of a detector the backbone is judged: what follows depends on the data.
"""

from __future__ import annotations

import torch
import torchvision

from tests.zoo import Case

__all__ = ["NAMES", "build"]

DETECTION = tuple(torchvision.models.list_models(torchvision.models.detection))
SEGMENTATION = tuple(torchvision.models.list_models(torchvision.models.segmentation))
VIDEO = tuple(torchvision.models.list_models(torchvision.models.video))
OPTICAL_FLOW = tuple(torchvision.models.list_models(torchvision.models.optical_flow))
NAMES = (*DETECTION, *SEGMENTATION, *VIDEO, *OPTICAL_FLOW)

# (batch, channels, frames, height, width): each model's smallest.
CLIPS = {"s3d": (1, 3, 16, 224, 224), "mvit_v1_b": (1, 3, 16, 224, 224), "mvit_v2_s": (1, 3, 16, 224, 224)}
CLIP, SWIN_CLIP = (1, 3, 4, 32, 32), (1, 3, 4, 64, 64)


def build(name: str) -> Case:
    """A model with random weights and inputs for it."""
    if name in OPTICAL_FLOW:
        model = torchvision.models.get_model(name, weights=None)
        return Case(model.eval(), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), {"num_flow_updates": 2})
    if name in VIDEO:
        model = torchvision.models.get_model(name, weights=None)
        size = CLIPS.get(name, SWIN_CLIP if name.startswith("swin") else CLIP)
        return Case(model.eval(), (torch.randn(*size),))
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    if name in SEGMENTATION:
        return Case(model.eval(), (torch.randn(2, 3, 64, 64),))
    images = (1, 3, 300, 300) if name == "ssd300_vgg16" else (2, 3, 64, 64)
    return Case(model.backbone.eval(), (torch.randn(*images),))
