"""Bias correction: quantized weights shift the mean of the outputs, the bias takes it back (Nagel et al., 2019)."""

from __future__ import annotations

from torch import Tensor

from .grid import Quantized, checked


def bias_correction(weight: Tensor, quantized: Quantized, mean_input: Tensor) -> Tensor:
    """What to add to the bias, [N]: (W - Wq) mean_input, so that the outputs keep their mean over the calibration data.

    Args:
        weight: [N, K] as it was quantized (with the inputs' scale in it, if they are scaled).
        quantized: the same, on its grid.
        mean_input: [K], the mean of each (scaled) input.

    Returns:
        fp64 if the weight is, else fp32.

    Raises:
        ValueError: the shapes do not fit; the weight or the mean is not finite.
    """
    values = checked(weight)
    if quantized.integers.shape != values.shape or mean_input.shape != values.shape[1:]:
        shapes = f"weight is {list(values.shape)}, quantized {list(quantized.integers.shape)}"
        raise ValueError(f"{shapes}, mean_input {list(mean_input.shape)}: expected [N, K], [N, K], [K]")
    if not bool(mean_input.isfinite().all()):
        raise ValueError("mean_input has NaN or infinity")
    return (values - quantized.dequantize().to(values)) @ mean_input.to(values)
