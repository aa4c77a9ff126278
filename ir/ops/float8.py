"""Numbers of 8 bits with a floating point: E4M3 (Micikevicius et al., 2022), for weights and activations.

Four bits of exponent, three of fraction, no infinity: the largest is 448, the smallest normal number 2^-6, the
smallest of all 2^-9. A scale brings the largest magnitude of a row to 448; whatever is larger saturates. Scales are
[N, 1] for each output channel of a weight [N, K] and [..., 1] for each token of an activation, as in `quantize`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import SMALLEST_SCALE
from .table import operator

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0


@operator(
    "float8_quantize(Tensor input, Tensor scale) -> Tensor",
    meaning="the number of float8_e4m3 nearest to input / scale, within -448..448",
)
def float8_quantize(input: Tensor, scale: Tensor) -> Tensor:
    """Numbers of float8_e4m3 nearest to input / scale, ties to even, saturating; NaN stays.

    Shapes: input [..., K]; scale broadcasts over it; result [..., K], of the input's dtype, whose numbers float8_e4m3fn
    has: `.to(torch.float8_e4m3fn)` stores them. Rounding passes gradients straight through (Bengio et al., 2013).
    """
    kept = (input / scale).clamp(-LARGEST, LARGEST).to(input.dtype)
    found = kept.detach().to(FLOAT8).to(input.dtype)
    return kept + (found - kept).detach()  # exact: the two differ by a factor of at most two, or one of them is 0


@operator(
    "float8_scale(Tensor input) -> Tensor",
    meaning="the largest magnitude of each row, divided by that of float8_e4m3",
)
def float8_scale(input: Tensor) -> Tensor:
    """The scale [..., 1] of each row of an input [..., K], of its dtype; a row of zeros has the smallest there is."""
    least = max(SMALLEST_SCALE, torch.finfo(input.dtype).tiny)  # float16 has no 1e-12
    return (input.detach().abs().amax(-1, keepdim=True) * (1 / LARGEST)).clamp(min=least)


@operator(
    "float8_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias=None, bool quantize_input=False)"
    " -> Tensor",
    meaning="input (weight weight_scale)^T + bias, the weight (and where asked the input) in float8_e4m3",
)
def float8_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, quantize_input: bool = False
) -> Tensor:
    """Linear layer with a weight of float8_e4m3; its input is rounded to float8_e4m3, too, if `quantize_input`.

    Each row of such an input has the scale that `float8_scale` gives it in fp32. Sums, both scales and the bias are
    computed in fp32 (fp64 for an fp64 input), and rounded once to the input's dtype.

    Shapes: input [..., K]; weight float8_e4m3fn [N, K]; weight_scale fp32 [N]; bias [N], of any float dtype; result
    [..., N] in the input's dtype.
    """
    wide = torch.promote_types(input.dtype, torch.float32)
    given = input.to(wide)
    rows = float8_scale(given) if quantize_input else None
    result = F.linear(given if rows is None else float8_quantize(given, rows), weight.to(wide))
    result = result * (weight_scale if rows is None else rows * weight_scale)
    return (result if bias is None else result + bias).to(input.dtype)


@operator(
    "float8_products(Tensor input, Tensor weight) -> Tensor",
    meaning="input weight^T of numbers of float8_e4m3, in fp32",
)
def float8_products(input: Tensor, weight: Tensor) -> Tensor:
    """Sums of products of float8_e4m3 numbers, without their scales: what a `float8_linear` with such inputs rescales.

    Shapes: input float8_e4m3fn [..., K]; weight float8_e4m3fn [N, K]; result fp32 [..., N].
    """
    return F.linear(input.to(torch.float32), weight.to(torch.float32))
