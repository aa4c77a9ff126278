"""Causal attention in steps: half of the scores are never computed.

No kernel of ONNX Runtime skips the keys that a causal mask hides. Beyond a few hundred tokens the queries are cut into
sixteen steps, and each step reads the keys up to its own end: (1 + 1/16) / 2 of the products and of the softmax. The
steps are nodes, not a loop, whose overhead is more than it saves. They are written in ONNX, not in torch: traced, the
sizes of a short example's steps would become constants.

Shorter sequences run in GroupQueryAttention, which is causal by itself and takes half of the time of a kernel that
reads a mask; where there is padding, one sample at a time, with the keys between it.
"""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import graph, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, same_sizes, shape
from .functions import DOMAIN

LONG = 384  # tokens from which on steps are faster than every score at once
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
    inputs: tuple[Tensor, ...] = (query, key, value)
    if query.shape[2] // attributes["q_num_heads"] % GROUP_QUERY_SIZES:
        function = MaskedCausalAttention
        inputs += (torch.ones(key.shape[:2], dtype=torch.bool) if key_mask is None else key_mask,)
    elif key_mask is None:
        function = CausalAttention
    else:
        function = PaddedCausalAttention
        inputs += (key_mask, *_run_of_keys(key_mask), key_mask.all())
    return symbolic(
        f"{DOMAIN}::{function.name}",
        inputs,
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, mask: Tensor, right: Any, attributes: dict[str, Any]
) -> Tensor:
    """Query [B, H, N, D] on the keys of a cache and its own, [B, G, M, D]; zeros in rows without any key.

    key_mask [B, M], and with the band j <= i + right `mask` [B, 1, N, M]; `attributes` are those of ai.onnx::Attention.
    """
    return symbolic(
        f"{DOMAIN}::{CachedAttention.name}",
        (query, key, value, key_mask, mask, torch.full((1,), right, dtype=torch.int64)),
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def _run_of_keys(key_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample [B]: its first key, the place behind its last, and whether it has all between them, and one."""
    length = key_mask.shape[1]
    places = torch.arange(length)
    first = torch.where(key_mask, places, length).amin(1)
    stop = torch.where(key_mask, places + 1, 0).amax(1)
    return first, stop, (torch.where(key_mask, 1, 0).sum(1) == stop - first) & key_mask.any(1)


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
def CausalAtOnce(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Without padding, every score; heads of a multiple of GROUP_QUERY_SIZES."""
    count = op.Cast(op.Shape(query, start=1, end=2), to=6)
    last = op.Expand(count - op.Cast(op.Constant(value_ints=[1]), to=6), op.Shape(query, start=0, end=1))
    return _MICROSOFT.GroupQueryAttention(  # one output: its caches would be copies
        query, key, value, None, None, last, op.Squeeze(count),
        num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap,
    )  # fmt: skip


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def CausalRun(  # type: ignore[no-untyped-def]
    query, key, value, first, stop, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """One sample [1, N, size] whose keys are those from `first` to `stop`, both [1], at least one.

    Queries before them see none, those behind them all, as the run's last does: it is asked again, for no kernel takes
    nothing.
    """
    one = op.Constant(value_ints=[1])
    end = op.Shape(query, start=1, end=2)
    run_key, run_value = op.Slice(key, first, stop, one), op.Slice(value, first, stop, one)
    zero = op.CastLike(op.Constant(value_float=0.0), query)
    before = op.Expand(zero, op.Concat(one, first, op.Shape(query, start=2), axis=0))
    run_query = op.Slice(query, first, stop, one)
    within = CausalAtOnce(run_query, run_key, run_value, q_num_heads, kv_num_heads, scale, softcap)
    last = op.Attention(
        op.Slice(query, stop - one, end, one), run_key, run_value,
        q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap,
    )  # fmt: skip
    return op.Concat(before, within, op.Slice(last, one, end, one), axis=1)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def CausalAttention(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Without padding; short sequences at once."""
    length = op.Shape(query, start=1, end=2)
    if op.Squeeze(length >= LONG):
        every = op.Expand(op.Cast(op.Constant(value_ints=[1]), to=9), op.Shape(query, start=0, end=2))
        result = SixteenSteps(query, key, value, every, q_num_heads, kv_num_heads, scale, softcap)
    else:
        result = CausalAtOnce(query, key, value, q_num_heads, kv_num_heads, scale, softcap)
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def MaskedCausalAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """With a key mask, heads of any size; short sequences in one step."""
    length = op.Shape(query, start=1, end=2)
    if op.Squeeze(length >= LONG):
        result = SixteenSteps(query, key, value, key_mask, q_num_heads, kv_num_heads, scale, softcap)
    else:
        zero = op.Constant(value_ints=[0])
        result = Step(query, key, value, key_mask, zero, length, q_num_heads, kv_num_heads, scale, softcap)
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def PaddedCausalAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, first, stop, in_one_run, every,
    q_num_heads: int, kv_num_heads: int, scale: float, softcap: float,
):  # fmt: skip
    """With a key mask; short sequences at once where it hides nothing, else by samples.

    `every`: it hides nothing; `first`, `stop`, `in_one_run` [B]: see `_run_of_keys`.
    """

    @graph()
    def CausalSample(queries, keys, values, kept, start, end, simple):  # type: ignore[no-untyped-def]
        zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        a_query, a_key, a_value = op.Unsqueeze(queries, zero), op.Unsqueeze(keys, zero), op.Unsqueeze(values, zero)
        rows, mask = op.Shape(queries, start=0, end=1), op.Unsqueeze(kept, zero)
        if simple:
            found = CausalRun(
                a_query, a_key, a_value, op.Reshape(start, one), op.Reshape(end, one),
                q_num_heads, kv_num_heads, scale, softcap,
            )  # fmt: skip
        else:
            found = Step(a_query, a_key, a_value, mask, zero, rows, q_num_heads, kv_num_heads, scale, softcap)
        return op.Reshape(found, op.Shape(queries))  # said again, as in SixteenSteps: not inferred through slices

    length = op.Shape(query, start=1, end=2)
    if op.Squeeze(length >= LONG):
        result = SixteenSteps(query, key, value, key_mask, q_num_heads, kv_num_heads, scale, softcap)
    else:
        if every:
            result = CausalAtOnce(query, key, value, q_num_heads, kv_num_heads, scale, softcap)
        else:
            result = op.Scan(query, key, value, key_mask, first, stop, in_one_run, body=CausalSample, num_scan_inputs=7)
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def PromptAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """All queries in steps, of [B, heads, N, size]."""
    flat = op.Constant(value_ints=[0, 0, -1])
    a_query = op.Reshape(op.Transpose(query, perm=[0, 2, 1, 3]), flat)
    a_key = op.Reshape(op.Transpose(key, perm=[0, 2, 1, 3]), flat)
    a_value = op.Reshape(op.Transpose(value, perm=[0, 2, 1, 3]), flat)
    result = SixteenSteps(a_query, a_key, a_value, key_mask, q_num_heads, kv_num_heads, scale, softcap)
    heads = op.Concat(
        op.Shape(query, start=0, end=1), op.Shape(query, start=2, end=3), op.Shape(query, start=1, end=2),
        op.Shape(query, start=3), axis=0,
    )  # fmt: skip
    return op.Reshape(op.Transpose(op.Reshape(result, heads), perm=[0, 2, 1, 3]), op.Shape(query))


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def CachedAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, mask, right, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Of [B, heads, N, size], keys and values of M tokens: a long prompt, before which nothing is, in steps."""
    length = op.Shape(query, start=2, end=3)
    causal = op.And(length == op.Shape(key, start=2, end=3), right == op.Constant(value_ints=[0]))
    if op.Squeeze(op.And(causal, length >= LONG)):
        result = PromptAttention(query, key, value, key_mask, q_num_heads, kv_num_heads, scale, softcap)
    else:
        result = op.Reshape(op.Attention(query, key, value, mask, scale=scale, softcap=softcap), op.Shape(query))
    return result


FUNCTIONS = (
    Step,
    FourSteps,
    SixteenSteps,
    CausalAtOnce,
    CausalRun,
    CausalAttention,
    MaskedCausalAttention,
    PaddedCausalAttention,
    PromptAttention,
    CachedAttention,
)
