"""Zeros that stand in for the results of ATen operators look as the results do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chase_fx.graphs.standin_results import CONTRACTIONS, ELEMENTWISE, Zeros

aten = torch.ops.aten


def conv(x: tuple[int, ...], w: tuple[int, ...], *, groups: int = 1, flip: bool = False, last: bool = False) -> Any:
    """Arguments of a convolution with a stride, padding and, where it is transposed (``flip``), an output padding."""
    images = torch.randn(x).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    bias = torch.randn(w[1] * groups if flip else w[0])
    one = [1] * (len(w) - 2)
    two, extra = [2 * n for n in one], [int(flip) * n for n in one]
    return aten.convolution.default, (images, torch.randn(w), bias, two, one, one, flip, extra, groups)


def attention(q: torch.Tensor, k: torch.Tensor) -> Any:
    """Arguments of an attention."""
    return aten._scaled_dot_product_flash_attention_for_cpu.default, (q, k, k)


CASES: dict[str, Callable[[], Any]] = {
    "mm": lambda: (aten.mm.default, (torch.randn(200, 100), torch.randn(300, 100).t())),
    "bmm": lambda: (aten.bmm.default, (torch.randn(4, 100, 100), torch.randn(4, 100, 100).mT)),
    "addmm": lambda: (aten.addmm.default, (torch.randn(300), torch.randn(200, 100), torch.randn(100, 300))),
    "baddbmm": lambda: (aten.baddbmm.default, tuple(torch.randn(4, 100, 100) for _ in range(3))),
    "conv1d": lambda: conv((2, 32, 500), (64, 32, 3)),
    "conv2d": lambda: conv((2, 32, 30, 31), (64, 32, 3, 2)),
    "conv3d": lambda: conv((1, 16, 10, 11, 12), (32, 16, 3, 3, 3)),
    "depthwise": lambda: conv((1, 96, 57, 56), (96, 1, 7, 7), groups=96),
    "small depthwise": lambda: conv((1, 240, 28, 28), (240, 1, 3, 3), groups=240),
    "1x1 of a place": lambda: conv((1, 240, 1, 1), (960, 240, 1, 1)),
    "grouped": lambda: conv((2, 32, 30, 31), (64, 8, 3, 3), groups=4),
    "channels last": lambda: conv((2, 32, 30, 31), (64, 32, 3, 3), last=True),
    "depthwise, channels last": lambda: conv((1, 96, 57, 56), (96, 1, 7, 7), groups=96, last=True),
    "1x1, channels last": lambda: conv((1, 96, 57, 56), (96, 96, 1, 1), last=True),
    "transposed": lambda: conv((2, 32, 30, 31), (32, 64, 3, 3), flip=True),
    "transposed and grouped": lambda: conv((2, 32, 30, 31), (32, 16, 3, 3), groups=4, flip=True),
    "attention": lambda: attention(torch.randn(2, 4, 60, 32), torch.randn(2, 4, 70, 32)),
    "attention, heads last": lambda: attention(
        torch.randn(2, 60, 4, 32).transpose(1, 2), torch.randn(2, 70, 4, 32).transpose(1, 2)
    ),
    "attention, grouped": lambda: attention(torch.randn(2, 4, 60, 32), torch.randn(2, 2, 70, 32)),
    "attention, fused": lambda: attention(
        torch.randn(2, 60, 3, 4, 32)[:, :, 0].transpose(1, 2), torch.randn(2, 70, 3, 4, 32)[:, :, 1].transpose(1, 2)
    ),
    "attention, expanded": lambda: attention(
        torch.randn(1, 4, 60, 32).expand(2, -1, -1, -1), torch.randn(2, 4, 70, 32)
    ),
}


def look(result: Any) -> list[Any]:
    """What a capture sees of a result."""
    results = result if isinstance(result, tuple) else (result,)
    return [(r.shape, r.stride(), r.dtype, r.device) for r in results]


@pytest.mark.parametrize("name", CASES)
def test_stand_ins_look_like_the_results(name: str) -> None:
    """Shape, strides and dtype are those that torch gives."""
    func, args = CASES[name]()
    assert look(CONTRACTIONS[func](Zeros(), *args)) == look(func(*args))


def _laid_out(draw: st.DrawFn, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape whose dims lie in memory in any order, with gaps or without."""
    order = draw(st.one_of(st.just(list(range(len(shape)))), st.permutations(range(len(shape)))))
    wide = [shape[d] + draw(st.sampled_from((0, 0, 0, 1))) for d in order]
    found = torch.ones(wide, dtype=dtype).permute([order.index(d) for d in range(len(shape))])
    return found[tuple(slice(n) for n in shape)]


