"""Functions whose way through their code depends on data stay one call of the graph."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN

import chase_fx
from chase_fx.errors import OtherPathError
from tests import judge, kept_means
from tests.oracle import EXACT, difference, randomise

pytestmark = pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")

CLASSES = 5


def by_class(scores: Tensor) -> Tensor:
    """The rows of each class that occurs, scaled by how many there are: a loop that the data decides."""
    classes = scores.argmax(1)
    out = torch.zeros_like(scores)
    for chosen in torch.unique(classes):
        rows = torch.where(classes == chosen)[0]
        out[rows] = scores[rows] * len(rows)
    return out


def count(scores: Tensor) -> int:
    return len(torch.unique(scores.argmax(1)))


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))
        self.scores = nn.Linear(16, CLASSES)
        self.out = nn.Sequential(nn.Linear(CLASSES, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(by_class(self.scores(self.body(x))))


def net(rows: int = 4) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, 4, dtype=torch.float64)
    return randomise(Sorted(), (x,)), x


def test_the_data_decides() -> None:
    """Without help the graph refuses inputs of which other classes come out, and says how to help."""
    model, x = net(8)
    traced = chase_fx.trace(model, x)
    with pytest.raises(OtherPathError, match=r"test_whole.py:\d+.*whole="):
        traced(x[:1])


def test_a_function_stays_one_call() -> None:
    """It runs at any input, keeps the channels that enter it, and the layers before and behind it shrink."""
    model, x = net()
    traced = chase_fx.trace(model, x, whole=[by_class])
    more = torch.randn(9, 4, dtype=torch.float64)
    for inputs in (x, x[:1], more):
        assert torch.equal(traced(inputs), model(inputs))
    channels = chase_fx.analyze(traced)
    assert not channels.unknown
    assert "stays one call" in channels.frozen["scores.weight", 0]
    assert {g.name for g in channels.groups} == {"body.0.weight:0", "body.2.weight:0", "out.0.weight:0"}
    again = pickle.loads(pickle.dumps(traced))
    assert torch.equal(again(more), model(more))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_prune_finds_the_function(sparsity: float) -> None:
    """Where the masked model goes another way than the dense one, prune leaves the function that decides as it is."""
    model, x = net(8)
    slim = chase_fx.prune(model, x, channel_sparsity=sparsity)
    assert difference(kept_means.expected_output(model, slim, (x,), {}), slim(x)) <= EXACT
    traced = chase_fx.trace(model, x)
    with pytest.raises(OtherPathError):  # and it was needed
        chase_fx.verify(traced, chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(sparsity)))


def test_a_function_that_gives_numbers_is_recorded() -> None:
    """A number is part of the graph, which a call that stays whole would hide: such a function is recorded."""

    class Counting(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.scores(self.body(x))
            return self.out(scores * count(scores))

    model = Counting()
    x = torch.randn(6, 4)
    traced = chase_fx.trace(model, x, whole=[count])
    for inputs in (x, x[:1], torch.randn(9, 4)):
        assert torch.equal(traced(inputs), model(inputs))


def detector(cls: type[FasterRCNN], **options: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=4, padding=1), nn.ReLU()
    )
    backbone.out_channels = 12
    model = cls(
        backbone,
        num_classes=CLASSES,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=torchvision.models.detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2),
        box_score_thresh=0.1,
        box_detections_per_img=6,
        **options,
    )
    images = [torch.rand(3, 64, 64, dtype=torch.float64) for _ in range(2)]
    return randomise(model), images


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_two_stage_detector(sparsity: float) -> None:
    """A detector is pruned whole: region proposals, and boxes that are sorted by class."""
    model, images = detector(FasterRCNN)
    slim = chase_fx.prune(model, (images,), channel_sparsity=sparsity)
    found = slim(images)
    assert sum(len(boxes["boxes"]) for boxes in found)
    assert judge.difference(kept_means.expected_output(model, slim, (images,), {}), found) <= EXACT


def test_what_reads_data_stays_where_it_matters() -> None:
    """Masks are pasted into boxes whose corners Python reads: fixed ones don't fit the masked model's boxes."""
    model, images = detector(MaskRCNN, mask_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 8, 2))
    traced = chase_fx.trace(model, (images,))
    with pytest.raises(OtherPathError, match="whole="):
        chase_fx.verify(traced, chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)))
    slim = chase_fx.prune(model, (images,), channel_sparsity=0.5)
    expected = kept_means.expected_output(model, slim, (images,), {})
    assert judge.difference(expected, slim(images)) <= EXACT
