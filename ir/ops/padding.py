"""Tokens without padding: those of all samples in one row, one after another.

A packed tensor [1, T, ...] holds the T tokens of a batch [B, N, ...] that a key mask [B, N] (True: a token) leaves, a
sample after the other. What computes each token by itself computes packed ones as it is (Effective Transformer:
ByteDance, 2020; ByteTransformer: Zhai et al., 2023). How many they are is known when the mask is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import attention, like_attention
from .shapes import equal
from .table import operator


def _some(key_mask: Any) -> Tensor | None:
    """Of a new size; under dynamo `nonzero` itself is refused one."""
    env = key_mask.fake_mode.shape_env
    if env is None:
        return None
    with env.ignore_fresh_unbacked_symbols():
        count = env.create_unbacked_symint()
    torch._check(count >= 0)
    found: Tensor = key_mask.new_empty((count,), dtype=torch.int64)
    return found


@operator(
    "real_tokens(Tensor key_mask) -> Tensor",
    meaning="the places in the flattened key mask at which there is a token",
    shape=_some,
)
def real_tokens(key_mask: Tensor) -> Tensor:
    """Places of tokens that are not padding, in order.

    Shapes: key_mask [B, N], boolean; result [T], numbers from 0 to B * N - 1, int64. T depends on the mask.
    """
    return key_mask.reshape(-1).nonzero().squeeze(1)


@operator(
    "pack_tokens(Tensor input, Tensor tokens) -> Tensor",
    meaning="the tokens at given places of a batch, as one row",
)
def pack_tokens(input: Tensor, tokens: Tensor) -> Tensor:
    """Leave padding out.

    Shapes: input [B, N, ...]; tokens [T], what `real_tokens` gives; result [1, T, ...].
    """
    return input.flatten(0, 1).index_select(0, tokens)[None]


@operator(
    "unpack_tokens(Tensor input, Tensor key_mask) -> Tensor",
    meaning="a row of tokens back at their places in the batch, zeros where there is padding",
    shape=lambda input, key_mask: input.new_empty((*key_mask.shape, *input.shape[2:])),
)
def unpack_tokens(input: Tensor, key_mask: Tensor) -> Tensor:
    """Undo `pack_tokens`; padding is zero.

    Shapes: input [1, T, ...]; key_mask [B, N], which says where the T tokens go; result [B, N, ...].
    """
    rows = torch.cat((input.new_zeros((1, *input.shape[2:])), input[0]))
    real = key_mask.reshape(-1).to(torch.int64)
    found: Tensor = rows.index_select(0, real.cumsum(0) * real).unflatten(0, key_mask.shape)
    return found


def _packed(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, *rest: Any, **named: Any) -> Tensor | None:
    row = (query.shape[0], query.shape[2])
    fits = equal(row, (1, key.shape[2])) and key_mask.dtype == torch.bool and key_mask.dim() == 2
    return like_attention(query, value) if fits else None


@operator(
    "packed_attention(Tensor query, Tensor key, Tensor value, Tensor key_mask, bool causal=False, float? scale=None, "
    "float softcap=0.0) -> Tensor",
    meaning="attention among the tokens of each sample, all samples' tokens in one row",
    shape=_packed,
)
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`attention` of packed tokens: each sees those of its own sample, or if `causal` those up to itself.

    Shapes: query [1, H, T, D]; key [1, G, T, D]; value [1, G, T, E]; key_mask [B, N], which says where in the batch the
    T tokens are; result [1, H, T, E]. `scale` and `softcap` are those of `attention`.
    """
    batched = [unpack_tokens(item.transpose(1, 2), key_mask).transpose(1, 2) for item in (query, key, value)]
    right = 0 if causal else None
    found = attention(*batched, None, key_mask, None, right, scale, softcap)
    # The first T places that hold a token: `real_tokens`, but of a size that is known.
    tokens = (~key_mask.reshape(-1)).to(torch.uint8).argsort(stable=True)[: query.shape[2]]
    packed: Tensor = pack_tokens(found.transpose(1, 2), tokens).transpose(1, 2)
    return packed
