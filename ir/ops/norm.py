"""Normalisation: RMSNorm, and residual additions fused with the norm that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import operator


def _rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None and weight.dtype != input.dtype:
        return (weight * wide).to(input.dtype)
    narrow = wide.to(input.dtype)
    return narrow if weight is None else weight * narrow


@operator(
    "rms_norm(Tensor input, Tensor? weight, float eps) -> Tensor",
    meaning="input / sqrt(mean(input^2) + eps) * weight, over the last axis",
)
def rms_norm(input: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich, 2019) over the last axis.

    Shapes: input [..., D], weight [D]; result [..., D] of the input's dtype. Half precision is normalised in fp32; a
    weight in half precision scales the rounded result (Llama), one in fp32 the result before it is rounded (Gemma).
    """
    return _rms_norm(input, weight, eps)


@operator(
    "add_rms_norm(Tensor input, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    meaning="rms_norm(input + residual), and the sum itself",
)
def add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition followed by RMSNorm: (norm of the sum, the sum).

    Shapes: input and residual [..., D], weight [D]; both results [..., D].
    """
    total = input + residual
    return _rms_norm(total, weight, eps), total


@operator(
    "add_layer_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    meaning="layer_norm(input + residual), and the sum itself",
)
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual addition followed by LayerNorm (Ba et al., 2016): (norm of the sum, the sum).

    Shapes: input and residual [..., D], weight and bias [D]; both results [..., D].
    """
    total = input + residual
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total
