"""Quantization: to integers and back, and linear layers that multiply integers.

Integers of 8 bits are stored as -128..127. A scale (or zero point) belongs to the numbers that it broadcasts over: one
number for a whole tensor, [N, 1] for each output channel of a weight [N, K], [..., 1] for each token of an activation.
Where its last axis is shorter than that of the tensor, each of its numbers belongs to a group of neighbours, of the
least power of two for which so many groups suffice.

`quantize` gives its integers in the dtype of its input unless they are `stored`: rounding then passes gradients
straight through (Bengio et al., 2013), so that a graph with quantize and dequantize can be trained, and its values are
what integer arithmetic gives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import operator

SMALLEST_SCALE = 1e-12  # of a dynamic scale: a row of zeros has none of its own


def _round(input: Tensor) -> Tensor:
    """Half to even; the gradient of the identity. The sum is exact: the two differ by a factor of at most two."""
    return input + (input.round() - input).detach().nan_to_num(0.0)  # infinity stays


def _spread(scale: Tensor, width: int) -> Tensor:
    """A scale with a number for each of the last axis, where it has one for each group of them."""
    groups = scale.shape[-1] if scale.dim() else 1
    if groups in (1, width):
        return scale
    size = 1 << (-(-width // groups) - 1).bit_length()
    return scale.repeat_interleave(size, -1)[..., :width]


def _stored(integers: Tensor, stored: bool) -> Tensor:
    return integers.to(torch.int8) if stored else integers


def _low(zero_point: Tensor | None, width: int, dtype: torch.dtype) -> Tensor | float:
    return 0.0 if zero_point is None else _spread(zero_point.to(dtype), width)


@operator(
    "quantize(Tensor input, Tensor scale, Tensor? zero_point=None, int bits=8, bool stored=False) -> Tensor",
    meaning="round(input / scale) + zero_point, kept within the integers of so many bits",
)
def quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8, stored: bool = False
) -> Tensor:
    """Integers nearest to input / scale, half to even, shifted by an integer zero point and kept in range.

    Shapes: input [..., K]; scale and zero_point as the module says; result [..., K], of the input's dtype, or int8 if
    `stored` (without a gradient then).
    """
    width = input.shape[-1]
    integers = _round(input / _spread(scale, width)) + _low(zero_point, width, input.dtype)
    return _stored(integers.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), stored)


@operator(
    "dequantize(Tensor input, Tensor scale, Tensor? zero_point=None) -> Tensor",
    meaning="(input - zero_point) scale",
)
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """What integers stand for, in the scale's dtype; `input` may be of any dtype, float8 too."""
    width = input.shape[-1]
    return (input.to(scale.dtype) - _low(zero_point, width, scale.dtype)) * _spread(scale, width)


