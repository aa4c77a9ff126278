"""Pooling tokens: fewer of them between blocks of a model, and as many again at its end.

The first token (CLS) stays by itself; of the others each `stride` neighbours become one: 1 + ceil((N - 1) / stride).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .attention import cast
from .table import operator


def _pooled(input: Tensor, key_mask: Tensor | None = None, stride: int = 2) -> Tensor:
    return input.new_empty((*input.shape[:-2], pooled_length(input.shape[-2], stride), input.shape[-1]))


def pooled_length(length: int, stride: int) -> int:
    """How many tokens are left."""
    return (length + stride - 2) // stride + 1


@operator(
    "pool_tokens(Tensor input, Tensor? key_mask=None, int stride=2) -> Tensor",
    meaning="the first token, then the mean of each `stride` tokens, padding left out",
    shape=_pooled,
)
def pool_tokens(input: Tensor, key_mask: Tensor | None = None, stride: int = 2) -> Tensor:
    """The pooling of Funnel-Transformer (Dai et al., 2020), with means over the tokens that are no padding.

    Shapes: input [B, N, C] or [B, H, N, C]; key_mask [B, N], True: a token; result with
    P = 1 + ceil((N - 1) / stride) tokens. Those that are all padding give the mean of that.
    """
    groups = _places(input.shape[-2], stride, input.device)
    members = [inside[None] for _, inside in groups]
    if key_mask is not None:
        real = [torch.logical_and(key_mask.index_select(1, places), inside) for places, inside in groups]
        none = ~functools.reduce(torch.logical_or, real)
        members = [
            torch.logical_or(some, torch.logical_and(inside, none)) for some, inside in zip(real, members, strict=True)
        ]
    counted = [cast(item, input.dtype)[..., None] for item in members]  # [B or 1, P, 1]
    if input.dim() == 4:
        counted = [item[:, None] for item in counted]
    parts = [input.index_select(-2, places) * item for (places, _), item in zip(groups, counted, strict=True)]
    return functools.reduce(torch.add, parts) / functools.reduce(torch.add, counted)


@operator(
    "pool_mask(Tensor key_mask, int stride=2) -> Tensor",
    meaning="which of the pooled tokens hold a token",
    shape=lambda key_mask, stride=2: key_mask.new_empty((key_mask.shape[0], pooled_length(key_mask.shape[1], stride))),
)
def pool_mask(key_mask: Tensor, stride: int = 2) -> Tensor:
    """key_mask [B, N] as that of the pooled tokens, [B, P]."""
    groups = _places(key_mask.shape[1], stride, key_mask.device)
    return functools.reduce(
        torch.logical_or, [torch.logical_and(key_mask.index_select(1, places), inside) for places, inside in groups]
    )


@operator(
    "unpool_tokens(Tensor input, Tensor like, int stride=2) -> Tensor",
    meaning="each pooled token as often as it holds tokens",
    shape=lambda input, like, stride=2: input.new_empty((*input.shape[:-2], like.shape[-2], input.shape[-1])),
)
def unpool_tokens(input: Tensor, like: Tensor, stride: int = 2) -> Tensor:
    """Up-sampling by repetition, as of Funnel-Transformer's decoder.

    Shapes: input [..., P, C]; like [..., N, any], of which the length is read; result [..., N, C].
    """
    place = torch.arange(like.shape[-2], device=input.device)
    return input.index_select(-2, torch.div(place + stride - 1, stride, rounding_mode="floor"))


def _places(length: int, stride: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Of each pooled token its t-th token and whether there is one, for t = 0, 1, ..., stride - 1."""
    pooled = torch.arange(pooled_length(length, stride), device=device)
    found = []
    for offset in range(stride):
        place = torch.where(pooled > 0, (pooled - 1) * stride + 1 + offset, offset * length)
        found.append((place.clamp(max=length - 1), place < length))
    return found
