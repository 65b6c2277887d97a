"""The examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::chase_fx.SpecializationWarning")  # the page says that it comes
@pytest.mark.parametrize(("example", "saved"), list(zip(EXAMPLES, (True, True, False), strict=True)))
def test_the_readmes_examples_run(example, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["slim"].plan is not None
    assert (tmp_path / "slim.safetensors").exists() is saved
