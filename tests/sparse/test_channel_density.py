"""The example that follows the density of channels through training."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "channel_density.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("channel_density", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["channel_density"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_density_of_filters_is_relative_to_their_layer(example) -> None:
    mask = torch.zeros(4, 2, 1, 2, dtype=torch.bool)
    mask[0], mask[1, 0], mask[2, 0, 0, 0] = True, True, True
    assert example.density(mask).tolist() == pytest.approx([16 / 7, 8 / 7, 4 / 7, 0])


def test_it_trains_and_draws(example, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    output = tmp_path / "plot.png"
    example.main([
        "--digits", "--steps", "6", "--batch", "8", "--looks", "3", "--method", "SET", "--output", str(output),
    ])  # fmt: skip
    assert output.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(output.with_suffix(".json").read_text())["SET"]
    assert numbers["steps"] == [0, 2, 4, 6]
    assert all(quantiles == sorted(quantiles) for quantiles in numbers["quantiles"])
    assert all(0 <= share <= 1 for share in numbers["amenable"])
    assert len(numbers["layers"]["layer1.0.conv1.weight"]) == 4
