"""What activations are like, gathered batch by batch in bounded memory: a histogram, and a moving range."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BINS = 2048
_FINEST = 24  # bits: no bin is narrower than 2^-24 of the largest magnitude, which is all that fp32 tells apart
_CHUNK = 2**20  # numbers that are sorted into bins at once: the indices take eight bytes each


class Histogram:
    """Counts of values in 2048 bins that double their width whenever the values outgrow them.

    The width of a bin is a power of two, 2^e, and bin i holds the values in [i 2^e, (i + 1) 2^e). So doubling merges
    whole bins, and width and counts depend on nothing but the values: not on their order, nor on how they came in
    batches. Between 1024 and 2048 bins are in use, fewer only if all values are nearly the same.

    Attributes:
        counts: int64 [2048], on the CPU, the first for bin `first`.
        low: the smallest value, exactly; infinity before there is one.
        high: the largest value, exactly; -infinity before there is one.
        zeros: how many values are exactly zero. Every quantization represents them exactly.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.low, self.high = math.inf, -math.inf
        self.zeros = 0

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0 ** _bins(self.low, self.high)[0]

    @property
    def first(self) -> int:
        """The index of the first bin: it begins at first * width."""
        return _bins(self.low, self.high)[1]

    def add(self, values: Tensor) -> None:
        """Count the values of a float tensor of any shape.

        Raises:
            ValueError: they hold NaN or infinity, or are no floats; nothing is counted then.
        """
        if values.numel() == 0:
            return
        low, high = extremes(values)
        self._grow(min(low, self.low), max(high, self.high))
        width, first = self.width, self.first
        for chunk in values.detach().reshape(-1).split(_CHUNK):
            quotient = chunk.double() / width
            vanished = (quotient == 0) & (chunk < 0)  # too close to zero for fp64, yet below it
            bins = quotient.floor().long() - vanished.long() - first
            self.counts += torch.bincount(bins, minlength=BINS).cpu()
            self.zeros += int((chunk == 0).sum())

    def _grow(self, low: float, high: float) -> None:
        """Widen the range, merging bins."""
        used = self.counts.nonzero()[:, 0]
        if len(used):
            before, start = _bins(self.low, self.high)
            after, first = _bins(low, high)
            # From the bin of all-zero values to any other, the shift may exceed what int64 has; they stay in bin 0.
            bins = ((used + start) >> min(after - before, 63)) - first
            self.counts = torch.zeros_like(self.counts).index_add_(0, bins, self.counts[used])
        self.low, self.high = low, high

    def state(self) -> dict[str, Tensor]:
        """Everything there is to know, as tensors that can be saved."""
        return {
            "counts": self.counts.clone(),
            "range": torch.tensor([self.low, self.high], dtype=torch.float64),
            "zeros": torch.tensor(self.zeros),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Histogram:
        """The histogram whose `state` this is.

        Raises:
            ValueError: it is the state of something else.
        """
        if set(state) != {"counts", "range", "zeros"} or state["counts"].shape != (BINS,):
            raise ValueError(f"state of a histogram expected, got {sorted(state)}")
        histogram = cls()
        histogram.counts = state["counts"].to("cpu", torch.int64, copy=True)
        histogram.low, histogram.high = state["range"].tolist()
        histogram.zeros = int(state["zeros"])
        return histogram


class MovingAverage:
    """Exponential moving average of the smallest and largest value of each batch.

    Attributes:
        momentum: 0 to 1, how much of the past a new batch leaves.
        low: the average of the smallest values; infinity before there is a batch.
        high: the average of the largest values; -infinity before there is a batch.

    Raises:
        ValueError: the momentum is out of range.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected 0 or more and less than 1")
        self.momentum = momentum
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Take in a batch, a float tensor of any shape; the first one is taken as it is.

        Raises:
            ValueError: it holds NaN or infinity, or is no float; the average stays then.
        """
        if values.numel() == 0:
            return
        low, high = extremes(values)
        past = self.momentum if math.isfinite(self.low) else 0.0
        if past:
            low, high = past * self.low + (1 - past) * low, past * self.high + (1 - past) * high
        self.low, self.high = low, high

    def state(self) -> dict[str, Tensor]:
        """Everything there is to know, as tensors that can be saved."""
        return {"average": torch.tensor([self.momentum, self.low, self.high], dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> MovingAverage:
        """The average whose `state` this is.

        Raises:
            ValueError: it is the state of something else.
        """
        if set(state) != {"average"}:
            raise ValueError(f"state of a moving average expected, got {sorted(state)}")
        momentum, low, high = state["average"].tolist()
        average = cls(momentum)
        average.low, average.high = low, high
        return average


def extremes(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest of a tensor's values, which must be finite floats."""
    if not values.is_floating_point():
        raise ValueError(f"values are {values.dtype}, expected floats".replace("torch.", ""))
    low, high = (float(extreme) for extreme in values.detach().aminmax())  # NaN is passed on
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("values hold NaN or infinity, expected finite numbers")
    return low, high


def _bins(low: float, high: float) -> tuple[int, int]:
    """Exponent of the width, and index of the first bin, of the narrowest bins that reach from low to high.

    A wider range never has narrower bins.
    """
    if low > high:
        return 0, 0
    largest = max(-low, high)
    exponent = max(math.frexp(largest)[1] - _FINEST, -1000) if largest else -1000
    while _index(high, exponent) - _index(low, exponent) >= BINS:
        exponent += 1
    return exponent, _index(low, exponent)


def _index(value: float, exponent: int) -> int:
    quotient = value / 2.0**exponent
    return -1 if quotient == 0 and value < 0 else math.floor(quotient)
