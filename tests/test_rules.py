"""Operator rules on one small net per family: the axes they find, and that pruning by them is exact."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.graphs.rules import DEFAULT_RULES
from chase_fx.graphs.rules.base import LabelledOp, Labels, Refusal
from tests.nets import NETS, Net, build, conv
from tests.oracle import EXACT, assert_exact, randomise

aten = torch.ops.aten

# net -> the axis of a tensor dim that the rule decides, written by hand: (tensor, dim, axis); A, B... are groups, and
# [] is what is in another order
AXES: dict[str, list[tuple[str, int, str]]] = {
    "attention": [("q.weight", 0, "(2<A> * 8<B>)"), ("k.weight", 0, "(2<A> * 8<B>)"), ("v.weight", 0, "(2<A> * 8<C>)")],
    "batch_norm": [("a.weight", 0, "8<A>"), ("norm.running_var", 0, "8<A>"), ("norm.bias", 0, "8<A>")],
    "chain": [("a.bias", 0, "8<A>"), ("out.weight", 1, "8<A>"), ("out.weight", 0, "2"), ("a.weight", 1, "3")],
    "channel_max": [("a.weight", 0, "8"), ("b.weight", 0, "8<A>")],
    "channel_mean": [("a.weight", 0, "8<A>"), ("out.weight", 1, "8<A>")],
    "concat": [("a.weight", 0, "8<A>"), ("b.weight", 0, "4<B>"), ("out.weight", 1, "(8<A> + 4<B>)")],
    "cumulative": [("a.weight", 0, "8<A>"), ("b.weight", 0, "8")],
    "embedding": [("a.weight", 0, "8<A>"), ("place.weight", 0, "4"), ("place.weight", 1, "8<A>")],
    "excite": [("a.weight", 0, "8<A>"), ("gate.weight", 0, "8<A>"), ("gate.weight", 1, "8<A>")],
    "flatten": [("a.weight", 0, "8<A>"), ("out.weight", 1, "(8<A> * 16)")],
    "flip": [("b.weight", 0, "8<A>"), ("out.weight", 1, "8<A>[]")],
    "gather": [("b.weight", 0, "(2 + 6<A>)[]"), ("out.weight", 1, "6<A>[]")],
    "glu": [("a.weight", 0, "(8<A> + 8<A>)"), ("out.weight", 1, "8<A>")],
    "group_norm": [("a.weight", 0, "(2<A> * 4<B>)"), ("norm.weight", 0, "(2<A> * 4<B>)")],
    "grouped": [
        ("a.weight", 0, "(4<A> * 2<B>)"),
        ("b.weight", 0, "(4<A> * 4<C>)"),
        ("b.weight", 1, "2<B>"),
        ("out.weight", 1, "(4<A> * 4<C>)"),
    ],
    "interleave": [("out.weight", 1, "(8<A> * 2)")],
    "layer_norm": [("a.weight", 0, "8<A>"), ("norm.weight", 0, "8<A>"), ("norm.bias", 0, "8<A>")],
    "matmul": [("a.weight", 0, "8<A>"), ("b.weight", 0, "8<A>"), ("c.weight", 0, "8<B>"), ("out.weight", 1, "8<B>")],
    "pad": [("a.weight", 0, "(2<A> + 6<B> + 4<C>)"), ("b.weight", 0, "6<B>")],
    "permute": [("a.weight", 0, "8<A>"), ("out.weight", 1, "8<A>")],
    "pixel_shuffle": [("a.weight", 0, "(4<A> * 4)"), ("out.weight", 1, "4<A>")],
    "repeat": [("a.weight", 0, "8<A>"), ("out.weight", 1, "(2<B> * 8<A>)")],
    "residual": [("a.weight", 0, "8<A>"), ("b.weight", 0, "8<A>"), ("out.weight", 1, "8<A>")],
    "rms_norm": [("a.weight", 0, "8<A>"), ("norm.weight", 0, "8<A>")],
    "roll": [("b.weight", 0, "(5<A> + 3<B>)"), ("out.weight", 1, "(3<B> + 5<A>)")],
    "select": [("b.weight", 0, "(6<A> + 2)"), ("out.weight", 1, "(6<A> + 2)")],
    "shuffle": [("a.weight", 0, "(2<A> * 4<B>)"), ("b.weight", 0, "(4<B> * 2<A>)"), ("out.weight", 1, "(4<B> * 2<A>)")],
    "slice": [("a.weight", 0, "(2<A> + 6<B> + 4<C>)"), ("out.weight", 1, "6<B>")],
    "softmax": [("a.weight", 0, "8<A>"), ("b.weight", 0, "8")],
    "split": [("a.weight", 0, "(4<A> + 8<B>)"), ("b.weight", 1, "4<A>"), ("tail.weight", 1, "8<B>")],
    "sum": [("a.weight", 0, "8<A>"), ("out.weight", 1, "8<A>")],
    "topk": [("b.weight", 0, "8"), ("out.weight", 1, "4")],
    "transpose": [("a.weight", 0, "16<A>"), ("out.weight", 1, "16<A>")],
    "transposed": [("b.weight", 0, "(2<A> * 4<B>)"), ("b.weight", 1, "6<C>"), ("out.weight", 1, "(2<A> * 6<C>)")],
}


def axes_of(channels: chase_fx.ChannelGraph) -> dict[str, list[str]]:
    lines = (line.partition(": ") for line in str(channels).splitlines())
    return {name: axes.split(" x ") for name, _, axes in lines}


@pytest.mark.parametrize("name", sorted(NETS))
def test_axes(name: str) -> None:
    """The axes that the rules find are those worked out by hand, up to the names of the groups."""
    net, x = build(name)
    found = axes_of(chase_fx.analyze(chase_fx.trace(net, x)))
    names: dict[str, str] = {}
    for tensor, dim, expected in AXES[name]:
        text = re.sub(r"\[\w+\]", "[]", found[tensor][dim])
        for group in [part.partition(">")[0] for part in text.split("<")[1:]]:
            names.setdefault(group, "ABCDEF"[len(names)])
        for group in sorted(names, key=len, reverse=True):
            text = text.replace(f"<{group}>", f"<{names[group]}>")
        assert text == expected, f"{tensor} dim {dim}"


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("name", sorted(set(NETS) - {"channel_mean"}))
def test_exact(name: str, score: str, sparsity: float) -> None:
    """Each net is exact by both oracles, at several sparsities, also on another batch size."""
    net, x = build(name)
    slim = chase_fx.prune(net, x, channel_sparsity=sparsity, score=score).eval()
    assert chase_fx.verify(chase_fx.trace(net, x), slim).difference <= EXACT
    assert_exact(net, slim, x)
    assert_exact(net, slim, build(name, batch=5)[1])


def test_channel_mean_counts_kept_channels() -> None:
    """A mean over channels is the mean of the channels that are left."""
    net, x = build("channel_mean")
    slim = chase_fx.prune(net, x, channel_sparsity=0.5).eval()
    kept = slim.plan.kept_indices()["a.weight"][0]
    y = net.a(*x)[:, kept]
    expected = F.conv2d(y, net.out.weight[:, kept], net.out.bias) + y.mean(1, keepdim=True)
    assert torch.allclose(slim(*x), expected, rtol=1e-12, atol=1e-12)


def test_attention_keeps_the_dense_scale() -> None:
    """Slimmer heads are still scaled by the dense head_dim ** -0.5."""
    net, x = build("attention")
    channels = chase_fx.analyze(chase_fx.trace(net, x))
    heads = {group.name: group.size for group in channels.groups}
    keys = next(name for name in heads if name == "q.weight:0#1")
    traced = chase_fx.trace(net, x)
    plan = chase_fx.analyze(traced).plan_keeping({keys: torch.arange(8) < 3})
    slim = chase_fx.rewrite(traced, plan).eval()
    assert slim.get_parameter("q.weight").shape == (6, 3)
    assert chase_fx.verify(traced, slim).difference <= EXACT
    assert_exact(net, slim, x)


@pytest.mark.parametrize("name", sorted(NETS))
def test_batch_size_does_not_matter(name: str) -> None:
    """Captures at batch sizes 1, 2, 3 and 8 find the same axes."""
    texts = set()
    for batch in (1, 2, 3, 8):
        net, x = build(name, batch)
        texts.add(str(chase_fx.analyze(chase_fx.trace(net, x))))
    assert len(texts) == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_image_size_does_not_matter(layers: int) -> None:
    """Images whose size equals a channel count give the axes that other images give."""
    torch.manual_seed(0)
    body = [nn.Sequential(conv(8, 8, kernel=3), nn.ReLU()) for _ in range(layers)]
    net = nn.Sequential(conv(3, 8), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8))
    texts = {str(chase_fx.analyze(chase_fx.trace(net, torch.zeros(2, 3, n, n)))) for n in (3, 5, 8, 16)}
    assert len(texts) == 1


@pytest.mark.parametrize(("sparsity", "shape", "groups"), [(0.5, (8, 1, 1, 1), 4), (0.75, (4, 1, 1, 1), 2)])
def test_grouped_convolution_gets_narrower_before_it_loses_groups(
    sparsity: float, shape: tuple[int, ...], groups: int
) -> None:
    """At 50 % a quarter of its weights stays, as in any other convolution; groups go where no channel in them can."""
    net, x = build("grouped")
    slim = chase_fx.prune(net, x, channel_sparsity=sparsity)
    assert slim.get_submodule("b").groups == groups
    assert slim.get_parameter("b.weight").shape == shape


def test_groups_make_up_for_what_rounding_leaves() -> None:
    """Two of three channels in each group are more than half, so one of four groups goes as well."""
    net = Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 12), b=conv(12, 12, groups=4), out=conv(12, 2))
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    slim = chase_fx.prune(randomise(net, (x,)), x).eval()
    assert slim.get_parameter("b.weight").shape == (6, 2, 1, 1)
    assert_exact(net, slim, (x,))


def test_depthwise_says_nothing_of_groups() -> None:
    """A depthwise convolution behind a grouped one leaves it to that one what its channels lose."""
    net = Net(
        lambda m, x: m.out(m.c(m.b(m.a(x)))),
        a=conv(3, 24), b=conv(24, 32, groups=4), c=conv(32, 32, groups=32, kernel=3), out=conv(32, 2),
    )  # fmt: skip
    slim = chase_fx.prune(net, torch.randn(3, 3, 4, 4))
    assert slim.get_parameter("b.weight").shape == (16, 3, 1, 1)
    assert slim.get_parameter("c.weight").shape == (16, 1, 3, 3)


def test_depthwise_goes_with_its_input() -> None:
    """A depthwise convolution loses the channels of the layer before it, and its groups follow."""
    net = Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=8, kernel=3), out=conv(8, 2))
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    slim = chase_fx.prune(randomise(net, (x,)), x).eval()
    assert (slim.get_submodule("b").groups, slim.get_submodule("b").in_channels) == (4, 4)
    assert_exact(net, slim, (x,))


def test_reading_a_shape_freezes_nothing() -> None:
    """A call whose result is only measured ties and freezes nothing."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        n = torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -128, 127).shape[0]
        return m.out(y).view(n, -1)

    net = Net(forward, a=conv(3, 8), out=conv(8, 2))
    channels = chase_fx.analyze(chase_fx.trace(net, torch.zeros(2, 3, 4, 4)))
    assert not channels.unknown
    assert [group.size for group in channels.groups] == [8]


