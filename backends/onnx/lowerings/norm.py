"""Norms, and residual additions joined with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from ....ir.graph import shape
from .lowering import Lowering


def _add_layer_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = input + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def _skip_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _skip_norm("SkipLayerNormalization", (input, residual, weight, bias), eps)


def _rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return symbolic("RMSNormalization", (input, weight), {"epsilon": eps, "axis": -1},
                    dtype=input.dtype, shape=input.shape, version=23)  # fmt: skip


def _add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = input + residual
    return _rms_norm(total, weight, eps), total


def _skip_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _skip_norm("SkipSimplifiedLayerNormalization", (input, residual, weight), eps)


def _skip_norm(operator: str, inputs: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    rows = inputs[0]
    statistics = (*rows.shape[:-1], 1)
    norm, _, _, total = symbolic_multi_out(
        f"com.microsoft::{operator}",
        inputs,
        {"epsilon": eps},
        dtypes=(rows.dtype, torch.float32, torch.float32, rows.dtype),
        shapes=(rows.shape, statistics, statistics, rows.shape),
        version=1,
    )
    return norm, total


def _refuses_skip(node: fx.Node) -> str | None:
    return None if len(shape(node.args[0])) == 3 else "the kernel takes [batch, length, size] only"


ADD_LAYER_NORM = (
    Lowering("Add+LayerNormalization", _add_layer_norm),
    Lowering("SkipLayerNormalization", _skip_layer_norm, _refuses_skip),
)
RMS_NORM = (Lowering("RMSNormalization", _rms_norm),)
ADD_RMS_NORM = (
    Lowering("Add+RMSNormalization", _add_rms_norm),
    Lowering("SkipSimplifiedLayerNormalization", _skip_rms_norm, _refuses_skip),
)
