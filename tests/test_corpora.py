"""A fixed, light third of the corpora, and every shape of net, is exact in every respect that the matrix measures.

The whole of it is `make matrix`; docs/coverage.md has what it found.
"""

from __future__ import annotations

import pytest

from tests.coverage_page import complaints
from tests.judge import judge
from tests.zoo import CORPORA, corpus, names
from tests.zoo.heavy import HEAVY


def third() -> list[str]:
    """One of every three neighbours of each corpus, a light one where there is one, and all shapes of nets."""
    found = [f"shape:{name}" for name in corpus("shape").NAMES]
    for prefix in CORPORA:
        if prefix != "shape":
            full = [f"{prefix}:{name}" for name in corpus(prefix).NAMES]
            found += [min(full[i : i + 3], key=HEAVY.__contains__) for i in range(0, len(full), 3)]
    return found


def test_heavy_models_are_in_the_corpora() -> None:
    """A name that no corpus has would do nothing."""
    assert set(names()) >= HEAVY


@pytest.mark.parametrize("name", third())
def test_model_is_exact(name: str) -> None:
    """At 50 % and 90 %, by the masked reference and by the oracle, at other batch sizes, and in train mode."""
    record = judge(name)
    assert record["state"] == "exact", record.get("reason")
    assert complaints(record) == []
