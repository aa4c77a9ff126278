"""The bias takes back what rounding does to the mean."""

from __future__ import annotations

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.quantization.bias import bias_correction
from fxpress.ir.quantization.grid import Grid, nearest


def test_mean_of_the_outputs_is_kept() -> None:
    weight, inputs = normal(6, 20), normal(50, 20, seed=1) + 3
    quantized = nearest(weight, Grid(3))
    correction = bias_correction(weight, quantized, inputs.mean(0))
    outputs = inputs @ quantized.dequantize().T + correction
    torch.testing.assert_close(outputs.mean(0), (inputs @ weight.T).mean(0))
    assert correction.abs().max() > 0.1


@pytest.mark.parametrize(
    ("weight", "mean", "problem"),
    [
        (normal(6, 20), torch.ones(19), r"mean_input \[19\]"),
        (normal(5, 20), torch.ones(20), r"weight is \[5, 20\], quantized \[6, 20\]"),
        (normal(6, 20), torch.ones(20) * torch.nan, "mean_input has NaN or infinity"),
    ],
)
def test_mean_that_does_not_fit_is_an_error(weight: Tensor, mean: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bias_correction(weight, nearest(normal(6, 20), Grid()), mean)
