"""A fixed third of the corpora, and every shape of net, is exact in every respect that the matrix measures.

The whole of it is `make matrix`; docs/coverage.md has what it found.
"""

from __future__ import annotations

import pytest

from tests.coverage_page import complaints
from tests.judge import judge
from tests.zoo import CORPORA, corpus


def third() -> list[str]:
    """Every third name of each corpus, and all shapes of nets."""
    found = [f"shape:{name}" for name in corpus("shape").NAMES]
    for prefix in CORPORA:
        if prefix != "shape":
            found += [f"{prefix}:{name}" for name in corpus(prefix).NAMES[::3]]
    return found


@pytest.mark.parametrize("name", third())
def test_model_is_exact(name: str) -> None:
    """At 50 % and 90 %, by the masked reference and by the oracle, at other batch sizes, and in train mode."""
    record = judge(name)
    assert record["state"] == "exact", record.get("reason")
    assert complaints(record) == []
