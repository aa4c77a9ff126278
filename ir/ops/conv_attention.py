"""Token mixing by convolution: the weight of a key depends on its distance from the query, over K places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import operator


def _shape(value: Tensor, kernel: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    return value.new_empty((value.shape[0], kernel.shape[-3 if kernel.dim() == 4 else 0], *value.shape[2:]))


@operator(
    "conv_attention(Tensor value, Tensor kernel, Tensor? key_mask=None, bool causal=False) -> Tensor",
    meaning="the mean of the K values around each position, or up to it, weighted by taps fixed or given at each",
    shape=_shape,
)
def conv_attention(value: Tensor, kernel: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Lightweight and dynamic convolution (Wu et al., 2019), the convolution heads of ConvBERT (Jiang et al., 2020).

    Shapes: value [B, G, N, E], where G divides H (head h reads group h // (H / G)); kernel [H, K], the taps of each
    head, or [B, H, N, K], those of each head at each position; all taps are nonnegative; key_mask [B, N], boolean,
    True: may be read; result [B, H, N, E].

    Position i reads position i + t - K // 2 with tap t, or i + t - (K - 1) where `causal`. Places outside the sequence
    or masked contribute nothing, and the result is divided by the sum of the taps that are left: it is an attention
    whose weights add up to 1. Where that sum is 0 the result is 0. Half precision is computed in fp32 and rounded
    once at the end.

    The kernel of Wu et al. is softmax(x W^T) over K, of ConvBERT softmax((query * conv(key)) W^T): ordinary operators.
    """
    dtype = value.dtype
    if dtype in (torch.float16, torch.bfloat16):
        value, kernel = value.float(), kernel.float()
    taps = kernel if kernel.dim() == 4 else kernel[None, :, None]
    heads, width = taps.shape[1], taps.shape[3]
    batch, groups, length, _ = value.shape
    real = value.new_ones((batch, length)) if key_mask is None else key_mask.to(value.dtype)
    if key_mask is not None:
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
    before = width - 1 if causal else width // 2
    ends = (before, width - 1 - before)
    value = F.pad(value, (0, 0, *ends)).repeat_interleave(heads // groups, 1)
    real = F.pad(real, ends)[:, None, :, None]
    result = torch.zeros((), dtype=value.dtype, device=value.device)
    total = torch.zeros_like(result)
    for tap in range(width):
        weight = taps[..., tap : tap + 1]
        result = result + weight * value[:, :, tap : tap + length]
        total = total + weight * real[:, :, tap : tap + length]
    return torch.where(total == 0, 0.0, result / torch.where(total == 0, 1.0, total)).to(dtype)