def test_refusal_freezes_with_its_reason() -> None:
    """A rule that refuses freezes all that goes in, and its reason is what `frozen` and `unknown` tell."""

    def refuse(op: LabelledOp) -> Refusal:
        return Refusal("no relu today")

    net, x = build("chain")
    channels = chase_fx.analyze(chase_fx.trace(net, x), rules=DEFAULT_RULES.extend({aten.relu: refuse}))
    assert "no relu today" in channels.frozen["a.weight", 0]
    assert [(unknown.op, unknown.reason) for unknown in channels.unknown] == [("aten::relu", "no relu today")]


def test_broken_rule_freezes() -> None:
    """A rule that raises, or gives sizes that are not those of the output, proves nothing: its channels are frozen."""

    def raises(op: LabelledOp) -> Labels:
        raise IndexError("no such dim")

    def too_short(op: LabelledOp) -> Labels:
        return op[op.arg(0, "self")][:2]

    net, x = build("chain")
    traced = chase_fx.trace(net, x)
    for rule in (raises, too_short):
        channels = chase_fx.analyze(traced, rules=DEFAULT_RULES.extend({aten.relu: rule}))
        assert ("a.weight", 0) in channels.frozen
        assert len(channels.unknown) == 1


def test_in_place_forms_share_their_rule() -> None:
    """An in-place or out-of-place form, and each overload, is found under the operator's name."""
    relu = DEFAULT_RULES.find(aten.relu.default)
    assert relu is not None
    assert DEFAULT_RULES.find(aten.relu_.default) is relu
    assert DEFAULT_RULES.find(aten.add_.Tensor) is DEFAULT_RULES.find(aten.add.Tensor)
    assert DEFAULT_RULES.find(aten.cat.default) is DEFAULT_RULES.table[aten.cat]
    assert DEFAULT_RULES.find(aten.fake_quantize_per_tensor_affine_cachemask.default) is None


