"""Attention one sample at a time, with the keys that a key mask leaves.

The kernels of ONNX Runtime take longer where they read a mask, which changes every score: 1.2 to 1.4 times as long for
one sample, twice for eight of 128 tokens (a Xeon, onnxruntime 1.32); and where the scores of a batch are more than the
second cache holds, a sample at a time is as fast as all at once or faster. So each sample's keys and values are cut to
those that count, and its attention needs no mask. A batch without padding is one attention as it is if its scores are
few, or if it is one sample. Which of these it is turns out at each run, so it is written in ONNX.

Where one sample has many scores, MultiHeadAttention is faster and takes no memory for them: its kernel keeps the
scores of some queries in the cache (FlashAttention, Dao et al., 2022). It is for float32 and knows neither grouped
heads nor a soft cap.

Samples take turns, and the heads of one are what threads can share: where threads are more than about twice as many as
heads, one attention with a mask would use them better.
"""

from __future__ import annotations

import torch
from onnxscript import graph, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, same_sizes, shape
from .functions import DOMAIN

_FXPRESS = Opset(DOMAIN, 1)
_MICROSOFT = Opset("com.microsoft", 1)
MANY_SCORES = 2**20  # numbers, of four bytes, that a second cache does not hold


def refuses(node: fx.Node) -> str | None:
    """Why a node is no attention without a mask or with a key mask alone."""
    given = arguments(node)
    if any(given[name] is not None for name in ("bias", "left", "right", "sinks")):
        return "a key mask is not all that changes the scores"
    if not all(isinstance(shape(given[name])[1], int) for name in ("query", "key")):
        return "the number of heads is dynamic"
    if dtype(given["query"]) not in (torch.float32, torch.float16):
        return f"ONNX Runtime's kernels are for float32 and float16, found {dtype(given['query'])}"
    masked = given["key_mask"] is not None
    return "rows without any key are NaN" if masked and given["empty"] == "nan" else None


def settles(node: fx.Node) -> bool:
    """Whether samples are right for a node whatever the example's length: its length varies."""
    return refuses(node) is None and not isinstance(shape(arguments(node)["key"])[2], int)


def attention_by_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    empty: str,
    heads: tuple[int, int],
    scale: float,
    softcap: float,
) -> Tensor:
    """Query [B, N, H * D], key [B, M, G * D], value [B, M, G * E], key_mask [B, M] -> [B, N, H * E].

    `heads`: H and G. A sample without any key gives zeros, or the mean of its values.
    """
    # What is the same in all layers is computed of the mask and its sizes alone, so that it is computed once.
    mask = torch.ones(key.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    batch, keys = mask.shape
    length = keys if same_sizes([query.shape[1]], [key.shape[1]]) else query.shape[1]
    scores = torch.full((), heads[0] * length * keys, dtype=torch.int64)
    samples = torch.full((), batch, dtype=torch.int64)
    small = torch.logical_or(scores * samples < MANY_SCORES, samples == 1)
    plain = heads[0] == heads[1] and not softcap and query.dtype == torch.float32
    return symbolic(
        f"{DOMAIN}::{(SampleAttention if plain else GroupedSampleAttention).name}",
        (query, key, value, mask, mask.any(1), torch.logical_and(small, mask.all()), scores >= MANY_SCORES),
        {
            "q_num_heads": heads[0],
            "kv_num_heads": heads[1],
            "scale": scale,
            "softcap": softcap,
            "empty": float(empty == "mean"),
        },
        dtype=query.dtype,
        shape=(*query.shape[:2], heads[0] * (value.shape[2] // heads[1])),
        version=1,
    )


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def Unmasked(  # type: ignore[no-untyped-def]
    query, key, value, many, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """In float32, as many key heads as query heads, no soft cap; `many`: of one sample's scores."""
    if many:
        result = _MICROSOFT.MultiHeadAttention(query, key, value, num_heads=q_num_heads, scale=scale)
    else:
        result = op.Attention(
            query, key, value, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap
        )
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def EmptySample(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, empty: float
):
    """`empty` times the mean of the values, which queries of zero give."""
    first = op.Constant(value_ints=[0])
    zeros = op.Expand(op.CastLike(op.Constant(value_float=0.0), query), op.Shape(query))
    every_key, every_value = op.Unsqueeze(key, first), op.Unsqueeze(value, first)
    mean = op.Attention(zeros, every_key, every_value, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale)
    return mean * op.CastLike(op.Constant(value_float=empty), mean)


@script(_FXPRESS, default_opset=op)
def Kept(rows, kept):  # type: ignore[no-untyped-def]
    """The rows of one sample [M, size] that `kept` [M] says to count, [1, count, size]."""
    return op.Unsqueeze(op.Compress(rows, kept, axis=0), op.Constant(value_ints=[0]))


@script(_FXPRESS, default_opset=op)
def Rows(result, queries, width):  # type: ignore[no-untyped-def]
    """One sample's result [N, width]; said in full, for ONNX Runtime infers a width of 0 behind Compress."""
    return op.Reshape(result, op.Concat(op.Shape(queries, end=1), width, axis=0))


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def SampleAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, some, together, many,
    q_num_heads: int, kv_num_heads: int, scale: float, softcap: float, empty: float,
):  # fmt: skip
    """`some` [B] says which samples have keys; `together`, that the batch is one attention without a mask.

    `many`: the scores of one sample are.
    """

    @graph()
    def Sample(queries, keys, values, kept, has_keys):  # type: ignore[no-untyped-def]
        first = op.Constant(value_ints=[0])
        row = op.Unsqueeze(queries, first)
        if has_keys:
            found = Unmasked(row, Kept(keys, kept), Kept(values, kept), many, q_num_heads, kv_num_heads, scale, softcap)
        else:
            found = EmptySample(row, keys, values, q_num_heads, kv_num_heads, scale, empty)
        return Rows(found, queries, op.Shape(values, start=1))

    if together:
        result = Unmasked(query, key, value, many, q_num_heads, kv_num_heads, scale, softcap)
    else:
        result = op.Scan(query, key, value, key_mask, some, body=Sample, num_scan_inputs=5)
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def GroupedSampleAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, some, together, many,
    q_num_heads: int, kv_num_heads: int, scale: float, softcap: float, empty: float,
):  # fmt: skip
    """The same in the one kernel that knows grouped heads, a soft cap and float16."""

    @graph()
    def GroupedSample(queries, keys, values, kept, has_keys):  # type: ignore[no-untyped-def]
        first = op.Constant(value_ints=[0])
        row = op.Unsqueeze(queries, first)
        if has_keys:
            found = op.Attention(
                row, Kept(keys, kept), Kept(values, kept),
                q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap,
            )  # fmt: skip
        else:
            found = EmptySample(row, keys, values, q_num_heads, kv_num_heads, scale, empty)
        heads, groups = op.Constant(value_int=q_num_heads), op.Constant(value_int=kv_num_heads)
        return Rows(found, queries, op.Shape(values, start=1) / groups * heads)

    if together:
        result = op.Attention(
            query, key, value, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap
        )
    else:
        result = op.Scan(query, key, value, key_mask, some, body=GroupedSample, num_scan_inputs=5)
    return result


FUNCTIONS = (Unmasked, EmptySample, Kept, Rows, SampleAttention, GroupedSampleAttention)
