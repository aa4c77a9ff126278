"""Numbers for integer-only inference: dyadic multipliers, and linear layers of int8 with the scales that they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RewriteError
from .smooth import smooth_scale

_MULTIPLIER_BITS, _LARGEST_SHIFT = 29, 61
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # how much of its outliers an activation leaves to the weights (SmoothQuant)
_INT32 = 2**31
_SMALLEST = 1e-10  # of a scale
_NARROWEST = 2.0**-10  # of a channel's range over the widest: multipliers share a shift
_ZERO_POINT = 2**12  # the largest: a channel far from zero gets wider steps


def dyadic(*ratios: Tensor) -> tuple[list[Tensor], int]:
    """Positive ratios as multiplier / 2^shift with one shift for all: the multipliers, int64 below 2^29, and the shift.

    The error of each is 2^-28 of the largest, or 2^-62: less than half for any integer of 32 bits.

    Raises:
        RewriteError: the largest ratio is 2^28 or more, or NaN.
    """
    largest = max(float(ratio.max()) for ratio in ratios)
    if not largest < 2.0 ** (_MULTIPLIER_BITS - 1):
        raise RewriteError(f"scales of integers are too far apart: their ratio is {largest:.3g}")
    shift = min(_MULTIPLIER_BITS - math.frexp(largest)[1], _LARGEST_SHIFT)
    limit = 2**_MULTIPLIER_BITS - 1
    return [(ratio.double() * 2.0**shift).round().to(torch.int64).clamp(max=limit) for ratio in ratios], shift


@dataclass(frozen=True)
class Codes:
    """An activation as int8: x ~ scale (q - zero_point), both [K] by channel, float64 and int64."""

    scale: Tensor
    zero_point: Tensor

    def rounded(self, rows: Tensor) -> Tensor:
        """Rows [R, K] as their integers have them."""
        integers = ((rows / self.scale).round() + self.zero_point).clamp(-128, 127)
        return (integers - self.zero_point) * self.scale


@dataclass(frozen=True)
class IntegerWeight:
    """A linear layer on `Codes`: weight int8 [N, K], bias int32 [N], and the scale of its sums [N], float64."""

    weight: Tensor
    bias: Tensor
    scale: Tensor

    @property
    def fits(self) -> bool:
        """Whether no sum can leave int32, whatever the activation."""
        largest = 128 * self.weight.to(torch.int64).abs().sum(1) + self.bias.to(torch.int64).abs()
        return bool((largest < _INT32).all())


def integer_weight(weight: Tensor, bias: Tensor | None, codes: Codes) -> IntegerWeight:
    """A linear layer in integers: the activation's scales multiply the weight's columns, its zero points the bias."""
    columns = weight.to(torch.float64) * codes.scale
    offset = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.to(torch.float64)
    scale = torch.maximum(columns.abs().amax(1) / 127, offset.abs() / 2**29).clamp(min=_SMALLEST * _SMALLEST)
    integers = (columns / scale[:, None]).round()
    moved = (offset / scale).round() - integers @ codes.zero_point.to(torch.float64)
    return IntegerWeight(integers.to(torch.int8), moved.clamp(-_INT32, _INT32 - 1).round().to(torch.int64), scale)


def choose_codes(
    low: Tensor, high: Tensor, rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Codes:
    """How an activation becomes int8, of the alternatives tried the one with which its linear layers err least.

    Each channel has its own middle and its own scale at no cost: the former goes to the bias, the latter to the weight.

    Args:
        low, high: [K], the range of each channel.
        rows: [R, K], a sample of the activation.
        weights, biases: of the linear layers that read it, [N, K] and [N].
    """
    low, high, rows = low.double(), high.double(), rows.double()
    exact = [rows.float() @ weight.float().t() for weight in weights]
    best: tuple[float, Codes] | None = None
    for centred in (True, False):
        middle = (low + high) / 2 if centred else torch.zeros_like(low)
        reach = (high - low) / 2 if centred else torch.maximum(low.abs(), high.abs())
        reach = reach.clamp(min=float(reach.max()) * _NARROWEST)
        for alpha in ALPHAS:
            codes = _codes(middle, reach, smooth_scale(reach, weights, alpha))
            integers = [integer_weight(weight, bias, codes) for weight, bias in zip(weights, biases, strict=True)]
            if not all(item.fits for item in integers):
                continue
            error = 0.0
            steps = (codes.rounded(rows) / codes.scale).float()
            for truth, item in zip(exact, integers, strict=True):
                found = steps @ item.weight.float().t() * item.scale.float()
                error += float((found - truth).square().sum())
            if best is None or error < best[0]:
                best = error, codes
    if best is None:
        raise RewriteError("the sums of a linear layer do not fit in 32 bits")
    return best[1]


def _codes(middle: Tensor, reach: Tensor, smooth: Tensor) -> Codes:
    step = (reach / smooth).amax() / 127
    scale = torch.maximum(smooth * step, middle.abs() / _ZERO_POINT).clamp(min=_SMALLEST)
    return Codes(scale, (-middle / scale).round().to(torch.int64))
