"""Every rule of the table is broken in every way of :mod:`tests.mutants`, and each time a net goes red.

What survives is listed with the reason why it is not wrong; a new rule without a net, and a new survivor, fail here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import chase_fx
from chase_fx import DEFAULT_RULES
from chase_fx.graphs.rules import _TABLE, Rule, Rules
from tests import nets, rule_nets
from tests.mutants import MUTATORS
from tests.rule_names import label, rules_used

aten = torch.ops.aten

BUILDERS: dict[str, Any] = {
    **{f"nets.{name}": (nets.build, name) for name in nets.NETS},
    **{f"rule_nets.{name}": (rule_nets.build, name) for name in rule_nets.RULE_NETS},
}

_UNREAD = "what it would freeze is no channel of any layer, and stays for that reason"
_FREE = "the rewrite takes the kept places of each dim, so that any of them may go"
_GATES = "the gates change places, and stay tied to the same hidden units"
# (rule, mutator) -> why the mutant computes what the rule does
EQUIVALENT: dict[tuple[str, str], str] = {
    ("pointwise.gated", "other end"): "the halves change places, and stay tied",
    ("recurrent.lstm_cell", "other end"): _GATES,
    ("recurrent.lstm_cell", "reversed result"): _GATES,
    ("recurrent.gru_cell", "other end"): _GATES,
    ("contraction.convolution", "nothing frozen"): _UNREAD,
    ("contraction.grouped_mm", "nothing frozen"): _UNREAD,
    ("lookup.index_put", "unrelated result"): "the result is written in place, so it keeps the axes that it had",
    ("spatial.grid_sample", "nothing tied"): "samples of a batch are no channels",
    ("spatial.grid_sample", "nothing frozen"): _UNREAD,
    ("regions.region_pool", "nothing frozen"): _UNREAD,
    ("regions.deformable_convolution", "nothing frozen"): _UNREAD,
    ("factory.constant", "unrelated result"): "the rule ties nothing: the same value stands everywhere",
    ("factory.sequence", "unrelated result"): _FREE,
}


def rules_of(name: str) -> list[Rule]:
    return [rule for rule, _ in _TABLE if label(rule) == name]


def decomposed(name: str) -> bool:
    """Whether torch makes other operators of those of a rule before the capture sees them."""
    if name == "movement.repeat_interleave":  # but for its form with repeats that are data, which the rule refuses
        return True
    operators = [op for rule, ops in _TABLE if label(rule) == name for op in ops.split()]
    packets = [getattr(aten, op) for op in operators if "::" not in op and hasattr(aten, op)]
    return bool(packets) and all(
        getattr(packet, overload).has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        for packet in packets
        for overload in packet.overloads()
        if not overload.endswith("out")
    )


RULES = sorted({label(rule) for rule, _ in _TABLE})


@cache
def traced(net: str) -> tuple[Any, tuple[Tensor]]:
    build, name = BUILDERS[net]
    module, x = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that are read as data, such as the number of boxes
        return chase_fx.trace(module, x), x


@cache
def nets_of() -> dict[str, list[str]]:
    """The nets that call an operator of each rule."""
    found: dict[str, list[str]] = {name: [] for name in RULES}
    for net in BUILDERS:
        for name in rules_used(traced(net)[0]):
            found[name].append(net)
    return found


def drawn(group: chase_fx.Group, salt: int) -> Tensor:
    """Scores that differ from group to group: no two are pruned alike, so that a lost tie can't go unnoticed."""
    generator = torch.Generator().manual_seed(sum(map(ord, group.name)) + 1000 * salt)
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


def error(net: str, rules: Rules, matters: Callable[[], bool] = lambda: True) -> Exception | None:
    """What stops a prune of a net with these rules, if anything does and it ``matters`` once the net is analyzed."""
    module, _ = traced(net)
    module.info.analyses.clear()
    try:
        channels = chase_fx.analyze(module, rules=rules)
        if not matters():
            return None
        for sparsity, salt in ((0.5, 0), (0.5, 1), (0.99, 2)):
            plan = channels.plan(sparsity, score=lambda group, salt=salt: drawn(group, salt))
            chase_fx.verify(module, chase_fx.rewrite(module, plan))
    except Exception as e:  # noqa: BLE001 - whatever is raised is no silent wrong result
        return e
    return None


def outcomes(name: str, mutator: str) -> Iterator[bool]:
    """For each net in which the mutant does something else than the rule: whether it is caught."""
    for net in nets_of()[name]:
        used: list[None] = []
        wrong = {id(rule): MUTATORS[mutator](rule, lambda used=used: used.append(None)) for rule in rules_of(name)}
        table = {op: wrong.get(id(rule), rule) for op, rule in DEFAULT_RULES.table.items()}
        caught = error(net, Rules(table), lambda used=used: bool(used))
        if used:
            yield caught is not None


@pytest.mark.parametrize("net", [net for net in BUILDERS if net.startswith("rule_nets.")])
def test_the_right_rules_pass(net: str) -> None:
    """With the default rules each net is pruned, known throughout, and exact."""
    channels = chase_fx.analyze(traced(net)[0])
    assert channels.groups
    assert not channels.unknown
    assert error(net, DEFAULT_RULES) is None


@pytest.mark.parametrize("name", RULES)
def test_every_mutant_of_a_rule_is_caught(name: str) -> None:
    """Each rule has a net, a mutant, and no mutant that nobody notices."""
    if decomposed(name):
        assert not nets_of()[name]
        return
    assert nets_of()[name], f"no net calls an operator of {name}: add one to tests/rule_nets.py"
    caught, survived = [], []
    for mutator in MUTATORS:
        results: list[bool] = []
        for result in outcomes(name, mutator):
            results.append(result)
            if result:
                break
        if any(results):
            caught.append(mutator)
        elif results:
            survived.append(mutator)
    # A fixed dim made free is mostly one that no layer reads, which stays for that reason: it may be caught, or not.
    survived = [mutator for mutator in survived if mutator != "loose result"]
    assert survived == [m for r, m in EQUIVALENT if r == name]
    assert caught or survived


def test_survivors_are_rules() -> None:
    """The list of survivors names rules and mutators that exist."""
    assert {name for name, _ in EQUIVALENT} <= set(RULES)
    assert {mutator for _, mutator in EQUIVALENT} <= set(MUTATORS)
