"""Attention with a key mask: long sequences without padding run without the mask.

A batch of one, or of equal lengths, has a key mask of ones. MultiHeadAttention's kernel, whose scores stay in the cache
(FlashAttention, Dao et al., 2022), takes no masks; from a few hundred keys on it is faster than one that reads a mask
for every score. The choice is made at each run, so it is written in ONNX.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, shape
from ....ir.ops.attention import ABSORBING
from .functions import DOMAIN

_FXPRESS = Opset(DOMAIN, 1)
_MICROSOFT = Opset("com.microsoft", 1)


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
    keys = key_mask
    if empty == "mean":
        keys = torch.where(key_mask, torch.zeros((), dtype=query.dtype), ABSORBING)
    return symbolic(
        f"{DOMAIN}::{KeyMaskedAttention.name}",
        (query, key, value, keys, key_mask.all()),
        {"num_heads": num_heads, "scale": scale},
        dtype=query.dtype,
        shape=(*query.shape[:2], value.shape[2]),
        version=1,
    )


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def KeyMaskedAttention(query, key, value, keys, every, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    """`keys` is the key mask, boolean or added; `every` says that it hides none."""
    one = op.Constant(value_ints=[1])
    length = op.Shape(key, start=1, end=2)
    if op.And(every, op.Squeeze(length >= 384)):
        result = _MICROSOFT.MultiHeadAttention(query, key, value, num_heads=num_heads, scale=scale)
    else:  # the kernel broadcasts a mask over batch and heads only
        rows = op.Expand(op.Unsqueeze(keys, one), op.Concat(one, op.Shape(query, start=1, end=2), one, axis=0))
        mask = op.Unsqueeze(rows, one)
        result = op.Attention(query, key, value, mask, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)
    return result


FUNCTIONS = (KeyMaskedAttention,)
