"""Integer-only inference: the bodies of the operators, with the steps that ONNX writes differently.

ONNX divides towards zero (so quotients are of numbers >= 0), shifts unsigned numbers only, and multiplies bytes. The
first operand of a matmul is unsigned, the integers plus 128: signed ones take ten times as long on x86. Where a
processor has no dot products of bytes (VNNI), ONNX Runtime's kernel for unsigned by signed bytes may saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from ....ir.ops import integer
from ....ir.ops.integer import cast
from .lowering import Lowering


def _bytes(input: Tensor, other: Tensor, zero_point: int) -> Tensor:
    """MatMulInteger of unsigned bytes and int8."""
    shape = (*torch.broadcast_shapes(input.shape[:-2], other.shape[:-2]), *input.shape[-2:-1], other.shape[-1])
    return symbolic(
        "MatMulInteger",
        (input, other, torch.full((), zero_point, dtype=torch.uint8)),
        dtype=torch.int32,
        shape=shape,
        version=10,
    )


def _product(input: Tensor, other: Tensor) -> Tensor:
    if input.dtype is torch.uint8:  # as QuantizeLinear stores them: 128 higher already
        return _bytes(input, other, 128)
    if input.dtype is torch.int8:
        raised = cast(input, torch.uint8) + torch.full((), 128, dtype=torch.uint8)  # modulo 256
        return _bytes(raised, other, 128)
    high = _quotient(input, 256)
    low = input - high * 256
    upper, lower = (_bytes(cast(part, torch.uint8), other, 0) for part in (high, low))
    return upper * 256 + lower


def _quotient(x: Tensor, y: Tensor | int) -> Tensor:
    divisor = y if isinstance(y, Tensor) else torch.full((), y, dtype=x.dtype)
    shape = torch.broadcast_shapes(x.shape, divisor.shape)
    return symbolic("Div", (x, divisor), dtype=x.dtype, shape=shape, version=14)


def _power(bits: Tensor) -> Tensor:
    one, places = torch.ones((), dtype=torch.uint64), cast(bits, torch.uint64)
    found = symbolic("BitShift", (one, places), {"direction": "LEFT"}, dtype=torch.uint64, shape=bits.shape, version=11)
    return cast(found, torch.int64)


ONNX = integer.Arithmetic(product=_product, quotient=_quotient, power=_power)


def _requantize(
    input: Tensor, multiplier: Tensor, shift: int, zero_point: Tensor | None, low: int, high: int
) -> Tensor:
    return integer.scale(ONNX, input, multiplier, shift, zero_point, low, high)


def _add(
    input: Tensor,
    other: Tensor,
    input_multiplier: Tensor,
    other_multiplier: Tensor,
    shift: int,
    low: int,
    high: int,
) -> Tensor:
    return integer.add(ONNX, input, other, input_multiplier, other_multiplier, shift, low, high)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return integer.linear(ONNX, input, weight, bias)


def _gelu(input: Tensor) -> Tensor:
    return integer.gelu(ONNX, input)


def _softmax(
    input: Tensor,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    empty: str = "zeros",
) -> Tensor:
    return integer.softmax(ONNX, input, mask, key_mask, left, right, empty)


def _layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: int) -> Tensor:
    return integer.layer_norm(ONNX, input, weight, bias, eps)


# Of the standard, but OpenVINO 2026.4 computes int64 in 32 bits: no form for other runtimes.
REQUANTIZE = (Lowering("int64", _requantize, standard=False),)
INTEGER_ADD = (Lowering("int64", _add, standard=False),)
INTEGER_LINEAR = (Lowering("MatMulInteger", _linear, standard=False),)
INTEGER_MATMUL = (Lowering("MatMulInteger", _product, standard=False),)
INTEGER_GELU = (Lowering("int64", _gelu, standard=False),)
INTEGER_SOFTMAX = (Lowering("int64", _softmax, standard=False),)
INTEGER_LAYER_NORM = (Lowering("int64", _layer_norm, standard=False),)
