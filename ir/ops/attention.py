"""Attention: softmax(query key^T scale + bias) value, with the meaning of its mask in its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .table import operator


@operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? key_mask=None, bool causal=False, "
    "float? scale=None) -> Tensor",
    meaning="softmax(query key^T * scale + bias, over allowed keys) value, heads second",
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) with grouped key/value heads (Ainslie et al., 2023).

    Shapes: query [B, H, N, D]; key [B, G, M, D]; value [B, G, M, E], where G divides H (head h reads group
    h // (H / G)); result [B, H, N, E]. `bias` broadcasts to [B, H, N, M]: boolean (True: may attend) or added to the
    scaled scores. `key_mask` [B, M], boolean, True: may be attended. `causal`: query i sees keys j <= i (aligned at
    the top left, as torch's `is_causal`). `scale` defaults to D ** -0.5.

    A row with no key allowed (all masked, or bias -inf throughout) gives zeros, as torch's own operator does. Half
    precision is computed in fp32 and rounded once at the end.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    if causal:
        row = torch.arange(query.shape[2], device=query.device)[:, None]
        column = torch.arange(key.shape[2], device=query.device)[None, :]
        scores = scores.masked_fill(column > row, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    return (weights @ value).to(dtype)
