"""Views that move channels across space or the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import OtherSizeError
from tests.nets import Net, conv
from tests.oracle import assert_exact, randomise
from tests.random_nets.attention import Attention, Options
from tests.random_nets.tokens import ClassToken, Merge, Recurrent


def _untransposed(y: Tensor, *sizes: int) -> Tensor:
    return y.flatten(2).mT.reshape(y.shape[0], *sizes)


def _looked_up_by_place(y: Tensor) -> Tensor:
    groups = y.shape[1] // 16
    flat = y.reshape(y.shape[0], groups, 16, -1)[..., torch.arange(y.shape[2] * y.shape[3])]
    return flat.reshape(y.shape[0], groups, 16, *y.shape[2:]).squeeze(1)


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (lambda y: _untransposed(y, y.shape[1], y.shape[2], y.shape[3]), 16),
        (lambda y: _untransposed(y, 16, *y.shape[2:]), 16),
        (lambda y: _untransposed(y, -1, *y.shape[2:]), 16),
        (lambda y: y.flatten(2).permute(2, 0, 1).reshape(-1, y.shape[0] * 4, 4).reshape(-1, y.shape[0], 16), 8),
        (
            lambda y: y.flatten(2).permute(2, 0, 1).reshape(y.shape[2] * y.shape[3], -1, 4).reshape(-1, y.shape[0], 16),
            8,
        ),
        (lambda y: y.flatten(2).mT.reshape(y.shape[0], y.shape[2] * y.shape[3] * 4, 4).reshape(y.shape[0], -1, 16), 8),
        (_looked_up_by_place, 8),
    ],
)
def test_views_across_space_hold_at_every_size(step: Callable[[Tensor], Tensor], kept: int, side: int) -> None:
    """Channels that a view takes apart by the size of the image are frozen; heads beside batch or space are not."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = step(m.b(m.a(x)))
        return m.out(y.reshape(-1, 16)) if y.dim() == 3 else m.out(y.movedim(1, -1))

    torch.manual_seed(0)
    x, larger = (torch.randn(n, 3, s, s + n, dtype=torch.float64) for n, s in ((2, side), (3, 5)))
    if side == 1:
        x = x[..., :1]
    net = randomise(Net(forward, a=conv(3, 16), b=conv(16, 16), out=nn.Linear(16, 2)), (x,))
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("b.weight").shape[0] == kept
    assert_exact(net, slim, (larger,))


