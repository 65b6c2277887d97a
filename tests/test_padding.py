"""Models of transformers build an attention mask only where some token is padding: the graph serves both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from tests.oracle import assert_exact, randomise

transformers: Any = pytest.importorskip("transformers")

SIZES: dict[str, dict[str, int]] = {
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
}
SIZES["Roberta"] = SIZES["Bert"]
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))
ONES = torch.ones_like(IDS)
PADDED = ONES.clone()
PADDED[0, 5:] = PADDED[2, 3:] = 0

pytestmark = pytest.mark.filterwarnings("ignore::chase_fx.graphs.capture.SpecializationWarning")


def model_of(name: str, attention: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vocab_size=50, max_position_embeddings=40, **SIZES[name])
    config._attn_implementation = attention
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return randomise(model)


def states(root: nn.Module, mask: Tensor) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = root(input_ids=IDS, attention_mask=mask)[0]
    return found


@pytest.mark.filterwarnings("error::chase_fx.graphs.capture.SpecializationWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(SIZES))
def test_padded_and_unpadded(name: str, attention: str) -> None:
    model = model_of(name, attention)
    for example in (PADDED, ONES):
        kwargs = {"input_ids": IDS, "attention_mask": example}
        traced = chase_fx.trace(model, (), kwargs)
        slim = chase_fx.prune(model, (), kwargs, channel_sparsity=0.5)
        for mask in (PADDED, ONES):
            assert torch.equal(states(traced, mask), states(model, mask))
            assert_exact(model, slim, (), {"input_ids": IDS, "attention_mask": mask})
            assert torch.equal(states(copy.deepcopy(traced).train(), mask), states(copy.deepcopy(model).train(), mask))


@pytest.mark.parametrize("example", [PADDED, ONES])
def test_compiled(example: Tensor) -> None:
    """A compiled graph serves data like the example."""
    slim = chase_fx.prune(model_of("Bert", "sdpa"), (), {"input_ids": IDS, "attention_mask": example})
    torch.compiler.reset()
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    assert torch.equal(states(compiled, example), states(slim, example))
