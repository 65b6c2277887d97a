"""One small net for each operator rule that :mod:`tests.nets` has none for, on images of 3 x 4 x 4.

Each is ``out(step(m, y, z)) + also(y) + tail(z)`` with two branches ``y = b(a(x))`` and ``z = c(x)`` of (N, 8, 4, 4), a
matrix ``m.w`` of 8 x 8, and a vector ``m.v`` of 8. What the step gives has 8 channels, or as many as the table says.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.nets import Net, conv
from tests.oracle import randomise

__all__ = ["RULE_NETS", "build"]

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]
PICKED = torch.tensor([6, 0, 3])
BOXES = torch.tensor([[0, 0.0, 0.0, 3.0, 3.0], [1, 1.0, 0.5, 3.0, 2.0], [2, 0.5, 1.0, 2.0, 3.5]], dtype=torch.float64)


def _rows(y: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H*W, C)."""
    return y.flatten(2).mT


def _image(rows: Tensor) -> Tensor:
    """(N, 16, C) as (N, C, 4, 4)."""
    return rows.mT.unflatten(2, (4, 4))


def _widened(y: Tensor, z: Tensor) -> Tensor:
    """The rows of ``y`` with one more channel, the mean of those of ``z``."""
    return torch.cat([_rows(y), _rows(z).mean(-1, keepdim=True)], -1)


def _channel(v: Tensor) -> Tensor:
    return v[..., None, None]


def _written(y: Tensor, z: Tensor) -> Tensor:
    y = y.clone()
    y[:, :, PICKED % 4] = z[:, :, :3]
    return y


def _put(y: Tensor, index: Tensor, values: Tensor) -> Tensor:
    y = y.clone()
    y[:, index] = values
    return y


def _packed(y: Tensor) -> Tensor:
    lengths = torch.tensor([16, 9, 4])
    return _image(pad_packed_sequence(pack_padded_sequence(_rows(y), lengths, True), True)[0])


def _suppressed(y: Tensor) -> Tensor:
    boxes = torch.cat([y[0, :, 0, :2], y[0, :, 0, :2] + 1], 1)
    kept = torchvision.ops.nms(boxes, y[0, :, 1, 1], 0.5)
    return kept.double().sum()


def _grouped(m: nn.Module, y: Tensor) -> Tensor:
    rows = y[:, :, 0, 0].float()
    offsets = torch.tensor([1, 1, rows.shape[0]], dtype=torch.int32)
    return _channel(F.grouped_mm(rows, m.experts.float(), offs=offsets).double())


def _one_head(y: Tensor, z: Tensor) -> Tensor:
    y, z = y[:, None].contiguous(), z[:, None].contiguous()
    return F.scaled_dot_product_attention(y, z, z)[:, 0]


def _scattered(y: Tensor, z: Tensor) -> Tensor:
    return y.scatter_add(2, (PICKED % 4).view(1, 1, 3, 1).expand_as(z), z)


def _square(y: Tensor) -> Tensor:
    return torch.eye(y.shape[1]).double() * 3 + y.flatten(2) @ y.flatten(2).mT


def _gram(y: Tensor) -> Tensor:
    """(N, C, H, W) as (N, C, W, W), symmetric and positive."""
    return torch.eye(4).double() + y.mT @ y


