"""Integer-only inference: a Transformer's layers in integer arithmetic (I-BERT, Kim et al., 2021).

An integer stands for a real number times a scale that is known when the graph is made and is nowhere in it. Between two
scales leads a dyadic number, multiplier / 2^shift. Functions that are not linear work in fixed point: integers in units
of 2^-FRACTION. Sums of products are int32, everything within an operator is int64, with bounds such that nothing
overflows; no operator has a float inside.

The bodies take an `Arithmetic`, the three steps that backends write differently: all else is the same by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import EMPTY, band
from .table import operator

FRACTION = 16  # fractional bits of fixed point: -32768 to 32768 in steps of 1.5e-5
PROBABILITY = 15  # fractional bits of a probability: 1 is 32768, so that two bytes hold it
INT32 = (-(2**31), 2**31 - 1)
_ONE = 1 << FRACTION

_OFFSET = 1 << 62  # makes what is divided positive


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), under the name that torch's ONNX exporter knows."""
    found: Tensor = torch.ops.aten._to_copy.default(x, dtype=dtype)
    return found


@dataclass(frozen=True)
class Arithmetic:
    """Steps that are exact in every backend, but not written alike.

    Attributes:
        product: matmul of an int8 matrix, or an int32 one of 0..65535, and an int8 one: int32.
        quotient: floor(x / y) of int64, x >= 0 and y > 0.
        power: 2^bits of int64 bits, 0 to 62.
    """

    product: Callable[[Tensor, Tensor], Tensor]
    quotient: Callable[[Tensor, Tensor | int], Tensor]
    power: Callable[[Tensor], Tensor]


TORCH = Arithmetic(
    product=lambda x, y: cast(x, torch.int32) @ cast(y, torch.int32),
    quotient=lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    power=lambda bits: torch.ones_like(bits) << bits,
)


def shifted(steps: Arithmetic, x: Tensor, bits: int) -> Tensor:
    """floor(x / 2^bits + 1/2) for int64 |x| < 2^61: half up; bits 1 to 61."""
    return steps.quotient(x + (_OFFSET + (1 << (bits - 1))), 1 << bits) - (_OFFSET >> bits)


def _kept(x: Tensor, low: int, high: int) -> Tensor:
    return cast(x.clamp(low, high), torch.int8 if low >= -128 and high <= 127 else torch.int32)


# --- between scales --------------------------------------------------------------------------------------------


def scale(
    steps: Arithmetic, input: Tensor, multiplier: Tensor, shift: int, zero_point: Tensor | None, low: int, high: int
) -> Tensor:
    """The body of `requantize`."""
    found = shifted(steps, cast(input, torch.int64) * multiplier, shift)
    return _kept(found if zero_point is None else found + zero_point, low, high)


def add(
    steps: Arithmetic,
    input: Tensor,
    other: Tensor,
    input_multiplier: Tensor,
    other_multiplier: Tensor,
    shift: int,
    low: int,
    high: int,
) -> Tensor:
    """The body of `integer_add`."""
    total = cast(input, torch.int64) * input_multiplier + cast(other, torch.int64) * other_multiplier
    return _kept(shifted(steps, total, shift), low, high)


@operator(
    "requantize(Tensor input, Tensor multiplier, int shift, Tensor? zero_point, int low, int high) -> Tensor",
    meaning="floor(input multiplier / 2^shift + 1/2) + zero_point, kept within low..high",
)
def requantize(input: Tensor, multiplier: Tensor, shift: int, zero_point: Tensor | None, low: int, high: int) -> Tensor:
    """Integers of one scale as those of another, by dyadic numbers; halves are rounded up.

    Shapes: input int8 or int32 [..., K]; multiplier int64 (0 to 2^30 - 1) and zero_point int64, each [] or [K]; shift
    1 to 61; result [..., K], int8 if low..high are, else int32.
    """
    return scale(TORCH, input, multiplier, shift, zero_point, low, high)


