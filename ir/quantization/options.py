"""The ways in which a site may be quantized, each measured on what it reads in calibration, and their refinement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .awq import awq_scale
from .choice import Activation, Choice, measured
from .gptq import gptq
from .grid import Clip, Grid, nearest
from .histogram import Histogram, MovingAverage
from .ranges import range_of, scale_of
from .smooth import outlier_scale, smooth_scale

ALPHAS = (0.5, 0.6, 0.7, 0.8)  # SmoothQuant's, how much of the outliers goes to the weights
QUANTILES = (0.5, 0.7, 0.9, 0.97)  # of the channels that are no outliers
# Of GPTQ, more than usual: with 0.01 weights of channels that were hardly seen take the errors of all others, and rare
# tokens outside the calibration data came out with a cosine of 0.2.
_DAMP = 0.1
_ROWS = 512  # tokens that alternatives are compared on


@dataclass(frozen=True)
class Data:
    """What a site reads in calibration: rows [tokens, K] by batch, padding left out."""

    rows: Sequence[Tensor]

    def sample(self) -> Tensor:
        """Some of the rows, evenly spread."""
        counts = [len(rows) for rows in self.rows]
        total = sum(counts)
        if not total:
            raise ValueError("there is no token that is not padding")
        places = torch.linspace(0, total - 1, min(_ROWS, total)).round().long()
        found, start = [], 0
        for rows, count in zip(self.rows, counts, strict=True):
            found.append(rows[places[(places >= start) & (places < start + count)] - start].float())
            start += count
        return torch.cat(found)

    def top(self) -> Tensor:
        """The largest magnitude of each channel, [K]."""
        return torch.stack([rows.float().abs().amax(0) for rows in self.rows if len(rows)]).amax(0)

    def gram(self, choice: Choice) -> Tensor:
        """Sum of x^T x over the rows that the quantized linears read, [K, K].

        The rounding of the inputs counts as noise that is independent of them. Products of the rounded inputs would
        show channels that are mostly rounded to zero as dead, and weights fitted to that fail where they are not.
        """
        width = self.rows[0].shape[-1]
        total, noise = torch.zeros(width, width), torch.zeros(width)
        for rows in self.rows:
            x = choice.scaled(rows.float())
            total.addmm_(x.T, x)
            noise += (choice.activation.rounded(x) - x).square().sum(0)
        return total + noise.diag()


@dataclass(frozen=True)
class Way:
    """What an option is to be: the level of its activation, and the words of Quantize's `method`."""

    level: str
    grid: Grid
    clip: Clip = "minmax"  # of the weights
    range: str = "minmax"  # of static activations
    symmetric: bool = False  # static activations
    smooth: bool = False
    awq: bool = False
    gptq: bool = False
    correct: bool = False


def plain(way: Way, weights: Sequence[Tensor], low: float | None) -> Choice:
    """Weights rounded to nearest, nothing known of the activation but its least value."""
    activation = Activation(way.level, low if way.level == "token" else None)
    return rounded(Choice(activation), way, weights)


def rounded(choice: Choice, way: Way, weights: Sequence[Tensor]) -> Choice:
    """The choice with the weights, smoothed as it says, rounded to nearest."""
    scaled = [weight.float() if choice.smooth is None else weight.float() * choice.smooth for weight in weights]
    found = tuple(nearest(weight, way.grid, clip=way.clip) for weight in scaled)
    return replace(choice, weights=found, bits=way.grid.bits)


def options(way: Way, weights: Sequence[Tensor], low: float | None, data: Data) -> list[Choice]:
    """Without and, where the method has it, with the best smoothing."""
    sample = data.sample()
    weights = [weight.float() for weight in weights]
    first = measured(_ranged(plain(way, weights, low), way, data), weights, sample)
    tried = []
    for smooth in _scales(way, weights, data, sample):
        choice = _ranged(rounded(replace(first, smooth=smooth), way, weights), way, data)
        tried.append(measured(choice, weights, sample))
    best = min(tried, key=lambda choice: choice.noise, default=first)
    return [first, best] if best.noise < first.noise else [first]


def refined(choice: Choice, way: Way, weights: Sequence[Tensor], data: Data) -> Choice:
    """The same with what the method has that costs nothing at run time: GPTQ's weights, corrected biases.

    Either is kept only where the outputs come closer to those of the weights as they were.
    """
    weights, sample = [weight.float() for weight in weights], data.sample()
    best = measured(choice, weights, sample)
    if way.gptq:
        gram = data.gram(choice)
        scaled = weights if choice.smooth is None else [weight * choice.smooth for weight in weights]
        found = tuple(gptq(weight, gram, way.grid, clip=way.clip, damp=_DAMP) for weight in scaled)
        best = min(best, measured(replace(best, weights=found), weights, sample), key=lambda item: item.noise)
    if way.correct:
        inputs = best.inputs(sample)
        errors = tuple(
            (sample @ weight.T - best.output(inputs, index, weight, torch.zeros(len(weight)))).mean(0)
            for index, weight in enumerate(weights)
        )
        best = min(best, measured(replace(best, corrections=errors), weights, sample), key=lambda item: item.noise)
    return best


def _scales(way: Way, weights: Sequence[Tensor], data: Data, sample: Tensor) -> list[Tensor]:
    if way.level == "float":
        if not way.awq:
            return []
        gram = data.gram(Choice(Activation("float")))
        return [awq_scale(torch.cat(list(weights)), sample.abs().mean(0), gram, way.grid)]
    if not way.smooth:
        return []
    top = data.top()
    return [smooth_scale(top, weights, alpha) for alpha in ALPHAS] + [outlier_scale(top, item) for item in QUANTILES]


def _ranged(choice: Choice, way: Way, data: Data) -> Choice:
    """The choice with the range of a static activation."""
    if way.level != "static":
        return choice
    seen = MovingAverage() if way.range == "average" else Histogram()
    for rows in data.rows:
        if len(rows):
            seen.add(choice.scaled(rows.float()))
    if isinstance(seen, Histogram):
        low, high = range_of(seen, way.range, symmetric=way.symmetric)
    else:
        low, high = seen.low, seen.high
    scale, zero_point = scale_of(low, high, way.symmetric)
    activation = Activation("static", None, torch.tensor(scale), torch.tensor(float(zero_point)))
    return replace(choice, activation=activation)
