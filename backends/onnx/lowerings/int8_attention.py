"""Attention with matmuls of integers: MatMulInteger around a softmax that is spelled out.

The left operands are unsigned bytes, for which the kernels are fast: queries 128 higher, probabilities as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype
from ....ir.ops.int8_attention import STEPS
from ....ir.ops.quantize import SMALLEST_SCALE
from .attention import Attention
from .lowering import Lowering

_SHIFT = 128


def _bytes(input: Tensor, zero_point: Tensor) -> Tensor:
    """Whole numbers, divided by their scale already, as bytes of the zero point's dtype."""
    one = torch.ones(())
    return symbolic("QuantizeLinear", (input, one, zero_point), dtype=zero_point.dtype, shape=input.shape, version=21)


def _matmul(left: Tensor, right: Tensor, zero_point: Tensor) -> Tensor:
    """Unsigned by signed bytes, the sums as floats."""
    sums = symbolic(
        "MatMulInteger",
        (left, right, zero_point),
        dtype=torch.int32,
        shape=(*left.shape[:-1], right.shape[-1]),
        version=10,
    )
    floats: Tensor = torch.ops.aten._to_copy.default(sums, dtype=torch.float32)
    return floats


def _scale(item: Tensor, ranges: Tensor | None, place: int) -> Tensor:
    if ranges is not None:
        return ranges[place]
    return (item.abs().amax(-1, keepdim=True) * (1 / 127)).clamp(min=SMALLEST_SCALE)


def _int8_attention(
    query: Tensor, key: Tensor, value: Tensor, *others: Any, ranges: Tensor | None = None, **options: Any
) -> Tensor:
    """The heads of a group are rows of one matmul, so keys are not repeated."""
    names = ("bias", "key_mask", "left", "right", "scale", "softcap", "empty", "ranges")
    named = {**dict(zip(names, others, strict=False)), **options}
    ranges = named.pop("ranges", ranges)
    given = Attention(query, key, value, **named)
    batch, heads, length, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    unsigned, signed = torch.full((), _SHIFT, dtype=torch.uint8), torch.zeros((), dtype=torch.int8)
    rows = query if groups == heads else query.reshape(batch, groups, heads // groups * length, size)
    q, k, v = (_scale(item, ranges, place) for place, item in enumerate((rows, key, value)))
    scores = _matmul(_bytes(rows / q, unsigned), _bytes(key / k, signed).transpose(-1, -2), unsigned)
    scores = scores * (q * given.factor * (k if ranges is not None else k.transpose(-1, -2)))
    if groups != heads:
        scores = scores.reshape(batch, heads, length, keys)
    if given.softcap:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    added = given.additive()
    if added is not None:
        scores = scores + added
    raw = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = raw.sum(-1, keepdim=True)
    if groups != heads:
        raw = raw.reshape(batch, groups, heads // groups * length, keys)
    weighted = raw * (v if ranges is not None else v.transpose(-1, -2))
    step = (weighted.amax(-1, keepdim=True) * (1 / STEPS)).clamp(min=torch.finfo(torch.float32).tiny)
    none = torch.zeros((), dtype=torch.uint8)
    result = _matmul(_bytes(weighted / step, none), _bytes(value / v, signed), none) * step
    result = result.reshape(batch, heads, length, value.shape[3]) / total
    return result if given.empty == "mean" else given.finish(result.transpose(1, 2)).transpose(1, 2)


def _refuses(node: fx.Node) -> str | None:
    found = dtype(arguments(node)["query"])
    return None if found is torch.float32 else f"the kernels give float32, not {found}"


INT8_ATTENTION = (Lowering("MatMulInteger+Softmax", _int8_attention, _refuses),)
