"""Attention with a key mask, in a kernel that reads no mask where that is faster.

MultiHeadAttention's kernel keeps the scores of some queries in the cache (FlashAttention, Dao et al., 2022), and takes
no mask; where all scores together are more than the second cache holds, it is faster than one that reads a mask for
every score. A batch of one, or of equal lengths, has a key mask of ones. Else the mask is one more number of every key,
and every query has the number that brings it to the score unscaled. The choice is made at each run, so it is written in
ONNX.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, same_sizes, shape
from ....ir.ops.attention import ABSORBING
from .functions import DOMAIN

_FXPRESS = Opset(DOMAIN, 1)
_MICROSOFT = Opset("com.microsoft", 1)
_SCORES = 2**20  # numbers, of four bytes, that a second cache does not hold


def refuses(node: fx.Node) -> str | None:
    """Why a node is no attention with a key mask that MultiHeadAttention can do without."""
    given = arguments(node)
    query, key = (shape(given[name]) for name in ("query", "key"))
    if given["key_mask"] is None:
        return "there is no key mask"
    if any(given[name] is not None for name in ("bias", "left", "right", "sinks")) or given["softcap"]:
        return "the key mask is not all that changes the scores"
    if not isinstance(query[1], int) or query[1] != key[1]:
        return "MultiHeadAttention takes as many key heads as query heads, of a fixed number"
    if dtype(given["query"]) != torch.float32:
        return "MultiHeadAttention is float32 only on CPU"
    return "rows without any key are NaN" if given["empty"] == "nan" else None


def settles(node: fx.Node) -> bool:
    """Whether the branch is right for a node whatever the example's length: its length varies."""
    return refuses(node) is None and not isinstance(shape(arguments(node)["key"])[2], int)


def key_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, empty: str, num_heads: int, scale: float
) -> Tensor:
    """Query [B, N, H * D], key [B, M, H * D], value [B, M, H * E], key_mask [B, M] -> [B, N, H * E].

    A boolean mask gives zeros in rows without any key; an added one that absorbs every score makes them equal, which
    gives the mean.
    """
    # Everything that is the same in all layers is computed of the mask alone, so that it is computed once.
    keys = key_mask.shape[1]
    length = keys if same_sizes([query.shape[1]], [key.shape[1]]) else query.shape[1]
    large = torch.full((), key_mask.shape[0] * num_heads * length * keys, dtype=torch.int64) >= _SCORES
    added = torch.where(key_mask, torch.zeros((), dtype=query.dtype), ABSORBING)
    unscale = 1 / scale if abs(scale) * torch.finfo(query.dtype).max > -ABSORBING else 0.0  # else it overflows
    unread = large if unscale else torch.zeros((), dtype=torch.bool)
    return symbolic(
        f"{DOMAIN}::{KeyMaskedAttention.name}",
        (
            query,
            key,
            value,
            added if empty == "mean" else key_mask,
            added,
            key_mask.all(),
            large,
            unread if empty == "mean" else torch.logical_and(unread, key_mask.any(1).all()),
        ),
        {"num_heads": num_heads, "scale": scale, "unscale": unscale},
        dtype=query.dtype,
        shape=(*query.shape[:2], value.shape[2]),
        version=1,
    )


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def KeyMaskedAttention(  # type: ignore[no-untyped-def]
    query, key, value, keys, added, every, large, unread, num_heads: int, scale: float, unscale: float
):
    """`keys` is the key mask, boolean or added, and `added` the added one; `every` says that it hides none.

    `large`: the scores are many; `unread`: they are, and the added mask gives what the key mask asks for.
    """
    one = op.Constant(value_ints=[1])
    if every:
        if large:
            result = _MICROSOFT.MultiHeadAttention(query, key, value, num_heads=num_heads, scale=scale)
        else:
            result = op.Attention(query, key, value, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)
    else:
        if unread:
            number = op.Reshape(op.Constant(value_int=num_heads), one)
            heads = op.Concat(op.Constant(value_ints=[0, 0]), number, op.Constant(value_ints=[-1]), axis=0)
            queries, keys_of = op.Reshape(query, heads), op.Reshape(key, heads)
            factor = op.Expand(op.Constant(value_float=unscale), op.Concat(op.Shape(queries, end=3), one, axis=0))
            wide = op.Reshape(op.Concat(queries, factor, axis=3), op.Constant(value_ints=[0, 0, -1]))
            column = op.Unsqueeze(added, op.Constant(value_ints=[2, 3]))
            masks = op.Expand(column, op.Concat(op.Shape(keys_of, end=3), one, axis=0))
            tall = op.Reshape(op.Concat(keys_of, masks, axis=3), op.Constant(value_ints=[0, 0, -1]))
            result = _MICROSOFT.MultiHeadAttention(wide, tall, value, num_heads=num_heads, scale=scale)
        else:  # the kernel broadcasts a mask over batch and heads only
            rows = op.Expand(op.Unsqueeze(keys, one), op.Concat(one, op.Shape(query, start=1, end=2), one, axis=0))
            mask = op.Unsqueeze(rows, one)
            result = op.Attention(query, key, value, mask, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)
    return result


FUNCTIONS = (KeyMaskedAttention,)
