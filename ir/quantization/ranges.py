"""From what activations are like to the integers that stand for them: a range, then a scale and a zero point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import limits
from .histogram import BINS, Histogram, MovingAverage

__all__ = ["METHODS", "Histogram", "MovingAverage", "range_of", "scale_of"]

METHODS = ("minmax", "percentile", "entropy", "mse")

_LEAST_SCALE = 1e-12
# "mse" tries ranges down to 1/256 of the whole, each 4% narrower than the one before: the optimum is flat.
_SHRUNKEN = 2.0 ** (-torch.arange(129, dtype=torch.float64) / 16)
_NEIGHBOURS = 2.0 ** (torch.arange(-7, 8, dtype=torch.float64) / 16)
_CANDIDATES = 128  # thresholds that "entropy" tries
_LEAST_PROBABILITY = 1e-9  # of a bin that only clipped values fall into


def scale_of(low: float, high: float, symmetric: bool, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of the integers that stand for a range: value = (integer - zero_point) * scale.

    The integers are those of `limits`, -128..127 or, symmetric, -127..127 for 8 bits. The range is widened to contain
    zero, which is represented exactly; a symmetric one reaches as far below zero as above.

    Args:
        low: the smallest value.
        high: the largest value.
        symmetric: whether the zero point is 0.
        bits: 2 to 8.

    Returns:
        The scale, 1 for the range of nothing but zero and else at least 1e-12, and the zero point, ties to even.

    Raises:
        ValueError: low > high, or one is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"range is {low} to {high}, expected finite numbers in order")
    smallest, largest = limits(bits, symmetric)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    if low == high:
        return 1.0, 0
    steps = largest - smallest
    scale = max(high / steps - low / steps, _LEAST_SCALE)
    # Python rounds ties to even, as the integers themselves are rounded.
    return scale, 0 if symmetric else max(smallest, min(largest, round(smallest - low / scale)))


def range_of(
    histogram: Histogram, method: str, *, percentile: float = 99.99, symmetric: bool, bits: int = 8
) -> tuple[float, float]:
    """The range of values that the integers should stand for; values beyond it are clipped.

    Args:
        histogram: of the values.
        method: "minmax": nothing is clipped. "percentile": as many are clipped as `percentile` says, from an asymmetric
            range half of them at each end. "entropy": the clipped and rounded distribution has the least
            Kullback-Leibler divergence from the true one (Migacz, 2017; as TensorRT and ONNX Runtime calibrate).
            "mse": the expected squared error of rounding and clipping is least.
        percentile: in (0, 100], what "percentile" keeps.
        symmetric: whether the range must reach as far below zero as above.
        bits: 2 to 8, of the integers.

    Returns:
        (-t, t) if symmetric, else a range that contains zero.

    Raises:
        ValueError: the histogram is empty, unknown method, percentile out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}, expected more than 0 and at most 100")
    if histogram.low > histogram.high:
        raise ValueError("histogram is empty: there are no values to take a range of")
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    bins = _Bins(histogram.first, histogram.width, histogram.counts.double())
    if symmetric:
        high = max(-low, high)
        low = -high
    if method == "percentile":
        share = (100 - percentile) / 100
        if symmetric:
            high = min(high, bins.folded().quantile(1 - share))
        else:
            low = max(low, min(bins.quantile(share / 2), 0.0))
            high = min(high, max(bins.quantile(1 - share / 2), 0.0))
    elif method != "minmax" and low < high:
        choose = _entropy if method == "entropy" else _mse
        low, high = choose(bins.without(histogram.zeros), low, high, symmetric, bits)
    return (-high, high) if symmetric else (low, high)


@dataclass(frozen=True)
class _Bins:
    """Counts [B], fp64, of the bins from index `first` on; bin i begins at i * width."""

    first: int
    width: float
    counts: Tensor

    def indices(self) -> Tensor:
        return self.first + torch.arange(len(self.counts))

    def edges(self) -> Tensor:
        return (self.first + torch.arange(len(self.counts) + 1)).double() * self.width

    def folded(self) -> _Bins:
        """The bins of the absolute values."""
        indices = self.indices()
        indices = torch.where(indices >= 0, indices, -1 - indices)
        first = int(indices.min())
        return _Bins(first, self.width, torch.bincount(indices - first, self.counts))

    def without(self, zeros: int) -> _Bins:
        """The bins without the values that are exactly zero: they have no error whatever the range."""
        if zeros == 0:
            return self
        counts = self.counts.clone()
        counts[-self.first] -= zeros  # the first bin is at zero or below: there are zeros
        return _Bins(self.first, self.width, counts)

    def from_zero(self) -> _Bins:
        """The bins from zero to the last that is used, in both directions, at most 2048 of them: merged if need be."""
        used = self.counts.nonzero()[:, 0]
        indices, shift = self.indices()[used], 0
        first, last = int(indices[0]), int(indices[-1])
        while max(last >> shift, -1) - min(first >> shift, 0) >= BINS:
            shift += 1
        start = min(first >> shift, 0)
        counts = self.counts.new_zeros(max(last >> shift, -1) - start + 1)
        counts.index_add_(0, (indices >> shift) - start, self.counts[used])
        return _Bins(start, self.width * 2.0**shift, counts)

    def quantile(self, share: float) -> float:
        """The value that a share of the values is below, interpolated within its bin."""
        total = self.counts.cumsum(0)
        target = share * float(total[-1])
        index = min(int(torch.searchsorted(total, target)), len(total) - 1)
        missing = (float(total[index]) - target) / max(float(self.counts[index]), 1.0)
        return (self.first + index + 1 - missing) * self.width


