"""AWQ: scaling up the input channels that matter before a weight is rounded (Lin et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.sweep import checked_gram, output_error
from .grid import Grid, checked, nearest

_LEAST = 1e-4  # of the largest mean: channels that are hardly ever used are not scaled further down


def awq_scale(weight: Tensor, mean_abs: Tensor, gram: Tensor, grid: Grid, *, steps: int = 20) -> Tensor:
    """The scale of each input channel, [K]: the weight is to be multiplied by it, the inputs divided.

    Tried are mean_abs^a for a = 0, 1/steps, ..., 1, normalised so that the extremes are each other's reciprocal. The
    one whose rounded weight has the smallest squared output error tr((W - Q/s) gram (W - Q/s)^T) is taken; a = 0 is
    plain rounding, so the result is never worse than that. Layers that read the same input are scaled as one: give
    their weights concatenated along N.

    Args:
        weight: [N, K], float.
        mean_abs: [K], mean |x| of each input channel.
        gram: [K, K], sum x^T x over the inputs x of calibration tokens.
        grid: the integers that the scaled weight will be rounded to, with `nearest`.
        steps: how many exponents beside 0.

    Returns:
        The scale, positive, fp64 if the weight is, else fp32.

    Raises:
        ValueError: weight, mean_abs or gram are not finite or do not fit; steps < 1.
    """
    values = checked(weight)
    columns = values.shape[1]
    wide = checked_gram(gram, columns).to(values)
    if mean_abs.shape != (columns,):
        raise ValueError(f"mean_abs is {list(mean_abs.shape)}, expected {[columns]}")
    if not bool((mean_abs.isfinite() & (mean_abs >= 0)).all()):
        raise ValueError("mean_abs has NaN, infinity or negative numbers")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more")
    means = mean_abs.to(values)
    best = torch.ones_like(means)
    if not bool(means.any()):
        return best
    means = (means / means.max()).clamp(min=_LEAST)

    def error(scale: Tensor) -> float:
        rounded = nearest(values * scale, grid).dequantize() / scale
        return float(output_error(rounded - values, wide).sum(dtype=torch.float64))

    least = error(best)
    for step in range(1, steps + 1):
        scale = means ** (step / steps)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = error(scale)
        if found < least:
            best, least = scale, found
    return best