@pytest.mark.parametrize("length", [4, 8, 12])
def test_a_product_of_channels_and_rows_is_not_taken_apart_the_other_way(length: int) -> None:
    """A view that cuts rows keeps the channels whole; one that reads the product as rows of channels mixes them."""

    def patches(m: nn.Module, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        n, c, size = y.shape
        return m.out(y.reshape(n * c * (size // 4), 4).cumsum(1).reshape(n, c, size).mean(2))

    def mixed(m: nn.Module, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        n, c, size = y.shape
        return m.out(y.reshape(n, size // 4 * c, 4).sum(2).view(n, size // 4, c))

    torch.manual_seed(0)
    x, larger = (torch.randn(n, 3, s, dtype=torch.float64) for n, s in ((2, 8), (3, length)))
    for forward, kept in ((patches, 4), (mixed, 8)):
        net = randomise(Net(forward, a=nn.Conv1d(3, 8, 1), b=nn.Conv1d(8, 8, 1), out=nn.Linear(8, 2)), (x,))
        slim = chase_fx.prune(net, x).eval()
        assert slim.get_parameter("b.weight").shape[0] == kept
        assert_exact(net, slim, (larger,))


def test_copies_that_match_space_are_space() -> None:
    """Heads beside a batch may go, where the batch is that of a class token's copies."""

    def attend(m: nn.Module, x: Tensor) -> Tensor:
        tokens = torch.cat([m.get_parameter("token").expand(x.shape[0], -1, -1), m.a(x)], 1).transpose(0, 1)
        return m.out(m.b(tokens, tokens, tokens, need_weights=False)[0][0])

    torch.manual_seed(0)
    x, larger = (torch.randn(n, s, 6, dtype=torch.float64) for n, s in ((2, 7), (3, 9)))
    net = Net(attend, a=nn.Linear(6, 16), b=nn.MultiheadAttention(16, 4), out=nn.Linear(16, 2))
    net.token = nn.Parameter(torch.randn(1, 1, 16))
    randomise(net, (x,))
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("b.in_proj_weight").shape[0] < 48
    assert_exact(net, slim, (larger,))


def _rows(m: nn.Module, y: Tensor) -> Tensor:
    return m.out(y.mean(-1))


@pytest.mark.parametrize(
    ("step", "guarded"),
    [
        (lambda m, y: m.wide(y.view(-1, 16 * 8)), True),
        (lambda m, y: _rows(m, y.reshape(-1, 16, 8)), True),
        (lambda m, y: _rows(m, y.view(-1, 4, 4, 8).flatten(1, 2)), True),
        (lambda m, y: _rows(m, torch.cat([y, y]).view(2, -1, 16, 8).sum(0)), True),
        (lambda m, y: _rows(m, y.view(2, 16, -1)), True),
        (lambda m, y: m.out(y.mT.reshape(-1, 16)), False),
        (lambda m, y: m.out(y.mT.reshape(-1, 4, 16).sum(1)), False),
        (lambda m, y: _rows(m, y.view(-1, 16, y.shape[2])), False),
    ],
)
def test_numbers_that_stand_for_space_are_guarded(step: Callable[[nn.Module, Tensor], Tensor], guarded: bool) -> None:
    """``view(-1, 400)`` of a larger image makes more rows in the model, of other channels than in the slim graph."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return step(m, m.b(m.a(x)))

    torch.manual_seed(0)
    x, larger = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(4, 3, 16, dtype=torch.float64)
    parts = {"out": nn.Linear(16, 2), "wide": nn.Linear(128, 2)}
    net = randomise(Net(forward, a=nn.Conv1d(3, 16, 1), b=nn.Conv1d(16, 16, 1), **parts), (x,))
    net(larger)
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("a.weight").shape[0] == 8
    assert_exact(net, slim, (x,))
    if guarded:
        with pytest.raises(OtherSizeError, match=r"test_views\.py"):
            slim(larger)
    else:
        assert_exact(net, slim, (larger,))


def test_space_of_size_one_before_a_view() -> None:
    """A pooled image that is viewed as (-1, C) makes a row of each pixel where it is larger than one."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(nn.functional.avg_pool2d(m.a(x), 4).view(-1, 16))

    torch.manual_seed(0)
    x, larger = (torch.randn(2, 3, s, s, dtype=torch.float64) for s in (4, 8))
    net = randomise(Net(forward, a=conv(3, 16), out=nn.Linear(16, 2)), (x,))
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("a.weight").shape[0] == 8
    assert_exact(net, slim, (x,))
    assert net(larger).shape == (8, 2)
    with pytest.raises(OtherSizeError):
        slim(larger)


@pytest.mark.parametrize(
    ("step", "refused"),
    [
        (lambda m, y: m.long(y.flatten(1)[:, :64]), True),
        (lambda m, y: m.one(y.flatten(1)[:, 64:].sum(1, keepdim=True)), True),
        (lambda m, y: m.one(y.flatten(1).narrow(1, 8, 64).sum(1, keepdim=True)), True),
        (lambda m, y: m.one(y.flatten(1).split(64, 1)[0].sum(1, keepdim=True)), True),
        (lambda m, y: m.out(torch.as_strided(y.contiguous(), (len(y), 16, 8), (128, 8, 1)).mean(-1)), True),
        (lambda m, y: m.out(y.flatten(0, 1)[:16].mean(1)[None]), False),
        (lambda m, y: m.part(y[:, 4:].mean(2)), False),
    ],
)
def test_places_in_channels_and_space_are_guarded(step: Callable[[nn.Module, Tensor], Tensor], refused: bool) -> None:
    """The first 64 of channels x space are other channels where there is more space."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return step(m, m.b(m.a(x).relu()).relu())

    torch.manual_seed(0)
    x, larger = torch.randn(3, 3, 8, dtype=torch.float64), torch.randn(3, 3, 16, dtype=torch.float64)
    parts = {"out": nn.Linear(16, 2), "long": nn.Linear(64, 2), "one": nn.Linear(1, 2), "part": nn.Linear(12, 2)}
    net = randomise(Net(forward, a=nn.Conv1d(3, 16, 1), b=nn.Conv1d(16, 16, 1), **parts), (x,))
    net(larger)
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("b.weight").shape[0] < 16
    if refused:
        with pytest.raises(OtherSizeError, match=r"test_views\.py"):
            slim(larger)
    else:
        slim(larger)


def test_a_number_that_cuts_space_into_pieces_keeps_the_channels() -> None:
    """``reshape(-1, 8)`` of a signal cuts no channel where the length is a multiple of 8; else it is refused."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).reshape(-1, 8).softmax(-1)
        return m.out(y.view(x.shape[0], 16, -1))

    torch.manual_seed(0)
    x = (torch.randn(2, 3, 16, dtype=torch.float64),)
    net = randomise(Net(forward, a=nn.Conv1d(3, 16, 1), out=nn.Conv1d(16, 2, 1)), x)
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("a.weight").shape[0] == 8
    for batch, length in ((3, 8), (2, 40)):
        assert_exact(net, slim, (torch.randn(batch, 3, length, dtype=torch.float64),))
    with pytest.raises(OtherSizeError):
        slim(torch.randn(2, 3, 12, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_bias_of_fixed_length_that_is_repeated_over_the_batch(batch: int) -> None:
    """It keeps its heads beside a batch of one, too: its own length is not space that moved across them."""
    options = Options("chunk", "bmm", 3, 2, 3, "interleave", "none", "table", "flatten")
    torch.manual_seed(0)
    after = ClassToken(6, end=False), Recurrent("GRU", 6, 4, both=False), nn.Linear(6, 2)
    net = nn.Sequential(Merge(3, 6, view=False), Attention(6, 4, options), *after)
    x, others = torch.randn(batch, 8, 3, dtype=torch.float64), torch.randn(3, 8, 3, dtype=torch.float64)
    net = randomise(net, (x,))
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("1.table").shape == (7, 2)
    assert_exact(net, slim, (others,))


def test_rows_of_size_one_that_a_view_moves_across_channels() -> None:
    """``(N, H, C, W)`` viewed as ``(N, C, H, W)`` moves nothing where H is one, but mixes channels elsewhere."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y.transpose(1, 2).reshape(y.shape)))

    torch.manual_seed(0)
    x, higher = (torch.randn(2, 3, height, 4, dtype=torch.float64) for height in (1, 3))
    net = randomise(Net(forward, a=conv(3, 16), b=conv(16, 16), out=conv(16, 2)), (x,))
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("b.weight").shape[:2] == (8, 16)
    for inputs in ((x,), (higher,)):
        assert_exact(net, slim, inputs)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_window_of_a_single_image_is_cut_from_the_image(batch: int) -> None:
    """The number of windows, one here, comes from the height and the width that are behind the channels already."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        rows, columns = y.shape[2] // 4, y.shape[3] // 4
        windows = y.reshape(-1, 8, rows, 4, columns, 4).permute(0, 1, 3, 5, 2, 4)
        back = windows.softmax(2).permute(0, 1, 4, 2, 5, 3).reshape(y.shape)
        return m.out(back)

    torch.manual_seed(0)
    x, others = torch.randn(batch, 3, 4, 4, dtype=torch.float64), torch.randn(3, 3, 8, 4, dtype=torch.float64)
    net = randomise(Net(forward, a=conv(3, 16), out=conv(16, 2)), (torch.randn(3, 3, 4, 4, dtype=torch.float64),))
    slim = chase_fx.prune(net, x).eval()
    assert slim.get_parameter("a.weight").shape[0] == 8
    assert_exact(net, slim, (others,))


def test_rows_that_were_put_together_with_windows_of_heads_come_apart_again() -> None:
    """``(N * heads * windows * rows, W, k)`` is cut before the rows: the size says so, for it is that of the rest."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        n, _, height, width = y.shape
        queries = y.reshape(n, 4, 4, height // 2, 2, width).permute(0, 1, 3, 4, 5, 2).reshape(-1, 2, width, 4)
        count, rows = queries.shape[:2]
        logits = (queries @ m.relative).reshape(-1, width, 3).softmax(1).reshape(count, rows, width, 3)
        return m.out(logits.reshape(n, 4, height, width, 3).permute(0, 1, 4, 2, 3).flatten(1, 2))

    torch.manual_seed(0)
    x, others = (torch.randn(2, 3, height, 5, dtype=torch.float64) for height in (4, 6))
    net = Net(forward, a=conv(3, 16), out=conv(12, 2))
    net.relative = nn.Parameter(torch.randn(4, 3))
    net = randomise(net, (x,))
    traced = chase_fx.trace(net, x)
    channels = chase_fx.analyze(traced)
    assert ("a.weight", 0) not in channels.frozen
    heads = next(
        group.name for group in channels.groups if {m.tensor for m in group.members} >= {"a.bias", "out.weight"}
    )
    slim = chase_fx.rewrite(traced, channels.plan_keeping({heads: torch.tensor([True, False, False, True])})).eval()
    assert slim.get_parameter("out.weight").shape[1] == 6
    for inputs in (x, others):
        assert_exact(net, slim, (inputs,))


def test_single_channels_that_stay_are_no_space() -> None:
    """A number read from a dim of channels that are cut one by one is no size of space, at any batch size."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = torch.cat([y[..., i : i + 1].tanh() for i in range(6)], -1)
            return self.last(self.attention(y, y, y, need_weights=False)[0])

    model = Net()
    plans = [chase_fx.analyze(chase_fx.trace(model, torch.randn(n, 5, 4))).plan(0.5) for n in (1, 2, 3)]
    assert plans[0].new_shape("attention.out_proj.weight")[1] < 6
    assert [list(plans[0].differences(plan)) for plan in plans[1:]] == [[], []]
