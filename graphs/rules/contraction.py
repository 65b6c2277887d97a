"""Operators that sum over a dim: removed units contribute zero, so the two summed dims keep the same indices.

Layouts: N batch, C channels, H heads, G groups, L S sequence, E head_dim, O I out and in channels of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from chase_fx.graphs.axes import Axis, Prod
from chase_fx.graphs.rules.base import LabelledOp, Labels, Refusal
from chase_fx.graphs.rules.dims import reduced_dims, reduced_labels
from chase_fx.graphs.tape import Slot

__all__ = [
    "addbmm",
    "addmm",
    "addmv",
    "addr",
    "attention",
    "baddbmm",
    "bmm",
    "convolution",
    "dist",
    "distance",
    "dot",
    "grouped_mm",
    "grouped_output",
    "linear",
    "mm",
    "mv",
    "norm",
    "renorm",
    "total",
]


def convolution(op: LabelledOp) -> Labels | Refusal:
    """``convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)``.

    x: (N, G*I, *s), w: (G*O, I, *k) -> out: (N, G*O, *s');  transposed w: (G*I, O, *k). An unbatched x has no N.
    """
    x, w, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    stride, padding = op.arg(3, "stride"), op.arg(4, "padding")
    transposed, groups = bool(op.arg(6, "transposed", False)), int(op.arg(8, "groups", 1))
    spatial = len(w.shape) - 2
    c = len(x.shape) - spatial - 1
    x_labels, w_labels = op[x], op[w]
    out = grouped_output(op, x_labels[c], w_labels, groups, transposed=transposed)
    op.contract(x, c)
    op.produce(out)
    if bias is not None:
        op.tie(out, op[bias][0])
    kept_spatial = []
    for d in range(spatial):
        label = x_labels[c + 1 + d]
        k, s, p = w.shape[2 + d], stride[d % len(stride)], padding[d % len(padding)]
        if k != 1 or s != 1 or p != 0:
            op.freeze(label, "a convolution window runs over it")
            label = op.fixed(op.out.shape[c + 1 + d], "a convolution window runs over it")
        op.freeze(w_labels[2 + d], "kernel size")
        kept_spatial.append(label)
    return (*x_labels[:c], out, *kept_spatial)


def grouped_output(op: LabelledOp, x_axis: Axis, w: Labels, groups: int, *, transposed: bool) -> Axis:
    """The output channels of a convolution; groups x channels in a group are one joint choice for both of its sides."""
    if groups == 1:
        inner, outer = (w[0], w[1]) if transposed else (w[1], w[0])
        op.multiply(x_axis, inner)
        return outer
    within = w[0].size // groups
    if transposed:
        group, _ = op.split(w[0], groups, within)
        out: Axis = Prod((group, w[1]))
        op.tie(x_axis, w[0])
    else:
        group, _ = op.split(w[0], groups, within)
        op.tie(x_axis, Prod((group, w[1])))
        out = w[0]
    if within > 1 and w[1].size > 1:  # else one side has nothing but the groups
        op.group(group)
    op.facts.notes["groups"] = group
    return out


def linear(op: LabelledOp) -> Labels:
    """``linear(x, w, bias)``: x (..., I), w (O, I) -> (..., O)."""
    x, w, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    op.multiply(op[x][-1], op[w][1])
    op.contract(x, len(x.shape) - 1)
    op.produce(op[w][0])
    if bias is not None:
        op.tie(op[w][0], op[bias][0])
    return (*op[x][:-1], op[w][0])


def _matmul(op: LabelledOp, a: Slot, b: Slot) -> Labels:
    la, lb = op[a], op[b]
    batch: list[Axis] = []
    for x, y in zip(la[:-2], lb[:-2], strict=True):
        op.tie(x, y)
        op.carry(x)
        batch.append(x)
    op.multiply(la[-1], lb[-2])
    op.contract(a, len(a.shape) - 1)
    op.produce(la[-2])
    op.produce(lb[-1])
    return (*batch, la[-2], lb[-1])


def mm(op: LabelledOp) -> Labels:
    """``mm(a, b)``: (M, K) x (K, N) -> (M, N)."""
    return _matmul(op, op.arg(0, "self"), op.arg(1, "mat2"))


bmm = mm


def grouped_mm(op: LabelledOp) -> Labels | Refusal:
    """``_grouped_mm(x, w, offs)``: consecutive rows of x, up to each offset, meet the weight of their own group.

    x: (S, K), w: (G, K, N), offs: (G,) -> out: (S, N); rows and groups are counted, so they stay
    """
    x, w, offsets = op.arg(0, "self"), op.arg(1, "mat2"), op.arg(2, "offs")
    if len(x.shape) != 2 or len(w.shape) != 3 or offsets is None:
        return Refusal("only rows that are grouped against one weight for each group are known")
    rows, inner = op[x]
    group, k, n = op[w]
    op.tie(inner, k)
    op.contract(x, 1)
    op.produce(n)
    for d in (1, 2):
        op.aligned(w, d)
    for axis in (rows, group, *op[offsets]):
        op.freeze(axis, "rows are counted out to groups")
    bias = op.arg(3, "bias")
    if bias is not None:
        op.tie(n, op[bias][-1])
    return (rows, n)


def addmv(op: LabelledOp) -> Labels:
    """``addmv(bias, a, v)``: bias (M,) plus (M, K) x (K,) -> (M,)."""
    a, v = op.arg(1, "mat"), op.arg(2, "vec")
    op.tie(op[a][1], op[v][0])
    op.contract(a, 1)
    return _add_to(op, (op[a][0],))


def addr(op: LabelledOp) -> Labels:
    """``addr(bias, a, b)``: bias (M, N) plus the outer product of (M,) and (N,)."""
    return _add_to(op, (op[op.arg(1, "vec1")][0], op[op.arg(2, "vec2")][0]))


def addbmm(op: LabelledOp) -> Labels:
    """``addbmm(bias, a, b)``: bias (M, N) plus the sum over B of (B, M, K) x (B, K, N)."""
    a = op.arg(1, "batch1")
    product = _matmul(op, a, op.arg(2, "batch2"))
    op.contract(a, 0)
    return _add_to(op, product[1:])


def distance(op: LabelledOp) -> Labels | Refusal:
    """``cdist(a, b, p)``: the norm of every difference of rows, a sum over their dim where removed units are zero.

    a: (*B, P, M), b: (*B, R, M) -> (*B, P, R), where the dims of B broadcast
    """
    a, b, order = op.arg(0, "x1"), op.arg(1, "x2"), op.named("p", 2)
    if not 0 < float(order) < float("inf"):
        return Refusal(f"a norm of order {order} is no sum of powers")
    la, lb = op[a], op[b]
    op.tie(la[-1], lb[-1])
    for slot in (a, b):
        op.contract(slot, len(slot.shape) - 1)
    batch: list[Axis] = []
    for back in range(len(op.out.shape), 2, -1):
        sized = [x[-back] for x in (la, lb) if len(x) >= back and x[-back].size == op.out.shape[-back]]
        for axis in sized[1:]:
            op.tie(sized[0], axis)
        batch.append(sized[0])
    return (*batch, la[-2], lb[-2])


def dist(op: LabelledOp) -> Labels | Refusal:
    """``dist(x, y, p)`` with p > 0: a sum of powers of differences, where removed units are zero in both."""
    x, y, order = op.arg(0, "self"), op.arg(1, "other"), op.arg(2, "p", 2)
    if not 0 < float(order) < float("inf"):
        return Refusal(f"a norm of order {order} is no sum of powers")
    for back in range(1, min(len(x.shape), len(y.shape)) + 1):
        if x.shape[-back] == y.shape[-back]:
            op.tie(op[x][-back], op[y][-back])
    for slot in (x, y):
        for d in range(len(slot.shape)):
            op.contract(slot, d)
    return ()


def renorm(op: LabelledOp) -> Labels | Refusal:
    """``renorm(x, p, dim, maxnorm)``: each slice along ``dim`` is scaled by its norm over the other dims."""
    x, order, dim = op.arg(0, "self"), op.arg(1, "p"), int(op.arg(2, "dim"))
    if not 0 < float(order) < float("inf"):
        return Refusal(f"a norm of order {order} is no sum of powers")
    if op.op.op._schema.is_mutable:
        return Refusal("it writes to what it sums over")
    for d in range(len(x.shape)):
        if d != dim % len(x.shape):
            op.contract(x, d)
    return op[x]


def _add_to(op: LabelledOp, product: Labels) -> Labels:
    bias = op.arg(0, "self")
    labels = op[bias]
    for back in range(1, len(labels) + 1):
        if bias.shape[-back] == product[-back].size:
            op.tie(product[-back], labels[-back])
    return product


def addmm(op: LabelledOp) -> Labels:
    """``addmm(bias, a, b)``: bias (N,) or (M, N), plus (M, K) x (K, N)."""
    return _add_to(op, _matmul(op, op.arg(1, "mat1"), op.arg(2, "mat2")))


def baddbmm(op: LabelledOp) -> Labels:
    """``baddbmm(bias, a, b)``: (B, M, N) plus (B, M, K) x (B, K, N)."""
    return _add_to(op, _matmul(op, op.arg(1, "batch1"), op.arg(2, "batch2")))


def mv(op: LabelledOp) -> Labels:
    """``mv(a, v)``: (M, K) x (K,) -> (M,)."""
    a, v = op.arg(0, "self"), op.arg(1, "vec")
    op.tie(op[a][1], op[v][0])
    op.contract(a, 1)
    return (op[a][0],)


def dot(op: LabelledOp) -> Labels:
    """``dot(a, b)``: (K,) x (K,) -> ()."""
    a, b = op.arg(0, "self"), op.arg(1, "tensor")
    op.tie(op[a][0], op[b][0])
    op.contract(a, 0)
    return ()


def attention(op: LabelledOp) -> Sequence[Labels] | Refusal:
    """Scaled dot-product attention, every backend.

    q: (N, H, L, E), k: (N, Hk, S, E), v: (N, Hk, S, Ev) -> out: (N, H, L, Ev); mask broadcasts over (N, H, L, S).
    """
    q, k, v = op.arg(0, "query"), op.arg(1, "key"), op.arg(2, "value")
    lq, lk, lv = op[q], op[k], op[v]
    for d in range(len(lq) - 2):
        if lk[d].size == lq[d].size:
            op.tie(lq[d], lk[d])
        elif lk[d].size == 1:
            pass
        else:
            shared, _ = op.split(lq[d], lk[d].size, lq[d].size // lk[d].size)
            op.tie(shared, lk[d])
        if lv[d].size == lk[d].size:
            op.tie(lk[d], lv[d])
        op.carry(lq[d])
    op.tie(lq[-1], lk[-1])
    op.contract(q, len(q.shape) - 1)
    op.tie(lk[-2], lv[-2])
    op.freeze(lk[-2], "softmax runs over it")
    out = (*lq[:-1], lv[-1])
    for slot in op.op.inputs():
        if slot in (q, k, v):
            continue
        for back, axis in enumerate(reversed(op[slot]), start=1):
            if back == 1:
                op.freeze(axis, "softmax runs over it")
            elif back <= len(lq) and axis.size == lq[-back].size and axis.size > 1:
                op.tie(axis, lq[-back])
    rest = []
    for extra in op.op.outs[1:]:
        same = extra.shape == tuple(a.size for a in out[: len(extra.shape)])
        rest.append(out[: len(extra.shape)] if same else tuple(op.fixed(n) for n in extra.shape))
    return [out, *rest]


def total(op: LabelledOp) -> Labels:
    """``sum(x, dim, keepdim)``: a contraction with ones."""
    x = op.arg(0, "self")
    has_dim = len(op.op.args) > 1 or "dim" in op.op.kwargs
    dims = reduced_dims(x, op.arg(1, "dim")) if has_dim else list(range(len(x.shape)))
    for d in dims:
        op.contract(x, d)
    return reduced_labels(op, x, dims)


def norm(op: LabelledOp) -> Labels | Refusal:
    """``linalg_vector_norm(x, ord, dim, keepdim)`` with ord > 0: a sum of powers, where removed units are zero."""
    x, order = op.arg(0, "self"), op.arg(1, "ord", 2)
    if order is not None and not 0 < float(order) < float("inf"):
        return Refusal(f"a norm of order {order} is no sum of powers")
    dims = reduced_dims(x, op.arg(2, "dim"))
    for d in dims:
        op.contract(x, d)
    return reduced_labels(op, x, dims)


def old_norm(op: LabelledOp) -> Labels | Refusal:
    """``norm(x, p, dim, keepdim)``: as :func:`norm`, under its older name."""
    x, order = op.arg(0, "self"), op.named("p", 2)
    if order is not None and not 0 < float(order) < float("inf"):
        return Refusal(f"a norm of order {order} is no sum of powers")
    dims = reduced_dims(x, op.named("dim"))
    for d in dims:
        op.contract(x, d)
    return reduced_labels(op, x, dims)


def weight_norm(op: LabelledOp) -> Sequence[Labels]:
    """``_weight_norm_interface(v, g, dim)``: v times g over the norm of v along every other dim.

    v: (O, I, *k), g: (O, 1, ...) for dim = 0 -> w like v, norms like g
    """
    v, g, dim = op.arg(0, "v"), op.arg(1, "g"), int(op.arg(2, "dim", 0)) % len(op.arg(0, "v").shape)
    labels = op[v]
    for d, axis in enumerate(op[g]):
        if axis.size == labels[d].size:
            op.tie(labels[d], axis)
    for d in range(len(labels)):
        if d != dim:
            op.contract(v, d)
    return [labels, op[g]]


def trilinear(op: LabelledOp) -> Labels:
    """``_trilinear(a, b, c, expand_a, expand_b, expand_c, sum)``: a product of three, summed over dims.

    Each operand gets dims of size 1 at its ``expand``; then sizes are equal or 1.
    """
    operands = [op.arg(i, f"i{i + 1}") for i in range(3)]
    inserted = [[int(d) for d in op.arg(i + 3, f"expand{i + 1}")] for i in range(3)]
    rank = len(operands[0].shape) + len(inserted[0])
    summed = [int(d) for d in op.arg(6, "sumdim")]
    out: list[Axis] = []
    for d in range(rank):
        found: list[tuple[Slot, int]] = []
        for slot, extra in zip(operands, inserted, strict=True):
            if d not in extra:
                found.append((slot, d - sum(e < d for e in extra)))
        sized = [(slot, k) for slot, k in found if slot.shape[k] != 1]
        for slot, k in sized[1:]:
            op.tie(op[sized[0][0]][sized[0][1]], op[slot][k])
        if d in summed:
            if sized:
                op.contract(*sized[0])
        else:
            out.append(op[sized[0][0]][sized[0][1]] if sized else op.fixed(1, "size 1"))
    for axis in op[operands[1]][:1]:
        op.produce(axis)
    return tuple(out)
