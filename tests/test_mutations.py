"""Every rule is watched: a wrong one in its place is caught.

A wrong rule either can't be rewritten, or gives a slim module that fails to run or differs from the masked reference.
Nothing else would do: a rule that is wrong and passes is a silent wrong result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import chase_fx
from chase_fx import DEFAULT_RULES
from chase_fx.errors import ChaseError, VerificationError
from chase_fx.graphs.axes import Cat, Prod
from chase_fx.graphs.rules import Rules, contraction, movement, normaliser, reshape
from chase_fx.graphs.rules.base import LabelledOp, Labels, Rule
from tests.nets import NETS, build

aten = torch.ops.aten


# -- wrong rules ------------------------------------------------------------------------------------------------------


def _cat_reversed(op: LabelledOp) -> Labels:
    labels = list(movement.concat(op))
    dim = int(op.arg(1, "dim", 0))
    labels[dim] = Cat(op[x][dim] for x in reversed(op.arg(0, "tensors")))
    return tuple(labels)


def _cat_first_twice(op: LabelledOp) -> Labels:
    labels = list(movement.concat(op))
    labels[1] = op.fresh(labels[1].size, 1)
    return tuple(labels)


def _sum_not_tied(op: LabelledOp) -> Labels:
    return op[next(op.op.inputs())]


def _rows_for_columns(op: LabelledOp) -> Labels:
    labels = op[op.arg(0, "self")]
    return (labels[0], labels[3], labels[1], labels[2])


def _identity(op: LabelledOp) -> Labels:
    return op[op.arg(0, "self")]


def _fresh_channels(op: LabelledOp) -> Labels:
    """Output channels that nothing ties to anything."""
    return tuple(op.fresh(n, d) if d == 1 else op.fixed(n) for d, n in enumerate(op.out.shape))


def _fresh_last(op: LabelledOp) -> Labels:
    last = len(op.out.shape) - 1
    return tuple(op.fresh(n, d) if d == last else op.fixed(n) for d, n in enumerate(op.out.shape))


def _conv_input_untied(op: LabelledOp) -> Labels:
    x, w, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    op.contract(x, 1)
    if bias is not None:
        op.tie(op[w][0], op[bias][0])
    for axis in op[w][2:]:
        op.freeze(axis, "kernel size")
    return (op[x][0], op[w][0], *(op.fixed(n) for n in op.out.shape[2:]))


def _conv_bias_untied(op: LabelledOp) -> Labels:
    x, w = op.arg(0, "input"), op.arg(1, "weight")
    op.tie(op[x][1], op[w][1])
    op.contract(x, 1)
    for axis in op[w][2:]:
        op.freeze(axis, "kernel size")
    return (op[x][0], op[w][0], *(op.fixed(n) for n in op.out.shape[2:]))


def _groups_untied(op: LabelledOp) -> Labels:
    """A grouped convolution whose two sides have nothing to do with each other."""
    x, w = op.arg(0, "input"), op.arg(1, "weight")
    if op.arg(8, "groups", 1) == 1:
        return contraction.convolution(op)
    op.contract(x, 1)
    op.tie(op[w][0], op[op.arg(2, "bias")][0])
    return (op[x][0], op[w][0], *(op.fixed(n) for n in op.out.shape[2:]))


def _groups_inner_first(op: LabelledOp) -> Labels:
    """Channels in a group before groups: the wrong order."""
    x, w = op.arg(0, "input"), op.arg(1, "weight")
    groups = op.arg(8, "groups", 1)
    if groups == 1:
        return contraction.convolution(op)
    labels = op[w]
    inner, group = op.split(labels[0], labels[0].size // groups, groups)
    op.tie(op[x][1], Prod((labels[1], group)))
    op.contract(x, 1)
    op.facts.notes["groups"] = group
    op.tie(labels[0], op[op.arg(2, "bias")][0])
    return (op[x][0], Prod((inner, group)), *(op.fixed(n) for n in op.out.shape[2:]))


def _linear_untied(op: LabelledOp) -> Labels:
    x, w, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    op.contract(x, len(x.shape) - 1)
    op.tie(op[w][0], op[bias][0])
    return (*op[x][:-1], op[w][0])


def _norm_untied(op: LabelledOp) -> Sequence[Labels]:
    """A norm whose weights have nothing to do with its channels."""
    x = op.arg(0, "input")
    return [op[x], *(tuple(op.fixed(n) for n in out.shape) for out in op.op.outs[1:])]


def _norm_not_reduced(rule: Rule) -> Rule:
    """The right ties, but no note that kept channels alone make the statistics."""

    def wrong(op: LabelledOp) -> Any:
        answer = rule(op)
        op.facts.reduced.clear()
        return answer

    return wrong


def _not_contracted(rule: Rule) -> Rule:
    """The right ties, but no note that removed channels count as zero."""

    def wrong(op: LabelledOp) -> Any:
        answer = rule(op)
        op.facts.contracted.clear()
        return answer

    return wrong


def _split_wrong_offset(op: LabelledOp) -> Sequence[Labels]:
    """Pieces of the right sizes, taken from the wrong end."""
    x = op.arg(0, "self")
    labels = list(op[x])
    outs, start = [], labels[1].size
    for out in op.op.outs:
        start -= out.shape[1]
        piece = op.take(labels[1], start, start + out.shape[1])
        outs.append((labels[0], piece, *labels[2:]))
    return outs


def _slice_wrong_offset(op: LabelledOp) -> Labels:
    x = op.arg(0, "self")
    labels = list(op[x])
    if op.out.shape[1] != x.shape[1]:
        labels[1] = op.take(labels[1], 0, op.out.shape[1])
        return tuple(labels)
    return movement.slice_(op)


def _pad_wrong_side(op: LabelledOp) -> Labels:
    """The zeros of both sides change places."""
    labels = op[op.arg(0, "self")]
    before, after = op.arg(1, "pad")[-2:]
    return (labels[0], Cat((op.fresh(after, 1), labels[1], op.fresh(before, 1))), *labels[2:])


def _glu_untied(op: LabelledOp) -> Labels:
    labels = list(op[op.arg(0, "self")])
    labels[1] = op.take(labels[1], 0, labels[1].size // 2)
    return tuple(labels)


def _reshape_column_major(op: LabelledOp) -> Labels:
    """Blocks of dims are joined and factored in the wrong order."""
    x = next(op.op.inputs())
    if len(op.out.shape) == 5:
        n, c, *space = op[x]
        inner, group = op.split(c, op.out.shape[2], op.out.shape[1])
        return (n, group, inner, *space)
    return reshape.reshape(op)


def _flatten_column_major(op: LabelledOp) -> Labels:
    x = next(op.op.inputs())
    if len(x.shape) == 4:
        return (op[x][0], Prod((*op[x][2:], op[x][1])))
    return reshape.reshape(op)


def _transpose_forgotten(op: LabelledOp) -> Labels:
    return tuple(op[op.arg(0, "self")][d] if n == op.out.shape[d] else op.fixed(op.out.shape[d])
                 for d, n in enumerate(op.arg(0, "self").shape))  # fmt: skip


def _attention_heads_untied(op: LabelledOp) -> Sequence[Labels]:
    q, _k, v = op.arg(0, "query"), op.arg(1, "key"), op.arg(2, "value")
    op.contract(q, 3)
    out = (*op[q][:-1], op[v][-1])
    return [out, *(out[: len(o.shape)] for o in op.op.outs[1:])]


def _mm_untied(op: LabelledOp) -> Labels:
    a, b = op.arg(0, "self"), op.arg(1, "mat2")
    op.contract(a, len(a.shape) - 1)
    return (*op[a][:-1], op[b][-1])


def _repeat_swapped(op: LabelledOp) -> Labels:
    """``repeat`` taken for ``repeat_interleave``."""
    labels = list(op[op.arg(0, "self")])
    labels[1] = Prod((labels[1], op.fixed(2, "copies")))
    return tuple(labels)


def _interleave_swapped(op: LabelledOp) -> Labels:
    labels = list(op[op.arg(0, "self")])
    labels[1] = Prod((op.fixed(2, "copies"), labels[1]))
    return tuple(labels)


def _reduced_dropped(op: LabelledOp) -> Any:
    """A reduction over channels that neither freezes them nor notes anything."""
    labels = list(op[op.arg(0, "self")])
    labels[1] = op.fixed(1, "size 1")
    return tuple(labels)


def _picked_free(op: LabelledOp) -> Labels:
    """Picked channels that have nothing to do with those they are picked from."""
    labels = list(op[op.arg(0, "self")])
    labels[1] = op.fresh(op.out.shape[1], 1)
    return tuple(labels)


def _outs_free(op: LabelledOp) -> Sequence[Labels]:
    labels = list(op[op.arg(0, "self")])
    return [tuple(op.fresh(n, d) if d == 1 else labels[d] for d, n in enumerate(out.shape)) for out in op.op.outs]


def _select_free(op: LabelledOp) -> Labels:
    labels = op[op.arg(0, "self")]
    return (labels[0], *labels[2:])


def _embedding_untied(op: LabelledOp) -> Labels:
    w, indices = op.arg(0, "weight"), op.arg(1, "indices")
    return (*op[indices], op.fixed(w.shape[1]))


def _embedding_rows(op: LabelledOp) -> Labels:
    """Rows of the table as prunable as its columns."""
    w, indices = op.arg(0, "weight"), op.arg(1, "indices")
    op.tie(op[w][0], op[w][0])
    return (*op[indices], op.fresh(w.shape[1], 1))


def _pixels_kept(op: LabelledOp) -> Labels:
    """Pixel shuffle as if the copies came first."""
    x, r = op.arg(0, "self"), op.arg(1, "upscale_factor")
    labels = op[x]
    copies, channels = op.split(labels[1], r * r, labels[1].size // (r * r))
    op.freeze(copies, "pixels")
    return (labels[0], channels, *(op.fixed(n) for n in op.out.shape[2:]))


@dataclass(frozen=True)
class Mutation:
    """A wrong rule for some operators, and the net that must betray it."""

    net: str
    ops: tuple[str, ...]
    rule: Rule

    @property
    def label(self) -> str:
        return f"{self.net}-{getattr(self.rule, '__qualname__', 'rule').split('.')[0].strip('_')}-{self.ops[0]}"


MUTATIONS = (
    Mutation("concat", ("cat",), _cat_reversed),
    Mutation("concat", ("cat",), _cat_first_twice),
    Mutation("residual", ("add",), _sum_not_tied),
    Mutation("residual", ("convolution",), _conv_input_untied),
    Mutation("chain", ("convolution",), _conv_input_untied),
    Mutation("chain", ("convolution",), _conv_bias_untied),
    Mutation("chain", ("convolution",), _fresh_channels),
    Mutation("chain", ("relu",), _fresh_channels),
    Mutation("chain", ("convolution",), _not_contracted(contraction.convolution)),
    Mutation("batch_norm", ("native_batch_norm", "_native_batch_norm_legit_no_training"), _norm_untied),
    Mutation("group_norm", ("native_group_norm",), _norm_untied),
    Mutation("group_norm", ("native_group_norm",), _norm_not_reduced(normaliser.group_norm)),
    Mutation("layer_norm", ("native_layer_norm",), _norm_untied),
    Mutation("layer_norm", ("native_layer_norm",), _norm_not_reduced(normaliser.layer_norm)),
    Mutation("rms_norm", ("mean",), _norm_not_reduced(normaliser.average)),
    Mutation("rms_norm", ("mul",), _sum_not_tied),
    Mutation("layer_norm", ("linear", "addmm"), _fresh_last),
    Mutation("grouped", ("convolution",), _groups_untied),
    Mutation("grouped", ("convolution",), _groups_inner_first),
    Mutation("split", ("split", "split_with_sizes"), _split_wrong_offset),
    Mutation("slice", ("slice",), _slice_wrong_offset),
    Mutation("permute", ("permute",), _rows_for_columns),
    Mutation("transpose", ("transpose",), _identity),
    Mutation("transpose", ("transpose",), _transpose_forgotten),
    Mutation("flatten", ("view", "_unsafe_view", "reshape"), _flatten_column_major),
    Mutation("shuffle", ("view", "_unsafe_view", "reshape"), _reshape_column_major),
    Mutation("shuffle", ("transpose",), _identity),
    Mutation("excite", ("mul",), _sum_not_tied),
    Mutation("channel_mean", ("mean",), _norm_not_reduced(normaliser.average)),
    Mutation("channel_max", ("amax",), _reduced_dropped),
    Mutation("softmax", ("_softmax",), _identity),
    Mutation("pad", ("constant_pad_nd",), _pad_wrong_side),
    Mutation("pad", ("constant_pad_nd",), _fresh_channels),
    Mutation("glu", ("glu",), _glu_untied),
    Mutation("attention", ("_scaled_dot_product_flash_attention_for_cpu",), _attention_heads_untied),
    Mutation("matmul", ("bmm",), _mm_untied),
    Mutation("embedding", ("embedding",), _embedding_untied),
    Mutation("embedding", ("embedding",), _embedding_rows),
    Mutation("sum", ("sum",), _not_contracted(contraction.total)),
    Mutation("cumulative", ("cumsum",), _identity),
    Mutation("flip", ("flip",), _identity),
    Mutation("roll", ("roll",), _identity),
    Mutation("gather", ("index_select",), _picked_free),
    Mutation("topk", ("topk",), _outs_free),
    Mutation("select", ("select",), _select_free),
    Mutation("repeat", ("repeat",), _repeat_swapped),
    Mutation("interleave", ("repeat_interleave", "expand", "clone", "view", "_unsafe_view"), _fresh_channels),
    Mutation("pixel_shuffle", ("pixel_shuffle",), _pixels_kept),
    Mutation("transposed", ("convolution",), _groups_untied),
)


def score(group: chase_fx.Group) -> Tensor:
    """No two groups, and no two ends of one, are pruned alike, so that a lost tie can't go unnoticed."""
    generator = torch.Generator().manual_seed(sum(map(ord, group.name)))
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