@st.composite
def elementwise(draw: st.DrawFn) -> Any:
    """A call of an elementwise operator, mostly as it has to be, with tensors in any layout."""
    func = draw(st.sampled_from(list(ELEMENTWISE)))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16)))
    shape = draw(st.sampled_from(([2, 64, 20, 20], [1, 64, 32, 32], [64, 1024], [40000], [3, 128, 128], [64, 1, 1024])))
    x = _laid_out(draw, shape, dtype)
    name = func._schema.name.removeprefix("aten::")
    args: tuple[Any, ...] = (x,)
    kwargs: dict[str, Any] = {}
    if name.rstrip("_") in ("add", "sub", "mul", "div"):
        sizes = [draw(st.sampled_from((n, n, 1))) for n in shape][draw(st.integers(0, len(shape))) :]
        y = _laid_out(draw, sizes, draw(st.sampled_from((dtype, dtype, torch.float32, torch.int64))))
        args = x, draw(st.sampled_from((y, 2, 0.5)))
        if args[1] is y and not name.endswith("_") and draw(st.booleans()):
            args = y, x
    elif name == "pow":
        args = x, draw(st.sampled_from((2, 0.5, -1)))
    elif name == "_softmax":
        args = x, draw(st.integers(-len(shape), len(shape) - 1)), False
    elif name == "mean":
        dims = draw(st.lists(st.integers(-len(shape), len(shape) - 1), max_size=3))
        args = x, draw(st.sampled_from((dims, None))), draw(st.booleans())
        kwargs = draw(st.sampled_from(({}, {}, {"dtype": torch.float64})))
    elif name == "native_layer_norm":
        last = shape[draw(st.integers(0, len(shape) - 1)) :]
        args = x, last, *(draw(st.sampled_from((None, torch.ones(last, dtype=dtype)))) for _ in "wb"), 1e-5
    elif name == "native_batch_norm":
        x = x if len(shape) > 1 else x[None]
        ones = [torch.ones(x.shape[1], dtype=dtype) for _ in range(4)]
        args = x, *ones, draw(st.booleans()), 0.1, 1e-5
    elif name == "cat":
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        others = [[draw(st.integers(0, 3)) if d == dim % len(shape) else n for d, n in enumerate(shape)] for _ in "ab"]
        args = [x, *(_laid_out(draw, sizes, dtype) for sizes in others)], dim
    elif name == "_to_copy":
        kwargs = {"dtype": draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.int64)))}
    elif name == "embedding":
        args = x, torch.zeros(draw(st.sampled_from(([3], [2, 40], []))), dtype=torch.int64)
    return func, args, kwargs


@settings(max_examples=600, deadline=None, derandomize=True)
@given(elementwise())
def test_elementwise_stand_ins_look_like_the_results(call: Any) -> None:
    """Whatever the layouts: as torch's result, or none; an operator in place gives the tensor itself."""
    func, args, kwargs = call
    found = ELEMENTWISE[func](Zeros(), *args, **kwargs)
    if found is not None:
        wanted = func(*args, **kwargs)
        assert look(found) == look(wanted)
        assert (found is args[0]) == (wanted is args[0])


PLAIN: dict[str, Callable[[], Any]] = {
    "gelu": lambda: (aten.gelu.default, (torch.ones(64, 1024),)),
    "relu_": lambda: (aten.relu_.default, (torch.ones(64, 1024).t(),)),
    "add": lambda: (aten.add.Tensor, (torch.ones(1024), torch.ones(2, 64, 1024))),
    "mul_": lambda: (aten.mul_.Tensor, (torch.ones(64, 1024), 2.0)),
    "softmax": lambda: (aten._softmax.default, (torch.ones(64, 1024), -1, False)),
    "layer norm": lambda: (aten.native_layer_norm.default, (torch.ones(2, 64, 1024), [1024], None, None, 1e-5)),
    "batch norm": lambda: (
        aten.native_batch_norm.default,
        (torch.ones(1, 64, 32, 32), *(torch.ones(64) for _ in range(4)), False, 0.1, 1e-5),
    ),
    "cat": lambda: (aten.cat.default, ([torch.ones(64, 1024), torch.ones(3, 1024)],)),
    "mean": lambda: (aten.mean.dim, (torch.ones(1, 64, 32, 32), [2, 3], True)),
    "power": lambda: (aten.pow.Tensor_Scalar, (torch.ones(64, 1024).t(), 2)),
    "embedding": lambda: (aten.embedding.default, (torch.ones(64, 1024), torch.zeros(40, dtype=torch.int64))),
    "clone": lambda: (aten.clone.default, (torch.ones(64, 1024),)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_elementwise_calls_have_stand_ins(name: str) -> None:
    """And so cost nothing."""
    func, args = PLAIN[name]()
    assert ELEMENTWISE[func](Zeros(), *args) is not None


@pytest.mark.parametrize(
    "call",
    [
        (aten.add.Tensor, (torch.ones(64, 1024), torch.ones(3))),
        (aten._softmax.default, (torch.ones(64, 1024), 2, False)),
        (aten.native_layer_norm.default, (torch.ones(64, 1024), [1023], None, None, 1e-5)),
        (aten.cat.default, ([torch.ones(64, 1024), torch.ones(64, 1023)],)),
        (aten.cat.default, ([torch.ones(64, 1024), torch.ones(64, 1024)], 2)),
    ],
)
def test_wrong_arguments_reach_the_operator(call: Any) -> None:
    """Which raises as it does."""
    func, args = call
    assert ELEMENTWISE[func](Zeros(), *args) is None