@operator(
    "integer_add(Tensor input, Tensor other, Tensor input_multiplier, Tensor other_multiplier, int shift, int low, "
    "int high) -> Tensor",
    meaning="floor((input input_multiplier + other other_multiplier) / 2^shift + 1/2), kept within low..high",
)
def integer_add(
    input: Tensor,
    other: Tensor,
    input_multiplier: Tensor,
    other_multiplier: Tensor,
    shift: int,
    low: int,
    high: int,
) -> Tensor:
    """The sum of integers of two scales as integers of a third, rounded once.

    Shapes: input and other int8 or int32 [..., K] (they broadcast); both multipliers int64 (0 to 2^29 - 1), [] or [K];
    shift 1 to 61; result as that of `requantize`.
    """
    return add(TORCH, input, other, input_multiplier, other_multiplier, shift, low, high)


# --- products --------------------------------------------------------------------------------------------------


def linear(steps: Arithmetic, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The body of `integer_linear`."""
    sums = steps.product(input, weight.t())
    return sums if bias is None else sums + bias


@operator(
    "integer_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    meaning="input weight^T + bias, int8 by int8 in int32",
)
def integer_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer of integers.

    Shapes: input int8 [..., K], weight int8 [N, K], bias int32 [N]; result int32 [..., N]. Whoever makes the weight
    sees to it that 128 sum |weight| + |bias| is less than 2^31 in each row.
    """
    return linear(TORCH, input, weight, bias)


@operator(
    "integer_matmul(Tensor input, Tensor other) -> Tensor",
    meaning="input other, both int8 or the first probabilities, in int32",
)
def integer_matmul(input: Tensor, other: Tensor) -> Tensor:
    """Product of two matrices of integers: scores from queries and keys, and weighted values.

    Shapes: input [..., N, K], int8, or int32 of 0..65535 as `integer_softmax` gives them; other int8 [..., K, M];
    result int32 [..., N, M]. Exact for K up to 2^17 in int8; a row of probabilities is exact for any length in use.
    """
    return TORCH.product(input, other)


# --- functions -------------------------------------------------------------------------------------------------


def fixed(numerator: int, denominator: int) -> int:
    """A fraction in fixed point, rounded."""
    return (2 * numerator * _ONE + denominator) // (2 * denominator)


_LN2 = fixed(69314718, 10**8)
_EXP = (fixed(35815147, 10**8), fixed(96963238, 10**8))  # exp(r) ~ .35815147 r^2 + .96963238 r + 1, -ln 2 < r <= 0
_POWER = FRACTION + 8  # fractional bits of exp, so that small weights of a long row add up
# erf(x) ~ 1 - .2888 (min(x, 1.769) - 1.769)^2 for x >= 0, here with x / sqrt(2) for x.
_ERF = (fixed(1444, 10**4), fixed(2501743790, 10**9))


def gelu(steps: Arithmetic, input: Tensor) -> Tensor:
    """The body of `integer_gelu`."""
    factor, end = _ERF
    x = cast(input, torch.int64)
    missing = x.abs().clamp(max=end) - end
    erf = x.sign() * (shifted(steps, missing * missing * -factor, 2 * FRACTION) + _ONE)
    return cast(shifted(steps, x * (erf + _ONE), FRACTION + 1), torch.int32)


def softmax(
    steps: Arithmetic,
    input: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    left: int | None,
    right: int | None,
    empty: str,
) -> Tensor:
    """The body of `integer_softmax`."""
    if empty not in ("zeros", "mean"):
        raise ValueError(f"empty must be one of {', '.join(EMPTY)} but not nan, found {empty!r}")
    scores = cast(input, torch.int64)
    allowed = mask
    if key_mask is not None:
        keys = key_mask[:, None, None, :]
        allowed = keys if allowed is None else torch.bitwise_and(allowed, keys)
    if left is not None or right is not None:
        seen = band(input.shape[-2], input.shape[-1], left, right, input.device)
        allowed = seen if allowed is None else torch.bitwise_and(allowed, seen)
    visible = scores if allowed is None else torch.where(allowed, scores, INT32[0])
    below = (visible.amax(-1, keepdim=True) - scores).clamp(min=0)
    halvings = steps.quotient(below, _LN2)
    rest = halvings * _LN2 - below  # -ln 2 < rest <= 0
    power = shifted(steps, rest * (rest * _EXP[0] + (_EXP[1] << FRACTION)), 3 * FRACTION - _POWER) + (1 << _POWER)
    numerator = steps.quotient(power, steps.power(halvings.clamp(max=62)))
    if allowed is not None:
        numerator = torch.where(allowed, numerator, 0)
    total = numerator.sum(-1, keepdim=True)
    if allowed is not None and empty == "mean":
        numerator = torch.where(total == 0, 1, numerator)
        total = numerator.sum(-1, keepdim=True)
    total = total.clamp(min=1)
    return cast(steps.quotient(numerator * (2 << PROBABILITY) + total, total * 2), torch.int32)


_CENTRE = 4  # more fractional bits for the mean of a row
_ROOT = 10  # fractional bits of its standard deviation
_FAR = 1 << 30
_NEWTON = 6  # from at most twice the root: relative errors 1, .25, .025, 3e-4, 5e-8, 1e-15, then less than 1


def square_root(steps: Arithmetic, x: Tensor) -> Tensor:
    """floor(sqrt(x)) of int64 [..., 1], 0 <= x < 2^62, by Newton's iterations from above; 1 for 0."""
    x = x.clamp(min=1)
    places = torch.arange(31, device=x.device)
    root = torch.where(x >= steps.power(places * 2), steps.power(places + 1), 1).amax(-1, keepdim=True)
    for _ in range(_NEWTON):
        root = steps.quotient(root + steps.quotient(x, root), 2)
    return root - cast(root * root > x, torch.int64)


def layer_norm(steps: Arithmetic, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: int) -> Tensor:
    """The body of `integer_layer_norm`."""
    size = input.shape[-1]
    x = cast(input, torch.int64) * (1 << _CENTRE)
    total = x.sum(-1, keepdim=True) + (size * _FAR + size // 2)
    centred = x - (steps.quotient(total, size) - _FAR)
    variance = steps.quotient((centred * centred).sum(-1, keepdim=True) + size // 2, size).clamp(min=1)
    deviation = square_root(steps, variance * (1 << (2 * _ROOT)) + eps)
    # A row's normal numbers are at most the root of its length, less than _FAR in fixed point.
    above = centred * (2 << (FRACTION + _ROOT)) + deviation * (2 * _FAR + 1)
    normal = steps.quotient(above, deviation * 2) - _FAR
    if weight is not None:
        normal = shifted(steps, normal * weight, FRACTION)
    if bias is not None:
        normal = normal + bias
    return cast(normal.clamp(*INT32), torch.int32)


EPS_FRACTION = 2 * (_CENTRE + _ROOT)  # fractional bits of `integer_layer_norm`'s eps


@operator(
    "integer_gelu(Tensor input) -> Tensor",
    meaning="input (1 + erf(input / sqrt 2)) / 2 in fixed point, erf by a polynomial of degree 2",
)
def integer_gelu(input: Tensor) -> Tensor:
    """I-BERT's GELU; int32 in fixed point to the same. Its error is at most 0.019, that of the polynomial for erf."""
    return gelu(TORCH, input)


@operator(
    "integer_softmax(Tensor input, Tensor? mask=None, Tensor? key_mask=None, SymInt? left=None, SymInt? right=None, "
    "str empty='zeros') -> Tensor",
    meaning="softmax over the allowed keys, fixed point to probabilities in units of 2^-15",
)
def integer_softmax(
    input: Tensor,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    empty: str = "zeros",
) -> Tensor:
    """I-BERT's softmax: exp as a power of two times a polynomial of degree 2, divided by the sum with rounding.

    Shapes: input int32 [B, H, N, M] in fixed point; mask bool, broadcasts to it; the others as those of `attention`;
    result int32, 0 to 2^15. The error of a probability is at most 0.5% of it, plus 2^-16.
    """
    return softmax(TORCH, input, mask, key_mask, left, right, empty)


@operator(
    "integer_layer_norm(Tensor input, Tensor? weight, Tensor? bias, int eps) -> Tensor",
    meaning="(input - mean) / sqrt(variance + eps) * weight + bias over the last axis, 16 bits to fixed point",
)
def integer_layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: int) -> Tensor:
    """LayerNorm with an integer square root; the scale of the input plays no role but for eps.

    Shapes: input int32 [..., D], each of 16 bits, D < 2^22; weight and bias int32 [D] in fixed point; result int32
    [..., D] in fixed point. `eps` is in units of 2^-28 of the input's scale squared, at most 2^61.
    """
    return layer_norm(TORCH, input, weight, bias, eps)