def _pixels(y: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H*W, H*W), symmetric and positive."""
    return torch.eye(16).double() + _rows(y) @ _rows(y).mT


def _lstm_cell(x: Tensor, h: Tensor, c: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates = (x + h + sum(biases)).chunk(4, 1)
    i, f, o = (gates[k].sigmoid() for k in (0, 1, 3))
    c = f * c + i * gates[2].tanh()
    return o * c.tanh(), c, torch.cat([i, f, gates[2].tanh(), o], 1)


def _gru_cell(x: Tensor, h: Tensor, state: Tensor, x_bias: Tensor, h_bias: Tensor) -> tuple[Tensor, Tensor]:
    given, recurrent = (x + x_bias).chunk(3, 1), (h + h_bias).chunk(3, 1)
    r, u = ((given[k] + recurrent[k]).sigmoid() for k in (0, 1))
    n = (given[2] + r * recurrent[2]).tanh()
    return n + u * (state - n), torch.cat([r, u, n, state, recurrent[2]], 1)


def _lstm_cell_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, *saved: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    before, c, gates = (tensor for tensor in saved if isinstance(tensor, Tensor))
    i, f, g, o = gates.chunk(4, 1)
    grad_h, grad_c = (torch.zeros_like(c) if grad is None else grad for grad in (grad_h, grad_c))
    grad_c = grad_c + grad_h * o * (1 - c.tanh() ** 2)
    parts = [grad_c * g * i * (1 - i), grad_c * before * f * (1 - f), grad_c * i * (1 - g * g)]
    grad = torch.cat([*parts, grad_h * c.tanh() * o * (1 - o)], 1)
    return grad, grad_c * f, grad.sum(0)


def _gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    r, u, n, state, recurrent = workspace.chunk(5, 1)
    grad_n, grad_u = grad * (1 - u) * (1 - n * n), grad * (state - n) * u * (1 - u)
    grad_r = grad_n * recurrent * r * (1 - r)
    grad_x, grad_h = torch.cat([grad_r, grad_u, grad_n], 1), torch.cat([grad_r, grad_u, grad_n * r], 1)
    return grad_x, grad_h, grad * u, grad_x.sum(0), grad_h.sum(0)


# The fused steps of recurrent layers have kernels for GPUs only; with these, their rules have nets on a CPU.
CPU_KERNELS = torch.library.Library("aten", "IMPL")
CPU_KERNELS.impl("_thnn_fused_lstm_cell", _lstm_cell, "CPU")
CPU_KERNELS.impl("_thnn_fused_gru_cell", _gru_cell, "CPU")
CPU_KERNELS.impl("_thnn_fused_lstm_cell_backward_impl", _lstm_cell_backward, "CPU")
CPU_KERNELS.impl("_thnn_fused_gru_cell_backward", _gru_cell_backward, "CPU")


def _stepped(m: nn.Module, y: Tensor, z: Tensor, gates: int) -> Tensor:
    """One step from the pixels of ``y``, after those of ``z``."""
    cell = torch.ops.aten._thnn_fused_lstm_cell if gates == 4 else torch.ops.aten._thnn_fused_gru_cell
    y, z = _rows(y).flatten(0, 1), _rows(z).flatten(0, 1)
    x = torch.cat([y, y * y, -y, y / 2][:gates], 1)
    found = cell(x, torch.cat([z / 2, -z, z, z * z][:gates], 1), z, torch.cat([m.v] * gates), torch.cat([m.u] * gates))
    return _image(found[0].unflatten(0, (-1, 16)) + (found[1].unflatten(0, (-1, 16)) if gates == 4 else 0))


def _filled(y: Tensor, z: Tensor) -> Tensor:
    """The rows of ``z``, one after the other, where the mask of pixels of ``y`` is set; whole rows of channels."""
    mask = (_rows(y).detach().sum(-1, keepdim=True) > 0).expand_as(_rows(y))
    return _image(_rows(y).masked_scatter(mask, _rows(z).flatten(0, 1)))


def _folded(y: Tensor) -> Tensor:
    windows = y.unfold(1, 2, 1)
    return torch.ops.aten.unfold_backward(windows, [y.shape[0], 8, 4, 4], 1, 2, 1)


RULE_NETS: dict[str, tuple[Step, int]] = {
    # pointwise
    "like": (lambda m, y, z: y * torch.ones_like(z) * z.var(1, keepdim=True), 8),
    "gated": (lambda m, y, z: F.glu(torch.cat([y[:, 2:6], z[:, :4]], 1), 1), 4),
    "cumulative": (lambda m, y, z: y.cumsum(1) + z, 8),
    "softmax": (lambda m, y, z: y.softmax(1) + z, 8),
    "extreme": (lambda m, y, z: y.amax(1, keepdim=True) + z, 8),
    "dropout": (lambda m, y, z: z + F.dropout(y, 0.5, m.training), 8),
    # recurrent
    "lstm_cell": (lambda m, y, z: _stepped(m, y, z, 4), 8),
    "gru_cell": (lambda m, y, z: _stepped(m, y, z, 3), 8),
    # contraction
    "addmm": (lambda m, y, z: z + _channel(torch.addmm(m.v, y.mean((2, 3)), m.w)), 8),
    "baddbmm": (lambda m, y, z: _image(torch.baddbmm(_rows(z), _rows(y), m.w.expand(y.shape[0], 8, 8))), 8),
    "mv": (lambda m, y, z: z + y.mean((2, 3)).mv(m.v)[:, None, None, None], 8),
    "addmv": (lambda m, y, z: z * _channel(torch.addmv(m.v, m.w, y[0].mean((1, 2)))), 8),
    "addr": (lambda m, y, z: z + _image(_rows(y) @ torch.addr(m.w, m.v, m.u)), 8),
    "addbmm": (lambda m, y, z: z * _channel(torch.addbmm(m.w, y[:, :, 0], y[:, :, 1].mT) @ m.v), 8),
    "dot": (lambda m, y, z: z * torch.dot(m.v, y[0].mean((1, 2))), 8),
    "one_head": (lambda m, y, z: _image(_one_head(_rows(y), _rows(z))), 8),
    "vector_norm": (lambda m, y, z: z * torch.linalg.vector_norm(y, dim=1, keepdim=True), 8),
    "old_norm": (lambda m, y, z: z * torch.ops.aten.norm.ScalarOpt_dim(y, 2, [1], True), 8),
    "weight_norm": (lambda m, y, z: m.normed(y) + z, 8),
    "trilinear": (lambda m, y, z: _channel(m.bilinear(y.mean((2, 3)), z.mean((2, 3)))) + m.fixed(y), 8),
    "grouped_mm": (lambda m, y, z: z + _grouped(m, y), 8),
    "distance": (lambda m, y, z: z * torch.cdist(_rows(y), _rows(z)).mean((1, 2))[:, None, None, None], 8),
    "triangular": (lambda m, y, z: _image(torch.linalg.solve_triangular(_square(y), z.flatten(2), upper=False).mT), 8),
    "counted": (lambda m, y, z: z * y.relu().count_nonzero(1)[:, None], 8),
    "dist": (lambda m, y, z: z * torch.dist(y, z[:1]), 8),
    "renorm": (lambda m, y, z: y.renorm(2, 0, 0.7) + z, 8),
    # matrices
    "det": (lambda m, y, z: z * _channel(torch.linalg.det(_gram(y))), 8),
    "inverse": (lambda m, y, z: _image((torch.linalg.inv(_square(y)) @ z.flatten(2)).mT), 8),
    "householder": (lambda m, y, z: torch.linalg.householder_product(_gram(y), z[..., 0].sigmoid()), 8),
    "householder_over_channels": (
        lambda m, y, z: _image(_rows(z) @ torch.linalg.householder_product(_square(y), z[:, :, 0, 0].exp())), 8,
    ),
    "solved": (lambda m, y, z: torch.linalg.solve(_gram(y), z), 8),
    "solved_over_channels": (lambda m, y, z: _image(torch.linalg.solve(_square(y), z.flatten(2)).mT), 8),
    "solved_columns": (lambda m, y, z: _image(torch.linalg.solve(_pixels(y), _rows(z))), 8),
    "solved_vector": (lambda m, y, z: z + _channel(torch.linalg.solve(_square(y), z[..., 0, 0])), 8),
    "solved_from_the_right": (lambda m, y, z: torch.linalg.solve(_gram(y), z, left=False), 8),
    "solved_by_factors": (lambda m, y, z: torch.cholesky_solve(z, torch.linalg.cholesky(_gram(y))), 8),
    "solved_by_pivots": (lambda m, y, z: torch.linalg.lu_solve(*torch.linalg.lu_factor(_gram(y)), z), 8),
    # normaliser
    "batch_statistics": (lambda m, y, z: F.batch_norm(y, None, None, m.v, m.u, training=True) + z, 8),
    "spread": (lambda m, y, z: z * y.var(1, keepdim=True), 8),
    "loss": (lambda m, y, z: z * F.mse_loss(y, z), 8),
    "label_loss": (lambda m, y, z: z * F.nll_loss(y.mean((2, 3)), torch.arange(y.shape[0]) + 4), 8),
    "group_norm": (lambda m, y, z: F.group_norm(y, 4, m.v, m.u) + z, 8),
    "layer_norm": (lambda m, y, z: _image(F.layer_norm(_rows(y), (8,), m.v, m.u)) + z, 8),
    # reshape
    "native_shuffle": (lambda m, y, z: torch.channel_shuffle(y, 4) + z, 8),
    "pixel_unshuffle": (lambda m, y, z: F.pixel_unshuffle(y, 2).repeat_interleave(2, 2).repeat_interleave(2, 3), 32),
    "as_complex": (lambda m, y, z: torch.view_as_complex(y.unflatten(3, (2, 2))).abs().repeat(1, 1, 1, 2) + z, 8),
    "as_real": (lambda m, y, z: torch.view_as_real(torch.complex(y, z)).flatten(3)[..., 1:5], 8),
    # movement
    "pixel_shuffle": (lambda m, y, z: F.pixel_shuffle(y, 2)[:, :, ::2, ::2], 2),
    "contiguous": (lambda m, y, z: z + y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).detach(), 8),
    "swap_last": (lambda m, y, z: z + _channel(torch.ops.aten.t(m.w) @ m.v), 8),
    "swap_rows": (lambda m, y, z: z + _channel((y[0, :, 0].t().contiguous() @ m.w).sum(0)), 8),
    "squeeze": (lambda m, y, z: z + y.mean((2, 3), keepdim=True).squeeze(3).squeeze(2)[..., None, None], 8),
    "unsqueeze": (lambda m, y, z: z * m.v.unsqueeze(1).unsqueeze(2) + y, 8),
    "expand": (lambda m, y, z: torch.cat([y, z.mean(1, keepdim=True).expand(-1, 8, -1, -1)], 1), 16),
    "expand_as": (lambda m, y, z: torch.cat([z.mean(1, keepdim=True).expand_as(y.cumsum(1)), z], 1), 16),
    "stack": (lambda m, y, z: torch.stack([y, z], 1).prod(1), 8),
    "unbind": (lambda m, y, z: z + y.unbind(1)[3][:, None], 8),
    "block_diagonal": (lambda m, y, z: _image(_widened(y, z) @ torch.block_diag(m.w, m.v)), 16),
    "diagonal": (lambda m, y, z: z + (y[:, :4].diagonal(0, 1, 2).sum((1, 2)))[:, None, None, None], 8),
    "diag_embed": (lambda m, y, z: _image(_rows(z) @ torch.diag_embed(y.mean((2, 3)))), 8),
    "triangle": (lambda m, y, z: _image(_rows(y) @ (m.w.tril() + m.w.triu(1) * 2)) + z, 8),
    "unfold": (lambda m, y, z: z + y.unfold(1, 3, 2).sum((1, 4))[:, None], 8),
    "fold": (lambda m, y, z: z + _folded(y), 8),
    "topk": (lambda m, y, z: y.topk(4, 1).values, 4),
    "flip": (lambda m, y, z: y.flip(1) + z, 8),
    "flip_both": (lambda m, y, z: torch.cat([y, z], 1).flip(1)[:, :12] + y.repeat(1, 2, 1, 1)[:, 4:], 12),
    "turned": (lambda m, y, z: y.rot90(1, (2, 3)) + torch.rot90(z, 2, (1, 2)), 8),
    "turned_into_space": (lambda m, y, z: torch.rot90(y.mean(3), 3, (1, 2)).mT[..., None] + z, 8),
    "narrow_copy": (lambda m, y, z: torch.narrow_copy(y, 1, 2, 5) + z[:, :5], 5),
    "grid_of_vectors": (
        lambda m, y, z: _image(_rows(z) @ sum(torch.meshgrid(y[0, :, 0, 0], z[0, :, 1, 1], indexing="ij"))), 8,
    ),
    "grid_of_vectors_xy": (
        lambda m, y, z: _image(_rows(z) @ sum(torch.meshgrid(y[0, :, 0, 0], z[0, :, 1, 1], indexing="xy"))), 8,
    ),
    "roll": (lambda m, y, z: y.roll(3, 1) + z, 8),
    "sliced": (lambda m, y, z: y[:, 1:6] * z[:, 2:7], 5),
    "chunked": (lambda m, y, z: torch.cat(y.split([2, 6], 1)[::-1], 1), 8),
    "padded": (lambda m, y, z: F.pad(y[:, :5], (0, 0, 0, 0, 2, 1)) + z, 8),
    "strided": (lambda m, y, z: torch.cat([y[:, ::2], z], 1), 12),
    "restride": (lambda m, y, z: z + F.adaptive_avg_pool2d(y.contiguous(memory_format=torch.channels_last), 1), 8),
    # lookup
    "bag": (lambda m, y, z: z + _channel(F.embedding_bag(PICKED.view(3, 1)[: y.shape[0]], m.w @ m.w, mode="sum")), 8),
    "gathered": (lambda m, y, z: z + y.gather(1, PICKED.view(1, 3, 1, 1).expand_as(y[:, :3])).sum(1, keepdim=True), 8),
    "places": (lambda m, y, z: z + (y > y.mean()).nonzero().sum(0)[1].double(), 8),
    "index": (lambda m, y, z: z + y[:, PICKED].sum(1, keepdim=True), 8),
    "permuted": (lambda m, y, z: y[:, m.order] + z, 8),
    "permuted_by_number": (lambda m, y, z: y[:, [1, 0, 2, 4, 3, -1, 5, 6]] * z, 8),
    "picked_by_mask": (lambda m, y, z: torch.cat([y, z], 1)[:, m.order.repeat(2) > 2], 10),
    "grouped_permuted": (lambda m, y, z: m.grouped(y[:, m.order]) + z, 8),
    "permuted_and_kept": (lambda m, y, z: y[:, m.order.flip(0).argsort()] + y + z, 8),
    "index_by_weights": (lambda m, y, z: z + y[:, m.v.argsort()[:3]].sum(1, keepdim=True), 8),
    "select_by_weights": (lambda m, y, z: torch.cat([y.index_select(1, m.v.argsort()), z], 1), 16),
    "index_put": (lambda m, y, z: _written(y, z), 8),
    "index_add": (lambda m, y, z: y.index_add(1, PICKED, z[:, :3]), 8),
    "index_add_rows": (lambda m, y, z: y.index_add(2, PICKED % 4, z[:, :, :3]), 8),
    "diagonal_scatter": (lambda m, y, z: torch.diagonal_scatter(y, z[..., 0], 0, 2, 3), 8),
    "diagonal_scatter_over_channels": (lambda m, y, z: torch.diagonal_scatter(y, z[:, :4, 0].mT, 0, 1, 2), 8),
    "in_order": (lambda m, y, z: y.masked_scatter(y > 0, z), 8),
    "in_order_by_rows": (lambda m, y, z: _filled(y, z), 8),
    "by_number": (lambda m, y, z: z * y.take(PICKED).sum(), 8),
    "among": (lambda m, y, z: z + torch.isin((y * 4).round(), (z[0, :, 0, 0] * 4).round()).double(), 8),
    "crossed": (lambda m, y, z: F.pad(torch.linalg.cross(y[..., :3], z[:1, ..., 1:], dim=3), (0, 1)), 8),
    "crossed_over_channels": (lambda m, y, z: torch.linalg.cross(y[:, 2:5], z[:, :3], dim=1), 3),
    "index_put_by_weights": (lambda m, y, z: _put(y, m.v.argsort()[:3], z[:, :3]), 8),
    "index_add_by_weights": (lambda m, y, z: y.index_add(1, m.v.argsort()[:3], z[:, :3]), 8),
    "index_fill_by_weights": (lambda m, y, z: y.index_fill(1, m.v.argsort()[:3], 3.0) + z, 8),
    "index_put_places": (lambda m, y, z: _put(y, PICKED, z[:, :3]), 8),
    "index_fill": (lambda m, y, z: y.index_fill(1, PICKED, 3.0) + z, 8),
    "slice_scatter": (lambda m, y, z: torch.slice_scatter(y, z[:, :3], 1, 2, 5), 8),
    "packed": (lambda m, y, z: _packed(y) * z, 8),
    "scatter": (lambda m, y, z: y.scatter_add(1, PICKED.view(1, 3, 1, 1).expand_as(z[:, :3]), z[:, :3]), 8),
    "scatter_rows": (lambda m, y, z: _scattered(y, z[:, :, :3]), 8),
    "index_select": (lambda m, y, z: y.index_select(1, PICKED).repeat(1, 2, 1, 1), 6),
    "looked_up": (lambda m, y, z: z + F.embedding(PICKED, m.w @ m.w).sum(0)[:, None, None], 8),
    # spatial
    "reflected": (lambda m, y, z: F.pad(_rows(y), (1, 0), "reflect")[..., :8].mT.unflatten(2, (4, 4)) + z, 8),
    "interpolated": (lambda m, y, z: F.interpolate(y.flatten(2), 32)[..., ::2].reshape(y.shape) + z, 8),
    "pool_1d": (lambda m, y, z: F.avg_pool1d(y.flatten(2), 3, 1, 1).view_as(y) + z, 8),
    "pool_1d_over_channels": (lambda m, y, z: _image(F.avg_pool1d(_rows(y), 3, 1, 1)) + z, 8),
    "pool_2d": (lambda m, y, z: F.max_pool2d(y, 3, 1, 1) + z, 8),
    "pool_2d_over_channels": (lambda m, y, z: F.avg_pool2d(y.flatten(2), 3, 1, 1).view(*z.shape) + z, 8),
    "interpolated_2d": (lambda m, y, z: F.interpolate(y, scale_factor=2, mode="bilinear")[..., ::2, ::2] + z, 8),
    "interpolated_2d_over_channels": (
        lambda m, y, z: F.interpolate(y.flatten(2)[:, None], (16, 16), mode="bilinear")[:, 0, ::2].view(z.shape) + z, 8,
    ),
    "interpolated_3d": (lambda m, y, z: F.interpolate(y[:, :, None], (1, 8, 8)).squeeze(2)[..., ::2, ::2] + z, 8),
    "interpolated_3d_over_channels": (
        lambda m, y, z: F.interpolate(y[:, None], (8, 4, 4), mode="trilinear").squeeze(1) + z, 8,
    ),
    "unpooled": (
        lambda m, y, z: F.max_unpool2d(F.avg_pool2d(y, 2), F.max_pool2d(z, 2, return_indices=True)[1], 2), 8,
    ),
    "pool_3d": (lambda m, y, z: F.avg_pool3d(y[:, :, None], (1, 3, 3), 1, (0, 1, 1)).squeeze(2) + z, 8),
    "pool_3d_over_channels": (lambda m, y, z: F.avg_pool3d(y[:, None], 3, 1, 1).squeeze(1) + z, 8),
    "grid": (lambda m, y, z: F.grid_sample(y, y.new_ones(y.shape[0], 4, 4, 2) * 0.2, align_corners=False) + z, 8),
    "affine_grid": (
        lambda m, y, z: F.grid_sample(
            y, F.affine_grid(y.mean((2, 3))[:, :6].view(-1, 2, 3), y.shape, False), align_corners=False
        ) + z, 8,
    ),
    "im2col": (lambda m, y, z: F.unfold(y, 3, padding=1).view(y.shape[0], -1, 4, 4), 72),
    "col2im": (lambda m, y, z: F.fold(torch.cat([y, z], 1).flatten(2)[..., :9], (4, 4), 2), 4),
    "fourier": (lambda m, y, z: torch.fft.fft2(y).real + z, 8),
    "fourier_over_channels": (lambda m, y, z: torch.fft.fft(y, dim=1).real + z, 8),
    # regions
    "suppressed": (lambda m, y, z: z * _suppressed(y), 8),
    "regions": (lambda m, y, z: torchvision.ops.roi_align(y, BOXES[: y.shape[0]], (4, 4)) + z, 8),
    "regions_by_place": (
        lambda m, y, z: torchvision.ops.ps_roi_align(y, BOXES[: y.shape[0]], (2, 2)).repeat(1, 4, 2, 2) + z, 8,
    ),
    "deformable": (
        lambda m, y, z: torchvision.ops.deform_conv2d(y, z.new_zeros(y.shape[0], 2, 4, 4), m.kernel, m.v) + z, 8,
    ),
    # factory
    "constant": (lambda m, y, z: y + y.new_full((8, 1, 1), 2.0) * z, 8),
    "sequence": (lambda m, y, z: y + torch.arange(8).view(8, 1, 1) * z, 8),
    "eye": (lambda m, y, z: _image(_rows(z) @ torch.eye(8).double()) + y, 8),
    "drawn": (lambda m, y, z: y + torch.hann_window(8).view(8, 1, 1) * z, 8),
}  # fmt: skip


def _run(m: nn.Module, step: Step, y: Tensor, z: Tensor) -> Tensor:
    # Channels that no layer reads would stay whatever the rule says.
    return m.out(step(m, y, z)) + m.also(y) + m.tail(z)


class _RuleNet(Net):
    def __init__(self, step: Step, width: int) -> None:
        super().__init__(
            lambda m, x: _run(m, step, m.b(m.a(x)), m.c(x)),
            a=conv(3, 8),
            b=conv(8, 8),
            c=conv(3, 8),
            out=conv(width, 2),
            also=conv(8, 2),
            tail=conv(8, 2),
        )
        self.w = nn.Parameter(torch.randn(8, 8))
        self.v, self.u = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("order", torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]))
        self.grouped = conv(8, 8, groups=2)
        self.normed = parametrizations.weight_norm(conv(8, 8))
        self.bilinear, self.fixed = nn.Bilinear(8, 8, 8), conv(8, 8)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))


def build(name: str, batch: int = 3) -> tuple[nn.Module, tuple[Tensor]]:
    """A randomised net and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = (torch.randn(batch, 3, 4, 4, dtype=torch.float64),)
        return randomise(_RuleNet(*RULE_NETS[name]), x), x
