"""Attention: softmax(query key^T scale + bias) value, with the meaning of its mask in its arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .shapes import broadcasts, divides, equal, fixed
from .table import operator

EMPTY = ("zeros", "nan", "mean")  # what a row without any allowed key gives
ABSORBING = -1e30  # in fp32 nothing is left of a score that such a number, or a lower one, is added to
ABSORBED = 1e22  # the largest number of which such a number leaves nothing


def attention_result(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    left: Any = None,
    right: Any = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty: str = "zeros",
) -> Tensor | None:
    """The shape rule of `attention`; None where its arguments are not seen to fit: the reference tells."""
    if not (query.dim() == key.dim() == value.dim() == 4) or not (query.dtype == key.dtype == value.dtype):
        return None
    batch, heads, rows, size = query.shape
    groups, columns = key.shape[1], key.shape[2]
    computed = wide(query.dtype)
    fit = (
        computed.is_floating_point
        and empty in EMPTY
        and (scale is not None or fixed(size))  # else the reference fixes the size that it takes the root of
        and divides(groups, heads)
        and equal(key.shape, (batch, groups, columns, size))
        and equal(value.shape[:3], (batch, groups, columns))
        and (bias is None or broadcasts(bias.shape, (batch, heads, rows, columns)))
        and (bias is None or bias.dtype == torch.bool or torch.promote_types(bias.dtype, computed) == computed)
        and (key_mask is None or (key_mask.dtype == torch.bool and equal(key_mask.shape, (batch, columns))))
        and (sinks is None or equal(sinks.shape, (heads,)))
    )
    return like_attention(query, value) if fit else None


@operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? key_mask=None, "
    "SymInt? left=None, SymInt? right=None, float? scale=None, float softcap=0.0, Tensor? sinks=None, "
    "str empty='zeros') -> Tensor",
    meaning="softmax(query key^T * scale + bias, over allowed keys) value, heads second",
    shape=attention_result,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty: str = "zeros",
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017) with grouped key/value heads (Ainslie et al., 2023).

    Shapes: query [B, H, N, D]; key [B, G, M, D]; value [B, G, M, E], where G divides H (head h reads group
    h // (H / G)); result [B, H, N, E]. `bias` broadcasts to [B, H, N, M]: boolean (True: may attend) or added to the
    scaled scores. `key_mask` [B, M], boolean, True: may be attended.

    The band: query i sees the keys i - left <= j <= i + right, each side unlimited where it is None. right=0 is causal
    attention (aligned at the top left, as torch's `is_causal`), right=M - N the same aligned at the bottom right,
    left=W - 1 and right=0 a causal window of W keys (Mistral).

    `scale` defaults to D ** -0.5. `softcap` c > 0 turns the scaled scores s into c * tanh(s / c) before any mask
    (Gemma 2). `sinks` [H] adds one more score to each row of a head, whose probability is dropped (gpt-oss).

    A row with no key allowed (or bias -inf throughout) gives zeros, as torch's own operator does; with `empty` "nan"
    NaN, as a softmax over -inf does; "mean" the mean of all values, as a softmax over equal, finite numbers does.
    Half precision is computed in fp32 and rounded once at the end.
    """
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {', '.join(EMPTY)}, found {empty!r}")
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = masked_scores(scores, bias, key_mask, left, right, softcap)
    if sinks is not None:
        extra = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    elif empty == "mean":
        weights = torch.softmax(scores.clamp(min=torch.finfo(scores.dtype).min), -1)
    else:
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores, -1)
        weights = weights.masked_fill(nothing, 0.0) if empty == "zeros" else weights
    return (weights @ value).to(dtype)


def masked_scores(
    scores: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    left: int | None,
    right: int | None,
    softcap: float,
) -> Tensor:
    """Scaled scores [B, H, N, M] with the soft cap, the bias and the masks of `attention`: -inf where no key is."""
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    if left is not None or right is not None:
        scores = scores.masked_fill(~band(scores.shape[2], scores.shape[3], left, right, scores.device), -math.inf)
    return scores


def wide(dtype: torch.dtype) -> torch.dtype:
    """What half precision is computed in: fp32; other dtypes as they are."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype. Unlike `Tensor.to` it is an operator that ONNX exporters know without decomposing it."""
    if value.dtype == dtype:
        return value
    result: Tensor = torch.ops.aten._to_copy.default(value, dtype=dtype)
    return result


def like_attention(query: Tensor, value: Tensor) -> Tensor:
    """An empty tensor like the result of attention, [B, H, N, E]: the shape rule of those that replace it."""
    return query.new_empty((*query.shape[:3], value.shape[3]))


def band(rows: int, columns: int, left: int | None, right: int | None, device: torch.device | None = None) -> Tensor:
    """Which keys the band lets each query see: boolean [rows, columns]."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if left is not None:
        allowed = allowed & (column >= row - left)
    if right is not None:
        allowed = allowed & (column <= row + right)
    return allowed
