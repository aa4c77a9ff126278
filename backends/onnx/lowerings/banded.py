"""Attention within a band of fixed width, in blocks: time and memory grow with N, not with N^2.

Beyond twice the keys of a block, the queries are cut into blocks; each reads the keys of its own block and the `left`
before and `right` after it. The blocks become the batch of one ordinary attention whose mask is the band:
[B, N, H * D] -> [B * blocks, size, H * D] and [B * blocks, size + left + right, G * D]
(the sliding chunks of Longformer, Beltagy et al., 2020).

The cut is written in ONNX, not in torch: traced, the number of blocks of a short example would become a constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, same_sizes, shape
from .functions import DOMAIN

_FXPRESS = Opset(DOMAIN, 1)


def block_size(span: int) -> int:
    """Queries a block, for left + right = span: larger blocks copy fewer keys, but score more that the band hides.

    The least of (1 + span / size) (copy + size * score) is at sqrt(span * copy / score); copying a number takes
    about 25 times as long as one step of its scores.
    """
    return max(16, 16 * round(5 * math.sqrt(span) / 16))


def refuses(node: fx.Node) -> str | None:
    """Why a node cannot be computed by blocks."""
    given = arguments(node)
    left, right = given["left"], given["right"]
    if not all(isinstance(side, int) and side >= 0 for side in (left, right)):
        return "the band has no fixed width around each query's own place"
    if given["bias"] is not None or given["sinks"] is not None:
        return "there is a bias or a sink beside the band"
    query, key, value = (shape(given[name]) for name in ("query", "key", "value"))
    if not same_sizes([query[2]], [key[2]]):
        return "the number of queries is not that of the keys"
    if not all(isinstance(size, int) for size in (query[1], query[3], key[1], value[3])):
        return "the heads have no fixed number and size"
    return None


def settles(node: fx.Node) -> bool:
    """Whether blocks are right for a node whatever the example's length: its length varies and its band does not."""
    return refuses(node) is None and not isinstance(shape(arguments(node)["query"])[2], int)


def band_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, left: int, right: int, attributes: dict[str, Any]
) -> Tensor:
    """Query, key and value as [B, N, heads * size], key_mask [B, N] -> [B, N, H * E]; zeros in rows without any key.

    `attributes` are those of ai.onnx::Attention.
    """
    batch, length, _ = query.shape
    size, span = block_size(left + right), left + right
    rows, columns = torch.arange(size), torch.arange(size + span) - left
    distance = columns[None, :] - rows[:, None]
    return symbolic(
        f"{DOMAIN}::{BandAttention.name}",
        (query, key, value, key_mask, rows, columns, (distance >= -left) & (distance <= right)),
        {"left": left, "right": right, "least": 2 * (size + span), **attributes},
        dtype=query.dtype,
        shape=(batch, length, attributes["q_num_heads"] * (value.shape[2] // attributes["kv_num_heads"])),
        version=1,
    )


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def BandAttention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    key_mask,
    rows,
    columns,
    band,
    left: int,
    right: int,
    least: int,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
):
    """rows [size], columns [width] (from -left on) and band [size, width] describe one block."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    length = op.Shape(query, start=1, end=2)
    if op.Squeeze(length > least):
        size = op.Shape(rows)
        count = (length + size - one) / size
        starts = op.Unsqueeze(op.Range(op.Squeeze(zero), op.Squeeze(count), op.Squeeze(one)) * size, one)
        places = starts + columns
        inside = op.And(places >= zero, places < length)
        places = op.Max(op.Min(places, length - one), zero)
        own = op.Min(starts + rows, length - one)
        visible = op.And(op.Gather(key_mask, places, axis=1), inside)
        mask = op.And(op.Unsqueeze(visible, [2]), band)
        blocks = op.Gather(query, own, axis=1)
        keys = op.Gather(key, places, axis=1)
        values = op.Gather(value, places, axis=1)
        found = op.Attention(
            op.Reshape(blocks, op.Concat(op.Constant(value_ints=[-1]), op.Shape(blocks, start=2), axis=0)),
            op.Reshape(keys, op.Concat(op.Constant(value_ints=[-1]), op.Shape(keys, start=2), axis=0)),
            op.Reshape(values, op.Concat(op.Constant(value_ints=[-1]), op.Shape(values, start=2), axis=0)),
            op.Reshape(mask, op.Concat(op.Constant(value_ints=[-1, 1]), op.Shape(band), axis=0)),
            q_num_heads=q_num_heads,
            kv_num_heads=kv_num_heads,
            scale=scale,
            softcap=softcap,
        )
        joined = op.Concat(op.Shape(query, start=0, end=1), count * size, op.Shape(found, start=2), axis=0)
        result = op.Slice(op.Reshape(found, joined), zero, length, one)
    else:
        keys = op.Expand(op.Unsqueeze(key_mask, one), op.Concat(one, length, length, axis=0))
        below = op.Trilu(keys, op.Constant(value_int=right), upper=0)
        full = op.Unsqueeze(op.Trilu(below, op.Neg(op.Constant(value_int=left)), upper=1), one)
        result = op.Attention(
            query, key, value, full, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap
        )
    return result


FUNCTIONS = (BandAttention,)
