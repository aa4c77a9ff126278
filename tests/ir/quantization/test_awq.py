"""Scaling of input channels before rounding."""

from __future__ import annotations

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.calibration.sweep import output_error
from fxpress.ir.quantization.awq import awq_scale
from fxpress.ir.quantization.grid import Grid, nearest


def error(weight: Tensor, scale: Tensor, gram: Tensor, grid: Grid) -> float:
    rounded = nearest(weight * scale, grid).dequantize() / scale
    return float(output_error((rounded - weight).double(), gram.double()).sum())


def salient(columns: int) -> Tensor:
    """Inputs [N, K], a few channels much larger than the others."""
    inputs = normal(500, columns, seed=5)
    inputs[:, ::16] *= 20
    return inputs


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, group=16), Grid(4, False, 16)], ids=str)
def test_channels_that_matter_are_scaled_up(grid: Grid) -> None:
    weight, inputs = normal(40, 64), salient(64)
    gram = inputs.T @ inputs
    scale = awq_scale(weight, inputs.abs().mean(0), gram, grid)
    assert scale[::16].min() > scale[torch.arange(64) % 16 > 0].max()
    assert error(weight, scale, gram, grid) < 0.7 * error(weight, torch.ones(64), gram, grid)


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_rounding(seed: int) -> None:
    """Means that have nothing to do with the inputs: no exponent but 0 helps."""
    weight, inputs = normal(10, 30, seed=seed), normal(100, 30, seed=seed + 50)
    gram = inputs.T @ inputs
    scale = awq_scale(weight, normal(30, seed=seed + 99).abs(), gram, Grid())
    assert error(weight, scale, gram, Grid()) <= error(weight, torch.ones(30), gram, Grid())


def test_extremes_are_reciprocal() -> None:
    inputs = salient(64)
    scale = awq_scale(normal(40, 64), inputs.abs().mean(0), inputs.T @ inputs, Grid(4))
    torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0))


@pytest.mark.parametrize("dead", [slice(0, 5), slice(None)], ids=["some", "all"])
def test_dead_channels_have_a_positive_scale(dead: slice) -> None:
    inputs = salient(64)
    inputs[:, dead] = 0
    scale = awq_scale(normal(40, 64), inputs.abs().mean(0), inputs.T @ inputs, Grid(4))
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize(
    ("mean_abs", "gram", "steps", "problem"),
    [
        (torch.ones(3), torch.eye(4), 20, r"mean_abs is \[3\], expected \[4\]"),
        (torch.ones(4), torch.eye(3), 20, r"gram is \[3, 3\]"),
        (-torch.ones(4), torch.eye(4), 20, "mean_abs has NaN, infinity or negative numbers"),
        (torch.ones(4), torch.eye(4), 0, "steps is 0"),
    ],
)
def test_statistics_that_do_not_fit_are_an_error(mean_abs: Tensor, gram: Tensor, steps: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        awq_scale(normal(2, 4), mean_abs, gram, Grid(), steps=steps)
