"""Attention whose two matmuls are of integers of 8 bits, with sums of 32 bits and a softmax of floats between them.

Queries and keys have a scale for each token (SageAttention: Zhang et al., 2025), or a fixed one. Values have a scale
for each token too, which goes to the probabilities before these are rounded: what a token gives depends on nothing that
it does not attend to, so that causal attention stays causal and padding stays without influence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .attention import EMPTY, like_attention, masked_scores
from .quantize import dynamic_quantize, quantize
from .table import operator

STEPS = 255  # of probabilities, from 0


@operator(
    "int8_attention(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? key_mask=None, "
    "SymInt? left=None, SymInt? right=None, float? scale=None, float softcap=0.0, str empty='zeros', "
    "Tensor? ranges=None) -> Tensor",
    meaning="attention that rounds query, key, value and probabilities to integers of 8 bits and multiplies these",
    shape=lambda query, key, value, *others, **options: like_attention(query, value),
)
def int8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    empty: str = "zeros",
    ranges: Tensor | None = None,
) -> Tensor:
    """`attention` without sinks, in integers; rounding passes gradients straight through.

    With s the scores of integers times both scales, and t the scale of each value, weights exp(s - max s) t are rounded
    in 255 steps of the largest of their row; the result is their product with the integers of the values, times that
    step, over the sum of exp(s - max s). In fp32, where sums of integers are exact up to 2^24.

    Shapes: as `attention`; ranges fp32 [3], the scales of query, key and value; None: of each of their rows,
    the largest magnitude over 127.
    """
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {', '.join(EMPTY)}, found {empty!r}")
    dtype = query.dtype
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    (q, q_scale), (k, k_scale), (v, v_scale) = (
        _integers(item.float(), None if ranges is None else ranges[place])
        for place, item in enumerate((query, key, value))
    )
    scores = (q @ k.transpose(-1, -2)) * (q_scale * _columns(k_scale))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = masked_scores(scores, bias, key_mask, left, right, softcap)
    lowest = torch.finfo(torch.float32).min
    if empty == "mean":
        scores = scores.clamp(min=lowest)
    raw = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=lowest))
    total = raw.sum(-1, keepdim=True)
    weighted = raw * _columns(v_scale)
    step = weighted.detach().amax(-1, keepdim=True) * (1 / STEPS)
    rounded = quantize(weighted, step.clamp(min=torch.finfo(torch.float32).tiny), bits=9)
    result = (
        (rounded @ v) * step / (total if empty == "nan" else total.clamp(min=1.0))
    )  # else 1 at least: of the largest
    found: Tensor = result.to(dtype)
    return found


def _integers(item: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers and their scale, [..., 1] or []."""
    if scale is not None:
        return quantize(item, scale), scale
    integers, found, _ = dynamic_quantize(item, "token")
    return integers, found


def _columns(scale: Tensor) -> Any:
    """The scale of each row of a tensor as that of each column of its transpose."""
    return scale.transpose(-1, -2) if scale.dim() else scale
