"""Causal attention in steps: half of the scores are never computed.

No kernel of ONNX Runtime skips the keys that a causal mask hides. Beyond a few hundred tokens the queries are cut into
sixteen steps, and each step reads the keys up to its own end: (1 + 1/16) / 2 of the products and of the softmax. The
steps are nodes, not a loop, whose overhead is more than it saves. They are written in ONNX, not in torch: traced, the
sizes of a short example's steps would become constants.
"""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, same_sizes, shape
from .functions import DOMAIN

GROUP_QUERY_SIZES = 8  # GroupQueryAttention takes heads of a multiple of this size

_FXPRESS = Opset(DOMAIN, 1)
_MICROSOFT = Opset("com.microsoft", 1)


def refuses(node: fx.Node) -> str | None:
    """Why a node cannot be computed in steps."""
    given = arguments(node)
    if not (isinstance(given["right"], int) and given["right"] == 0 and given["left"] is None):
        return "it is not causal"
    if given["bias"] is not None or given["sinks"] is not None:
        return "there is a bias or a sink"
    query, key, value = (shape(given[name]) for name in ("query", "key", "value"))
    if not same_sizes([query[2]], [key[2]]):
        return "the number of queries is not that of the keys"
    if not all(isinstance(size, int) for size in (query[1], query[3], key[1], value[3])) or query[3] != value[3]:
        return "the heads have no fixed number and one size"
    return None


def settles(node: fx.Node) -> bool:
    """Whether steps are right for a node whatever the example's length: its length varies."""
    return refuses(node) is None and not isinstance(shape(arguments(node)["query"])[2], int)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attributes: dict[str, Any]
) -> Tensor:
    """Query, key and value as [B, N, heads * size], key_mask [B, N] -> [B, N, H * E], zeros in rows without any key.

    `attributes` are those of ai.onnx::Attention.
    """
    if key_mask is None and query.shape[2] // attributes["q_num_heads"] % GROUP_QUERY_SIZES:
        key_mask = torch.ones(key.shape[:2], dtype=torch.bool)  # the function for short sequences takes any size
    function = CausalAttention if key_mask is None else PaddedCausalAttention
    return symbolic(
        f"{DOMAIN}::{function.name}",
        (query, key, value, *([] if key_mask is None else [key_mask])),
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def Step(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, start, size, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """The queries from `start` on, `size` of them or up to the end; both [1]."""
    one = op.Constant(value_ints=[1])
    stop = op.Min(start + size, op.Shape(query, start=1, end=2))
    zero = op.Constant(value_ints=[0])
    seen = op.Unsqueeze(op.Slice(key_mask, zero, stop, one), one)
    rows = op.Expand(seen, op.Concat(one, stop - start, one, axis=0))
    mask = op.Unsqueeze(op.Trilu(rows, op.Squeeze(start), upper=0), one)
    result = op.Attention(
        op.Slice(query, start, stop, one),
        op.Slice(key, zero, stop, one),
        op.Slice(value, zero, stop, one),
        mask,
        q_num_heads=q_num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        softcap=softcap,
    )
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def FourSteps(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, start, size, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Four steps of `size` from `start` on."""
    a = Step(query, key, value, key_mask, start, size, q_num_heads, kv_num_heads, scale, softcap)
    b = Step(query, key, value, key_mask, start + size, size, q_num_heads, kv_num_heads, scale, softcap)
    c = Step(query, key, value, key_mask, start + 2 * size, size, q_num_heads, kv_num_heads, scale, softcap)
    d = Step(query, key, value, key_mask, start + 3 * size, size, q_num_heads, kv_num_heads, scale, softcap)
    return op.Concat(a, b, c, d, axis=1)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def SixteenSteps(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """All queries; there are enough of them that no step is empty (256)."""
    size = (op.Shape(query, start=1, end=2) + 15) / 16
    zero = op.Constant(value_ints=[0])
    a = FourSteps(query, key, value, key_mask, zero, size, q_num_heads, kv_num_heads, scale, softcap)
    b = FourSteps(query, key, value, key_mask, 4 * size, size, q_num_heads, kv_num_heads, scale, softcap)
    c = FourSteps(query, key, value, key_mask, 8 * size, size, q_num_heads, kv_num_heads, scale, softcap)
    d = FourSteps(query, key, value, key_mask, 12 * size, size, q_num_heads, kv_num_heads, scale, softcap)
    # The shape, said again: ONNX Runtime infers none through slices of a length that it does not know.
    return op.Reshape(op.Concat(a, b, c, d, axis=1), op.Shape(query))


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def CausalAttention(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Without padding; short sequences by GroupQueryAttention."""
    length = op.Shape(query, start=1, end=2)
    batch = op.Shape(query, start=0, end=1)
    if op.Squeeze(length >= 384):
        every = op.Expand(op.Cast(op.Constant(value_ints=[1]), to=9), op.Concat(batch, length, axis=0))
        result = SixteenSteps(query, key, value, every, q_num_heads, kv_num_heads, scale, softcap)
    else:
        count = op.Cast(length, to=6)
        last = op.Expand(count - op.Cast(op.Constant(value_ints=[1]), to=6), batch)
        result = _MICROSOFT.GroupQueryAttention(  # one output: its caches would be copies
            query, key, value, None, None, last, op.Squeeze(count),
            num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap,
        )  # fmt: skip
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def PaddedCausalAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """With a key mask; short sequences in one step."""
    length = op.Shape(query, start=1, end=2)
    if op.Squeeze(length >= 384):
        result = SixteenSteps(query, key, value, key_mask, q_num_heads, kv_num_heads, scale, softcap)
    else:
        zero = op.Constant(value_ints=[0])
        result = Step(query, key, value, key_mask, zero, length, q_num_heads, kv_num_heads, scale, softcap)
    return result


FUNCTIONS = (Step, FourSteps, SixteenSteps, CausalAttention, PaddedCausalAttention)
