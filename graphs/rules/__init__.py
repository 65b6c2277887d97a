"""The channel rules of ATen operators. One screen shows every operator that the analysis knows.

Operators that torch tags as pointwise need no entry; what is not here freezes its channels and is reported.
"""

from __future__ import annotations

import torch

from chase_fx.graphs.rules import (
    contraction,
    factory,
    lookup,
    matrices,
    movement,
    normaliser,
    order,
    pointwise,
    recurrent,
    regions,
    reshape,
    spatial,
)
from chase_fx.graphs.rules.base import Facts, LabelledOp, Labels, Refusal, Rule, Rules, Tie

__all__ = ["DEFAULT_RULES", "Facts", "LabelledOp", "Labels", "Refusal", "Rule", "Rules", "Tie"]

# rule -> names of the operators in torch.ops.aten, or in full those of a package that need not be there
_TABLE: tuple[tuple[Rule, str], ...] = (
    # pointwise
    (
        pointwise.broadcast,
        "add sub mul div floor_divide pow where lerp addcmul addcdiv maximum minimum copy fill _prelu_kernel prelu",
    ),
    (
        pointwise.broadcast,
        "rrelu_with_noise clamp bernoulli copysign atan2 remainder fmod complex polar masked_fill rsub",
    ),
    (pointwise.unary, "clone native_dropout dropout _to_copy lift_fresh lift_fresh_copy lift bernoulli nan_to_num"),
    (pointwise.unary, "feature_dropout alpha_dropout view_as_real_copy fill zero uniform normal exponential"),
    (
        pointwise.unary,
        "hardswish hardsigmoid hardtanh mish relu6 elu celu selu leaky_relu softplus softshrink threshold",
    ),
    (pointwise.unary, "log_sigmoid_forward log_sigmoid hardshrink glu_jvp"),
    (pointwise.gated, "glu"),
    (pointwise.crossed, "linalg_cross"),
    (pointwise.like, "zeros_like ones_like empty_like full_like"),
    (pointwise.cumulative, "cumsum cumprod cummax cummin logcumsumexp"),
    # contraction
    (contraction.convolution, "convolution _convolution convolution_overrideable"),
    (contraction.linear, "linear"),
    (contraction.mm, "mm"),
    (contraction.bmm, "bmm"),
    (contraction.addmm, "addmm"),
    (contraction.baddbmm, "baddbmm"),
    (contraction.mv, "mv"),
    (contraction.addmv, "addmv"),
    (contraction.addr, "addr"),
    (contraction.addbmm, "addbmm"),
    (contraction.dot, "dot vdot"),
    (contraction.attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    (contraction.attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    (contraction.attention, "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable"),
    (contraction.attention, "scaled_dot_product_attention"),
    (contraction.total, "sum nansum count_nonzero"),
    (contraction.norm, "linalg_vector_norm"),
    (contraction.old_norm, "norm"),
    (contraction.weight_norm, "_weight_norm_interface"),
    (contraction.trilinear, "_trilinear"),
    (contraction.grouped_mm, "_grouped_mm"),
    (contraction.distance, "_cdist_forward _euclidean_dist cdist"),
    (contraction.dist, "dist"),
    (contraction.renorm, "renorm"),
    # matrices
    (
        matrices.over_matrices(2),
        "_linalg_det _linalg_slogdet linalg_inv_ex linalg_cholesky_ex linalg_matrix_exp linalg_qr",
    ),
    (
        matrices.over_matrices(2),
        "_linalg_svd _linalg_eigh linalg_eig linalg_eigvals linalg_lu linalg_lu_factor_ex geqrf",
    ),
    (matrices.over_matrices(2), "linalg_ldl_factor_ex cholesky_inverse linalg_pinv"),
    (matrices.over_matrices(2, 1), "linalg_householder_product lu_unpack"),
    (matrices.solve, "linalg_solve_triangular _linalg_solve_ex triangular_solve cholesky_solve linalg_lu_solve"),
    # normaliser
    (normaliser.batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (normaliser.batch_norm, "_native_batch_norm_legit_functional cudnn_batch_norm miopen_batch_norm"),
    (normaliser.batch_norm, "_batch_norm_with_update _batch_norm_no_update batch_norm"),
    (normaliser.layer_norm, "native_layer_norm"),
    (normaliser.rms_norm, "_fused_rms_norm"),
    (normaliser.group_norm, "native_group_norm"),
    (normaliser.average, "mean var std var_mean std_mean"),
    (
        normaliser.loss,
        "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss",
    ),
    (normaliser.label_loss, "nll_loss nll_loss_forward nll_loss2d_forward _ctc_loss multi_margin_loss"),
    (normaliser.softmax, "_softmax _log_softmax softmax log_softmax _safe_softmax"),
    (normaliser.extreme, "max min amax amin aminmax argmax argmin logsumexp prod any all median mode nanmedian"),
    (normaliser.ordered, "sort topk kthvalue argsort"),
    # reshape
    (reshape.reshape, "view _unsafe_view reshape _reshape_alias view_copy flatten unflatten _reshape_copy"),
    (reshape.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    (reshape.pixel_shuffle, "pixel_shuffle"),
    (reshape.pixel_unshuffle, "pixel_unshuffle"),
    (reshape.as_real, "view_as_real"),
    (reshape.as_complex, "view_as_complex"),
    # movement
    (movement.identity, "detach alias contiguous detach_copy alias_copy conj _conj resolve_conj resolve_neg real"),
    (movement.permute, "permute"),
    (movement.transpose, "transpose swapaxes"),
    (movement.swap_last, "t numpy_T"),
    (movement.squeeze, "squeeze"),
    (movement.unsqueeze, "unsqueeze"),
    (movement.expand, "expand expand_copy"),
    (movement.concat, "cat"),
    (movement.block_diagonal, "block_diag"),
    (movement.stack, "stack"),
    (movement.slice_, "slice"),
    (movement.narrow, "narrow_copy"),
    (movement.select, "select"),
    (movement.unbind, "unbind"),
    (movement.split, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    (movement.pad, "constant_pad_nd"),
    (movement.repeat, "repeat"),
    (movement.repeat_interleave, "repeat_interleave"),
    (movement.diagonal, "diagonal"),
    (movement.diagonal_embedding, "diag_embed"),
    (movement.triangle, "tril triu"),
    (movement.fold, "unfold_backward"),
    (movement.unfold, "unfold"),
    (movement.restride, "as_strided"),
    # order
    (order.flip, "flip"),
    (order.turn, "rot90"),
    (order.roll, "roll"),
    # lookup
    (lookup.embedding, "embedding"),
    (lookup.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    (lookup.index_select, "index_select"),
    (lookup.gather, "gather"),
    (lookup.places, "nonzero nonzero_numpy histc bincount _unique2 unique_dim unique_consecutive"),
    (lookup.places, "searchsorted bucketize masked_select multinomial"),
    (lookup.index, "index _unsafe_index"),
    (lookup.index_put, "index_put _index_put_impl _unsafe_index_put"),
    (lookup.index_add, "index_add index_copy index_reduce"),
    (lookup.index_fill, "index_fill"),
    (lookup.scatter_slice, "slice_scatter select_scatter"),
    (lookup.scatter_diagonal, "diagonal_scatter"),
    (lookup.in_order, "masked_scatter"),
    (lookup.flat, "take put as_strided_scatter"),
    (lookup.members, "isin"),
    (lookup.packed, "_pack_padded_sequence"),
    (lookup.scatter, "scatter scatter_add scatter_reduce"),
    # spatial
    (spatial.pooling(1), "avg_pool1d max_pool1d_with_indices"),
    (spatial.over_last(1), "adaptive_avg_pool1d adaptive_max_pool1d"),
    (spatial.over_last(1), "upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d"),
    (spatial.pooling(2), "avg_pool2d max_pool2d_with_indices"),
    (spatial.over_last(2), "_adaptive_avg_pool2d adaptive_max_pool2d"),
    (spatial.over_last(2), "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"),
    (spatial.over_last(2), "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d"),
    (spatial.pooling(3), "avg_pool3d max_pool3d_with_indices"),
    (spatial.over_last(3), "_adaptive_avg_pool3d adaptive_max_pool3d"),
    (spatial.over_last(2), "fractional_max_pool2d"),
    (spatial.unpool, "max_unpool2d max_unpool3d"),
    (spatial.over_last(3), "upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d"),
    (spatial.grid_sample, "grid_sampler_2d grid_sampler_3d grid_sampler cudnn_grid_sampler"),
    (spatial.affine_grid, "affine_grid_generator"),
    (spatial.im2col, "im2col"),
    (spatial.col2im, "col2im"),
    (spatial.transform, "_fft_r2c _fft_c2c _fft_c2r"),
    # recurrent
    (recurrent.lstm_cell, "_thnn_fused_lstm_cell"),
    (recurrent.gru_cell, "_thnn_fused_gru_cell"),
    # regions
    (regions.suppression, "torchvision::nms"),
    (regions.region_pool, "torchvision::roi_align torchvision::roi_pool"),
    (regions.region_pool_by_place, "torchvision::ps_roi_align torchvision::ps_roi_pool"),
    (regions.deformable_convolution, "torchvision::deform_conv2d"),
    # factory
    (factory.constant, "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided"),
    (factory.sequence, "arange linspace logspace eye"),
    (factory.fixed, "rand randn randint randperm rand_like randn_like new_empty_strided"),
    (factory.fixed, "tril_indices triu_indices hann_window hamming_window bartlett_window blackman_window"),
)


def _build() -> Rules:
    table: dict[object, Rule] = {torch.Tag.pointwise: pointwise.broadcast}
    for rule, names in _TABLE:
        for name in names.split():
            if "::" in name:
                table[name] = rule
                continue
            packet = getattr(torch.ops.aten, name, None)  # some operators exist in some builds of torch only
            if packet is not None:
                table[packet] = rule
    return Rules(table)


DEFAULT_RULES: Rules = _build()