def _mse(bins: _Bins, low: float, high: float, symmetric: bool, bits: int) -> tuple[float, float]:
    """The range with the least expected squared error."""
    if symmetric or low == 0 or high == 0:
        return _least_error(bins, torch.stack([low * _SHRUNKEN, high * _SHRUNKEN], 1), symmetric, bits)
    coarse = _SHRUNKEN[::8]
    found = _least_error(bins, torch.cartesian_prod(low * coarse, high * coarse), symmetric, bits)
    lows, highs = (end * _NEIGHBOURS for end in found)
    return _least_error(bins, torch.cartesian_prod(lows.clamp(min=low), highs.clamp(max=high)), symmetric, bits)


def _least_error(bins: _Bins, ranges: Tensor, symmetric: bool, bits: int) -> tuple[float, float]:
    """That of the ranges [R, 2], low and high, with the least squared error if values are even within their bins.

    With u = value / scale and n its integer, rounded and clipped, r = u - n: r^2 is the derivative of n / 12 + r^3 / 3,
    which is continuous. So the error of a bin is exact, wherever the edges between integers lie.
    """
    smallest, largest = limits(bits, symmetric)
    low, high = ranges.unbind(1)
    scale = high / (largest - smallest) - low / (largest - smallest)
    zero = torch.zeros_like(scale) if symmetric else (smallest - low / scale).round()
    edges = bins.edges() / scale.unsqueeze(1)  # [R, B + 1]
    integers = edges.round().clamp((smallest - zero).unsqueeze(1), (largest - zero).unsqueeze(1))
    integral = integers / 12 + (edges - integers) ** 3 / 3
    error = (integral.diff(dim=1) @ bins.counts) * scale**3
    best = int(error.argmin())
    return float(low[best]), float(high[best])


def _entropy(bins: _Bins, low: float, high: float, symmetric: bool, bits: int) -> tuple[float, float]:
    """The range [max(low, -t), min(high, t)] with the least divergence of the clipped and rounded distribution."""
    smallest, largest = limits(bits, symmetric)
    steps = largest if symmetric else largest - smallest
    bins = (bins.folded() if symmetric else bins).from_zero()
    negative = -bins.first
    positive = len(bins.counts) - negative
    best, least = max(negative, positive), math.inf
    for threshold in range(best, 0, -max(best // _CANDIDATES, 1)):
        below, above = min(threshold, negative), min(threshold, positive)
        if below + above <= steps:
            break
        level = ((torch.arange(-below, above) + 0.5) * steps / (below + above)).round().long()
        divergence = _divergence(bins.counts, negative - below, level - level[0])
        if divergence < least:
            best, least = threshold, divergence
    return max(low, -best * bins.width), min(high, best * bins.width)


def _divergence(counts: Tensor, start: int, level: Tensor) -> float:
    """D(P || Q) in nats: P the counts with those outside the window moved to its ends, Q what the levels tell of P.

    The window begins at bin `start`, and its bins [n] belong to levels 0, 1, ... A level knows only how many values
    fall into it; Q spreads them evenly over those of its bins that have any.
    """
    end = start + len(level)
    inside = counts[start:end]
    occupied = inside > 0
    if not bool(occupied.any()):
        return math.inf
    share = torch.bincount(level, inside) / torch.bincount(level, occupied.double()).clamp(min=1)
    coarse = torch.where(occupied, share[level], 0.0)
    true = inside.clone()
    true[0] += counts[:start].sum()
    true[-1] += counts[end:].sum()
    p, q = true / true.sum(), (coarse / coarse.sum()).clamp(min=_LEAST_PROBABILITY)
    return float(torch.xlogy(p, p / q).sum())
