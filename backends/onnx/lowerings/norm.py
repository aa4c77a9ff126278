"""Norms, and residual additions joined with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from ....ir.graph import arguments, dtype, shape
from .lowering import Lowering, plain_sum


def _add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = plain_sum(input, residual)
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def _skip_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    given = (input, residual, weight) if bias is None else (input, residual, weight, bias)
    return _skip_norm("SkipLayerNormalization", given, eps)


def _rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        weight = torch.ones(input.shape[-1], dtype=input.dtype)
    if weight.dtype != input.dtype:  # scaled in fp32, then rounded
        return _rms_norm(input.to(weight.dtype), weight, eps).to(input.dtype)
    return symbolic("RMSNormalization", (input, weight), {"epsilon": eps, "axis": -1},
                    dtype=input.dtype, shape=input.shape, version=23)  # fmt: skip


def _add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
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
    weight = arguments(node)["weight"]
    if len(shape(node.args[0])) != 3:
        return "the kernel takes [batch, length, size] only"
    if weight is None:
        return "the kernel needs a weight"
    return None if dtype(weight) == dtype(node.args[0]) else "the weight has another dtype than the input"


ADD_LAYER_NORM = (
    Lowering("Sum+LayerNormalization", _add_layer_norm),
    Lowering("SkipLayerNormalization", _skip_layer_norm, _refuses_skip, standard=False),
)
RMS_NORM = (Lowering("RMSNormalization", _rms_norm, standard=False),)
ADD_RMS_NORM = (
    Lowering("Add+RMSNormalization", _add_rms_norm, standard=False),
    Lowering("SkipSimplifiedLayerNormalization", _skip_rms_norm, _refuses_skip, standard=False),
)
