"""Operators left to PyTorch's kernels: no Transformer spends its time there, and generated code would not be faster."""

from __future__ import annotations

import operator

import torch

from .table import EXTERN

aten = torch.ops.aten

LIBRARY = "a library kernel (cuDNN, CUB) that generated code would not beat"
ON_SIZES = "of a fraction of sizes or a condition on them, or of a size where its code has a number"
RARE = "rare, and no pattern of loads that a tile can have"

EXTERN.update(
    dict.fromkeys(
        [
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
            aten.conv1d.padding, aten.conv2d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
            aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable, aten.topk.default,
            aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.avg_pool1d.default,
            aten.max_pool1d.default, aten.adaptive_avg_pool1d.default, aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
            aten._fft_c2c.default, aten._fft_r2c.default, aten.linalg_vector_norm.default,
        ],
        LIBRARY,
    )
)  # fmt: skip
EXTERN.update(
    dict.fromkeys(
        [
            aten.index_put.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
            aten.index_add.default, aten.cumsum.default, aten.cumprod.default, aten.prod.dim_int, aten.prod.default,
            aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.aminmax.default,
            aten.roll.default, aten.repeat_interleave.self_int, aten.repeat_interleave.Tensor, aten.unfold.default,
            aten.diagonal.default, aten.one_hot.default, aten.bucketize.Tensor,
            aten.searchsorted.Tensor, aten.slice_scatter.default, aten.select_scatter.default, aten.pow.Tensor_Scalar,
            aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.index.Tensor, aten.pad.default, aten.constant_pad_nd.default,
            aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.tile.default,
            aten.group_norm.default, aten.batch_norm.default, aten.meshgrid.default, aten.meshgrid.indexing,
            aten._weight_norm.default,
            aten.movedim.int, aten.real.default, aten.imag.default, aten.view_as_real.default, aten.complex.default,
            aten.view_as_complex.default, aten.outer.default, aten.remainder.Tensor, aten.remainder.Scalar,
            aten.remainder.Scalar_Tensor, aten.fmod.Tensor, aten.fmod.Scalar, aten.floor_divide.default,
            aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode,
        ],
        RARE,
    )
)  # fmt: skip
EXTERN[operator.getitem] = "a part of what the call before it gives"
