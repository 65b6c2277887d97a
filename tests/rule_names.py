"""Names of operator rules, and which rules a capture used."""

from __future__ import annotations

from typing import Any

from chase_fx import DEFAULT_RULES
from chase_fx.graphs.rules import Rule

__all__ = ["label", "rules_used"]


def label(rule: Rule) -> str:
    """``family.rule``, or ``family.rule(k)`` for one that a function makes."""
    name = f"{rule.__module__.rpartition('.')[2]}.{rule.__qualname__.partition('.<')[0]}"
    return f"{name}({rule.__closure__[0].cell_contents})" if rule.__closure__ else name


def rules_used(traced: Any) -> list[str]:
    """The rules of the operators that a traced module calls."""
    ops = {op.op for capture in traced.info.captures for op in capture.tape.ops}
    return sorted({label(rule) for op in ops if (rule := DEFAULT_RULES.find(op)) is not None})