@operator(
    "dynamic_quantize(Tensor input, str per, bool unsigned=False, bool stored=False) -> (Tensor, Tensor, Tensor)",
    meaning="quantize with the range that the input itself has, and its scale and zero point",
)
def dynamic_quantize(
    input: Tensor, per: str, unsigned: bool = False, stored: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scale and zero point of an activation whose range is taken at run time.

    `per` "tensor": the range [min(input, 0), max(input, 0)] in 255 steps, scale and zero point are single numbers (as
    ONNX's DynamicQuantizeLinear). `per` "token": a scale for each row, [..., 1]; symmetric in 127 steps, or where the
    input is known never to be negative (`unsigned`) from 0 in 255 steps.
    """
    data = input.detach()
    if per == "tensor":
        low, high = F.pad(data.flatten(), (0, 1)).aminmax()  # with one zero: never empty, and 0 is in the range
        wide = torch.promote_types(input.dtype, torch.float32)  # the difference may be beyond float16
        scale = ((high.to(wide) - low.to(wide)) / 255).to(input.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = (-low / scale).round().clamp(0, 255) - 128
    elif per == "token":
        top = (data if unsigned else data.abs()).amax(-1, keepdim=True)
        least = max(SMALLEST_SCALE, torch.finfo(input.dtype).tiny)  # float16 has no 1e-12
        scale = (top * (1 / (255 if unsigned else 127))).clamp(min=least)
        zero_point = torch.full((), -128 if unsigned else 0, dtype=input.dtype, device=input.device)
    else:
        raise ValueError(f"per must be 'tensor' or 'token', found {per!r}")
    integers = (_round(input / scale) + zero_point).clamp(-128, 127)
    return _stored(integers, stored), scale, zero_point


@operator(
    "int8_linear(Tensor input, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? bias) -> Tensor",
    meaning="(input - zero_point) weight^T in integers, times both scales, + bias",
)
def int8_linear(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Linear layer whose matmul is of integers, with sums of 32 bits and one rescale.

    Shapes: input int8 [..., K] with its scale [] or [..., 1] and zero point; weight int8 [N, K], weight_scale [N, 1];
    bias [N]; result [..., N] in the scale's dtype, rounded to it once.
    """
    centred = input.double() if zero_point is None else input.double() - zero_point.double()
    sums = F.linear(centred, weight.double())  # exact: products of 8 bits, and doubles hold 53
    wide = torch.promote_types(scale.dtype, torch.float32)  # the sums are beyond float16
    result = sums.to(wide) * (scale.to(wide) * weight_scale.squeeze(-1).to(wide))
    return (result if bias is None else result + bias).to(scale.dtype)


def pack_int4(integers: Tensor) -> Tensor:
    """Integers of 4 bits, int8 [N, K], as two a byte: uint8 [N, ceil(K / 2)], the lower half first, each plus 8."""
    raised = F.pad(integers + 8, (0, integers.shape[-1] % 2), value=8).to(torch.uint8)
    return raised[..., 0::2] + raised[..., 1::2] * 16


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """The int8 [N, width] that `pack_int4` was given."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return both[..., :width].to(torch.int8) - 8


@operator(
    "expand_int4(Tensor weight, Tensor weight_scale, Tensor? zero_point, int width) -> Tensor",
    meaning="(weight - zero_point) weight_scale in integers of 8 bits, the weight two integers a byte",
)
def expand_int4(weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, width: int) -> Tensor:
    """Integers of 8 bits that a weight of 4 bits in groups stands for, its groups' scales being integers, too.

    Times one scale for each row they are the weight, so that `int8_linear` multiplies it (Lin et al., 2025, QServe:
    W4A8KV4 quantization and system co-design). What they are is known before any input is.

    Shapes: weight uint8 [N, ceil(K / 2)] as `pack_int4` gives it; weight_scale int8 [N, G], 1 or more, so small that
    the result fits; zero_point int8 [N, G] or None for 0; width K; result int8 [N, K].
    """
    found: Tensor = dequantize(unpack_int4(weight, width), weight_scale, zero_point)
    return found


@operator(
    "int4_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? zero_point, Tensor? bias) -> Tensor",
    meaning="input ((weight - zero_point) weight_scale)^T + bias, the weight two integers a byte",
)
def int4_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Linear layer with a weight of 4 bits in groups; its input is not quantized.

    Shapes: input [..., K]; weight uint8 [N, ceil(K / 2)] as `pack_int4` gives it; weight_scale [N, G]; zero_point int8
    [N, G] or None for 0; bias [N]; result [..., N].
    """
    width = input.shape[-1]
    integers = unpack_int4(weight, width)
    return F.linear(input, dequantize(integers, weight_scale, zero_point).to(input.dtype), bias)


@operator(
    "int8_weight_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? zero_point, Tensor? bias) -> Tensor",
    meaning="input ((weight - zero_point) weight_scale)^T + bias, the weight of 8 bits",
)
def int8_weight_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Linear layer with a weight of 8 bits, for each channel or in groups; its input is not quantized.

    Shapes: input [..., K]; weight int8 [N, K]; weight_scale and zero_point as for `int4_linear`; bias [N]; result
    [..., N].
    """
    return F.linear(input, dequantize(weight, weight_scale, zero_point).to(input.dtype), bias)


@operator(
    "int4_embedding(Tensor weight, Tensor weight_scale, Tensor? zero_point, Tensor indices, int width) -> Tensor",
    meaning="rows of (weight - zero_point) weight_scale, the weight two integers a byte",
)
def int4_embedding(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, indices: Tensor, width: int
) -> Tensor:
    """Embedding of a table of 4 bits in groups: only the rows that are looked up are unpacked.

    Shapes: weight uint8 [V, ceil(K / 2)] as `pack_int4` gives it; weight_scale [V, G]; zero_point int8 [V, G] or None
    for 0; indices [...], integers; width K; result [..., K] in the scale's dtype.
    """
    rows = unpack_int4(F.embedding(indices, weight), width)
    zeros = None if zero_point is None else F.embedding(indices, zero_point)
    found: Tensor = dequantize(rows, F.embedding(indices, weight_scale), zeros)
    return found