@pytest.mark.parametrize(
    "step",
    [
        lambda y: y.add_(1).relu_(),
        lambda y: y.clone().mul_(2),
        lambda y: F.hardtanh(y, inplace=True),
        lambda y: y.sub(y.mean((2, 3), keepdim=True)),
        lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
        lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
        lambda y: y.masked_fill(y > 0.5, 0.0),
        lambda y: y.masked_fill(y > 0.5, y.mean()),
        lambda y: y.clone().masked_fill_(y[:, :1] > 0.5, 0.0),
        lambda y: y * torch.floor_divide(y, 0.7),
        lambda y: y * F.mse_loss(y, y.relu()) + F.smooth_l1_loss(y, y.tanh(), reduction="none"),
        lambda y: y * F.binary_cross_entropy_with_logits(y, y.sigmoid(), reduction="sum"),
        lambda y: y * torch.cdist(y.flatten(2).mT, y.flatten(2).mT).sum((1, 2))[:, None, None, None],
        lambda y: y + torch.linalg.solve_triangular(torch.eye(4).to(y) + y[0, 0].tril(), y, upper=False),
        lambda y: torch.where(y > 0, y, y * 0.1),
        lambda y: F.normalize(y, dim=1),
        lambda y: torch.einsum("nchw,ndhw->nchw", y, y),
        lambda y: torch.stack([y, y * 2]).sum(0),
        lambda y: torch.stack([y, y * 2], 2).flatten(1, 2).unflatten(1, (8, 2))[:, :, 1],
        lambda y: y.unbind(0)[0][None].expand_as(y) + y,
        lambda y: y.movedim(1, -1).contiguous().movedim(-1, 1),
        lambda y: torch.cat([y[:, 3:], y[:, :3]], 1),
        lambda y: torch.cat(torch.tensor_split(y, 3, 1)[::-1], 1),
        lambda y: torch.cat(y.tensor_split(sections=3, dim=1)[::-1], 1),
        lambda y: torch.cat(y.tensor_split((-3, 20), 1)[::-1], 1),
        lambda y: torch.cat(y.tensor_split(indices=(5, 2), dim=1)[::2], 1)[:, 1:9],
        lambda y: torch.cat(y.hsplit(2)[::-1], 1),
        lambda y: torch.cat(torch.hsplit(y, [3])[::-1], 1),
        lambda y: torch.cat(torch.vsplit(y.transpose(0, 1), 4)[::-1]).transpose(0, 1),
        lambda y: torch.cat(y.transpose(1, 2).dsplit(2)[::-1], 2).transpose(1, 2),
        lambda y: y.narrow(1, 2, 6).repeat(1, 2, 1, 1)[:, 2:10],
        lambda y: F.avg_pool2d(y, 2).repeat_interleave(2, 2).repeat_interleave(2, 3),
        lambda y: y.gather(2, torch.zeros(1, 1, 4, 1).long().repeat(y.shape[0], y.shape[1], 1, y.shape[3])),
        lambda y: y * y.mean(1, keepdim=True).repeat_interleave(y.shape[1], 1),
        lambda y: F.avg_pool2d(y.movedim(1, -1), (2, 1), (2, 1)).repeat_interleave(2, 2).movedim(-1, 1),
        lambda y: F.max_pool2d(y.movedim(1, -1), (3, 1), (1, 1), (1, 0)).movedim(-1, 1),
        lambda y: y.roll(1, 2).flip(3),
        lambda y: (y.flatten(2) @ y.flatten(2).transpose(1, 2)).softmax(-1).sum(-1)[:, :, None, None] * y,
        lambda y: y * y.new_ones(y.shape[1])[:, None, None],
        lambda y: y + torch.zeros_like(y).index_fill(2, torch.tensor([0]), 1.0),
        lambda y: y[:, ::2].repeat(1, 2, 1, 1),
        lambda y: y[:, torch.arange(8).flip(0)],
        lambda y: F.unfold(y, 1).view(y.shape),
        lambda y: y.repeat_interleave(2, dim=1, output_size=y.shape[1] * 2)[:, ::2],
        lambda y: torch.repeat_interleave(y, 2, dim=1, output_size=16).unflatten(1, (8, 2)).sum(2),
        lambda y: F.pad(y[:, :6], (0, 0, 0, 0, 0, y.shape[1] - 6)) + y,
        lambda y: y.reshape(y.shape[0], 4, 2, 4, 4).amax(2).repeat(1, 2, 1, 1),
        lambda y: F.local_response_norm(y, 3),
        F.instance_norm,
    ],
)
def test_one_operator_between_two_layers(step: object) -> None:
    """Whatever stands between two layers, the slim net equals the masked dense one, at any batch size."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(step(m.b(m.a(x))))

    torch.manual_seed(0)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = randomise(Net(forward, a=conv(3, 8), b=conv(8, 8), out=conv(8, 2)), (x,))
    for sparsity in (0.3, 0.7):
        slim = chase_fx.prune(net, x, channel_sparsity=sparsity, score="random")
        assert slim.get_parameter("a.weight").shape[0] < 8
        assert chase_fx.verify(chase_fx.trace(net, x), slim).difference <= EXACT
        assert slim(x[:1]).shape == net(x[:1]).shape


def test_unpooling_ties_values_to_places() -> None:
    """What is put back by the places of other channels' maxima has the channels of those."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(m.a(x), 2, return_indices=True)
        return m.out(F.max_unpool2d(m.b(pooled), places, 2))

    torch.manual_seed(0)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = randomise(Net(forward, a=conv(3, 8), b=conv(8, 8), out=conv(8, 2)), (x,))
    slim = chase_fx.prune(net, x, score="random").eval()
    assert slim.plan.new_shape("b.weight") == (4, 4, 1, 1)
    assert_exact(net, slim, (x,))