def outcome(name: str, rules: Rules) -> Exception | None:
    """What stops a prune with these rules, if anything does."""
    net, x = build(name)
    traced = chase_fx.trace(net, x)
    channels = chase_fx.analyze(traced, rules=rules)
    try:
        slim = chase_fx.rewrite(traced, channels.plan(0.5, score=score))
        slim(*x)
        chase_fx.verify(traced, slim)
    except (ChaseError, RuntimeError, ValueError, IndexError) as e:
        return e
    return None


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_right_rules_pass(name: str) -> None:
    """With the default rules each net is pruned, known throughout, and exact."""
    net, x = build(name)
    channels = chase_fx.analyze(chase_fx.trace(net, x))
    assert channels.groups
    assert not channels.unknown
    assert outcome(name, DEFAULT_RULES) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.label)
def test_a_wrong_rule_is_caught(mutation: Mutation) -> None:
    """A wrong rule makes verify fail, or the rewrite, or the forward; and verify names a node."""
    called = []

    def rule(op: LabelledOp) -> Any:
        called.append(op.name)
        return mutation.rule(op)

    table = {getattr(aten, op): rule for op in mutation.ops}
    error = outcome(mutation.net, DEFAULT_RULES.extend(table))
    assert called, "the net does not call the operator"
    assert error is not None, "the wrong rule gave a slim module that passed"
    if isinstance(error, VerificationError):
        assert error.node
        assert error.node in str(error)
