"""Lowerings for other runtimes than ONNX Runtime: nodes that all of them know, of which each fuses what it can.

Around integers stand QuantizeLinear and DequantizeLinear (QDQ): a runtime multiplies the integers where it has a kernel
for that, and what they stand for where it has none. ONNX Runtime has faster ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, shape
from ....ir.ops.norm import add_rms_norm, rms_norm
from ....ir.ops.padding import unpack_tokens
from ....ir.ops.quantize import dequantize, expand_int4, unpack_int4
from . import attention as attentions
from . import quantize as quantizes
from .lowering import Lowering, plain_sum, reference


def _dequantize_linear(
    input: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, block: int | None = None
) -> Tensor:
    attributes: dict[str, Any] = {
        name: value for name, value in (("axis", axis), ("block_size", block)) if value is not None
    }
    return symbolic("DequantizeLinear", (input, scale, zero_point), attributes,
                    dtype=scale.dtype, shape=input.shape, version=21)  # fmt: skip


def _activation(input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """What the bytes of an activation stand for; DequantizeLinear knows no scale for each token."""
    raised = quantizes.raised(zero_point)
    if scale.dim() == 0:
        return _dequantize_linear(input, scale, raised)
    floats: Tensor = reference(dequantize)(input, scale, raised.to(scale.dtype))
    return floats


def _dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Weights with a scale for each row by DequantizeLinear, which other runtimes keep as integers."""
    if input.dtype is torch.int8 and input.dim() == 2 and scale.shape == (input.shape[0], 1) and zero_point is None:
        return _dequantize_linear(input, scale.reshape(-1), torch.zeros(input.shape[0], dtype=torch.int8), axis=0)
    floats: Tensor = quantizes.DEQUANTIZE[0].function(input, scale, zero_point)
    return floats


def _int8_linear(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """A MatMul of two DequantizeLinear, the second of int8 [K, N] with a scale for each column."""
    columns = weight_scale.reshape(-1)
    zeros = torch.zeros(columns.shape, dtype=torch.int8)
    rows = _activation(input, scale, zero_point)
    if input.dim() == 1:
        rows = rows[None]  # of a product of bytes OpenVINO gives a row [1, N] for a vector, not [N]
    result = rows @ _dequantize_linear(weight.t(), columns, zeros, axis=1)
    result = result if bias is None else plain_sum(result, bias)
    return result[0] if input.dim() == 1 else result


def _refuses_int8_linear(node: fx.Node) -> str | None:
    width = shape(arguments(node)["weight_scale"])[-1]
    return None if width == 1 else f"the weight has {width} scales a row, a QDQ matmul takes one"


def _int4_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A MatMul with a DequantizeLinear in whole blocks: OpenVINO takes no others."""
    width, (rows, groups) = input.shape[-1], weight_scale.shape
    block = width if groups == 1 else 1 << (-(-width // groups) - 1).bit_length()  # as `ir.ops.quantize` has it
    integers = F.pad(unpack_int4(weight, width), (0, groups * block - width))
    zeros = torch.zeros((rows, groups), dtype=torch.int8) if zero_point is None else zero_point
    if groups == 1:
        floats = _dequantize_linear(integers, weight_scale.reshape(-1), zeros.reshape(-1), axis=0)
    else:
        floats = _dequantize_linear(integers, weight_scale, zeros, axis=1, block=block)
    return F.linear(input, floats[:, :width], bias)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """On the batch with its padding, which everything else is spared: no loop over samples, of which few are fused."""
    batched = [reference(unpack_tokens)(item.transpose(1, 2), key_mask).transpose(1, 2) for item in (query, key, value)]
    found = attentions.portable(*batched, None, key_mask, None, 0 if causal else None, scale, softcap)
    places = symbolic("NonZero", (key_mask.reshape(-1),), dtype=torch.int64, shape=(1, query.shape[2]), version=13)
    return found.transpose(1, 2).flatten(0, 1).index_select(0, places[0])[None].transpose(1, 2)


ATTENTION = (Lowering("MatMul+Softmax for any runtime", attentions.portable),)
PACKED_ATTENTION = (Lowering("MatMul+Softmax on the batch", _packed_attention),)
RMS_NORM = (Lowering("Mul+Sqrt", reference(rms_norm)),)
ADD_RMS_NORM = (Lowering("Add+Mul+Sqrt", reference(add_rms_norm)),)
DEQUANTIZE = (Lowering("DequantizeLinear or Cast+Mul", _dequantize),)
INT8_LINEAR = (Lowering("DequantizeLinear+MatMul", _int8_linear, _refuses_int8_linear),)
INT4_LINEAR = (Lowering("DequantizeLinear+MatMul", _int4_linear),)
EXPAND_INT4 = (Lowering("integers of 8 bits in the file", reference(expand_int4)),)