def test_channels_that_neighbours_normalise_stay_and_say_why() -> None:
    net = Net(lambda m, x: m.out(F.local_response_norm(m.a(x), 3)), a=conv(3, 8), out=conv(8, 2))
    channels = chase_fx.analyze(chase_fx.trace(net, torch.randn(3, 3, 4, 4)))
    assert channels.unknown == ()
    reason = "windows run over it: aten.avg_pool3d.default at node 'local_response_norm'"
    assert channels.frozen["a.weight", 0].startswith(reason)


def test_tables_that_a_forward_makes_by_place() -> None:
    """Sinusoidal positions, frequencies and identities made in a forward freeze no channels: kept places are taken."""

    def positions(h: int, w: int, channels: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        omega = 1 / (10 ** (torch.arange(channels // 4) / (channels // 4)))
        y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
        return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1).double()

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).flatten(2).mT
        y = y + positions(x.shape[2], x.shape[3], y.shape[2])
        return m.out(y @ torch.eye(y.shape[2]).double() * torch.linspace(1, 2, y.shape[2]).double())

    torch.manual_seed(0)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = randomise(Net(forward, a=conv(3, 32), out=nn.Linear(32, 2)), (x,))
    slim = chase_fx.prune(net, x)
    assert slim.get_parameter("a.weight").shape[0] == 16
    assert set(slim.state_dict()) == set(net.state_dict())
    assert_exact(net, slim.eval(), (x,))
    assert_exact(net, slim, (torch.randn(2, 3, 5, 6, dtype=torch.float64),))
    assert torch.equal(torch.compile(slim, backend="eager", fullgraph=True)(x), slim(x))


@pytest.mark.parametrize("live", [True, False])
def test_windows_over_rows(live: bool) -> None:
    """Overlapping windows of rows by ``as_strided``: a row's channels pass, whatever lies beside them in memory."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).unflatten(-1, (2, 4)).transpose(1, 2)  # (N, heads, rows, channels), rows are not next to each other
        strides = y.stride() if live else (48, 4, 8, 1)
        n, h, rows, c = y.shape
        windows = y.as_strided((n, h, (rows - 2) // 2, 4, c), (*strides[:2], strides[2] * 2, *strides[2:]))
        return m.out(windows.amax(-2).transpose(1, 2).flatten(-2))

    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    net = randomise(Net(forward, a=nn.Linear(5, 8), out=nn.Linear(8, 3)))
    slim = chase_fx.prune(net, x)
    assert slim.plan.new_shape("a.weight") == (4, 5)
    assert_exact(net, slim, (x,))
    if live:
        x = torch.randn(3, 10, 5, dtype=torch.float64)
        assert torch.equal(chase_fx.trace(net, x)(x), net(x))
        assert_exact(net, slim, (x,))


def test_grouped_products() -> None:
    """Rows that are counted out to experts: the inner and outer widths of the experts can shrink."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
        hidden = F.grouped_mm(m.a(x), m.up, offs=offsets).relu()
        return m.out(F.grouped_mm(hidden, m.down.transpose(1, 2), offs=offsets))

    torch.manual_seed(0)
    net = Net(forward, a=nn.Linear(5, 16), out=nn.Linear(16, 3))
    net.up, net.down = nn.Parameter(torch.randn(3, 16, 32)), nn.Parameter(torch.randn(3, 16, 32))
    for sparsity, kept in ((0.5, (3, 8, 16)), (0.8, (3, 4, 8))):  # the kernel takes multiples of four only
        slim = chase_fx.prune(net, torch.randn(6, 5), channel_sparsity=sparsity)
        assert slim.plan.new_shape("up") == kept
        assert slim.plan.new_shape("down") == kept
    channels = chase_fx.analyze(chase_fx.trace(net, torch.randn(6, 5)))
    ranked = channels.plan(0.55, scope="global")
    assert all(n % 4 == 0 for n in ranked.new_shape("up")[1:])


def test_a_width_that_an_input_tells_is_no_space() -> None:
    """Attention that reads its width from an input which its weights are multiplied with prunes its heads."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        length, batch, width = x.shape
        q, k, v = (layer(x).view(length, batch * 4, width // 4).transpose(0, 1) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, batch, width)
        return m.out(y)

    torch.manual_seed(0)
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    net = Net(forward, **{name: nn.Linear(12, 12) for name in "qkv"}, out=nn.Linear(12, 3))
    slim = chase_fx.prune(net.double(), x)
    assert slim.get_parameter("q.weight").shape == (6, 12)
    assert slim(torch.randn(7, 3, 12, dtype=torch.float64)).shape == (7, 3, 3)
