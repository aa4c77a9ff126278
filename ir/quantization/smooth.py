"""SmoothQuant: moving outliers of activations into the weights that read them (Xiao et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 1e-5


def smooth_scale(input_max: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """The scale of each input channel, [K]: the inputs are to be divided by it, the weights multiplied.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), divided by its geometric mean, which leaves the size of activations and
    weights as a whole as it is. Both maxima are taken to be at least 1e-5.

    Args:
        input_max: [K], the largest |x| of each input channel.
        weights: every weight [N, K] that reads this input.
        alpha: 0 to 1, how much of the outliers goes to the weights.

    Returns:
        The scale, positive, fp64 if input_max is, else fp32.

    Raises:
        ValueError: alpha is out of range; no weights, or weights that do not fit; NaN, infinity or negative maxima.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0 to 1")
    if not weights or any(weight.dim() != 2 or weight.shape[1:] != input_max.shape for weight in weights):
        shapes = [list(weight.shape) for weight in weights]
        raise ValueError(f"weights are {shapes}, expected one or more [N, K] with K = {list(input_max.shape)}")
    inputs = input_max.detach().to(torch.float64)
    columns = torch.stack([weight.detach().abs().amax(0).to(inputs) for weight in weights]).amax(0)
    if not bool((inputs.isfinite() & (inputs >= 0) & columns.isfinite()).all()):
        raise ValueError("input_max or the weights have NaN, infinity or negative maxima")
    logarithm = alpha * inputs.clamp(min=_LEAST).log() - (1 - alpha) * columns.clamp(min=_LEAST).log()
    scale = (logarithm - logarithm.mean()).exp()
    return scale.to(torch.float64 if input_max.dtype == torch.float64 else torch.float32)


def outlier_scale(input_max: Tensor, quantile: float) -> Tensor:
    """A scale, [K], that brings the outliers among the input channels down to a quantile of the channels' maxima.

    Channels below it are left alone, and so are their weights: better than `smooth_scale` where a few channels stand
    out, as behind a GELU, because the weights of all others keep their range.

    Args:
        input_max: [K], the largest |x| of each input channel.
        quantile: 0 to 1, how many of the channels are no outliers.
    """
    top = input_max.detach().clamp(min=_LEAST)
    return (top / top.quantile(quantile)).clamp(min=1)
