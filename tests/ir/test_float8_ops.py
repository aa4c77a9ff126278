"""Operators of float8_e4m3: every number of the format, ties, saturation, scales, gradients, the linear layer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from build import normal
from torch import Tensor

from fxpress.ir.ops.float8 import FLOAT8, float8_linear, float8_quantize, float8_scale
from fxpress.ir.ops.quantize import SMALLEST_SCALE, dequantize

HALF = (torch.float16, torch.bfloat16)
ONE = torch.ones(())
# By the definition of the format: 2^-6 (fraction / 8) below the smallest exponent, else 2^(exponent - 7) (1 + ...).
POSITIVE = [
    2.0**-9 * fraction if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8)
    for exponent, fraction in itertools.product(range(16), range(8))
][:-1]  # the last stands for NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_every_number_of_the_format_is_kept(dtype: torch.dtype) -> None:
    x = torch.tensor([*POSITIVE, *(-number for number in POSITIVE)], dtype=dtype)
    found = float8_quantize(x, ONE)
    assert found.dtype is dtype and torch.equal(found, x) and POSITIVE[-1] == 448


def test_between_two_numbers_the_nearer_is_taken_and_ties_go_to_the_even_fraction() -> None:
    low, high = (torch.tensor(side, dtype=torch.float64) for side in (POSITIVE[:-1], POSITIVE[1:]))
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)
    for share, expected in ((0.49, low), (0.5, even), (0.51, high)):
        assert torch.equal(float8_quantize(low + share * (high - low), ONE), expected)


def test_what_is_larger_saturates_and_nan_stays() -> None:
    found = float8_quantize(torch.tensor([500.0, -1e30, torch.inf, -torch.inf, torch.nan]), ONE)
    assert found[:4].tolist() == [448, -448, 448, -448] and found[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_storing_the_numbers_loses_nothing(dtype: torch.dtype) -> None:
    x = normal(5, 33, dtype=dtype)
    found = float8_quantize(x, float8_scale(x))
    assert torch.equal(found.to(FLOAT8).to(dtype), found)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_scale_brings_the_largest_of_each_row_to_448(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.5, 0.0], [0.5, 0.25, 0.125]], dtype=dtype)
    scale = float8_scale(x)
    assert scale.shape == (2, 1) and scale.dtype is dtype
    assert float8_quantize(x, scale).abs().amax(1).tolist() == [448, 448]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_row_of_zeros_stays_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 4, dtype=dtype)
    scale = float8_scale(x)
    assert (scale > 0).all() and not float8_quantize(x, scale).any()
    assert float8_scale(torch.zeros(1, 3)).item() == pytest.approx(SMALLEST_SCALE)


def test_the_error_is_at_most_a_sixteenth_of_the_number_down_to_the_smallest_normal() -> None:
    x = normal(64, 64)
    scale = float8_scale(x)
    error = (dequantize(float8_quantize(x, scale), scale) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-5)).all()


def test_gradient_passes_rounding_and_stops_where_saturated() -> None:
    x = torch.tensor([-500.0, -448, -0.3, 0, 1e-5, 300, 600]).requires_grad_()
    float8_quantize(x, ONE).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def stored(*sizes: int) -> tuple[Tensor, Tensor]:
    """A weight and its scale, [N]."""
    weight = normal(*sizes, seed=1)
    scale = float8_scale(weight)
    return float8_quantize(weight, scale).to(FLOAT8), scale.squeeze(-1)


def test_linear_by_hand() -> None:
    """The weights are 3 * 2 and -8 * 2; 6 * 1 - 16 * 0.5 + 10."""
    weight = torch.tensor([[3.0, -8.0]]).to(FLOAT8)
    assert float8_linear(torch.tensor([1.0, 0.5]), weight, torch.tensor([2.0]), torch.tensor([10.0])).tolist() == [8]


def test_linear_with_a_quantized_input_by_hand() -> None:
    """The scale is 1 / 448: 0.9 becomes 403.2, of which the nearest number is 416."""
    found = float8_linear(torch.tensor([[1.0, 0.9]]), torch.ones(1, 2).to(FLOAT8), torch.ones(1), None, True)
    assert found.item() == pytest.approx((448 + 416) / 448, rel=1e-6)


@pytest.mark.parametrize("bias", [None, normal(7, seed=3)])
@pytest.mark.parametrize("quantize_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_linear_is_that_of_the_dequantized_operands(
    dtype: torch.dtype, quantize_input: bool, bias: Tensor | None
) -> None:
    weight, scale = stored(7, 33)
    x = normal(2, 5, 33, dtype=dtype)
    exact = x.double()
    if quantize_input:
        rows = float8_scale(x.to(scale.dtype) if dtype in HALF else x).double()
        exact = dequantize(float8_quantize(exact, rows), rows)
    expected = F.linear(exact, dequantize(weight, scale.double()[:, None]), None if bias is None else bias.double())
    found = float8_linear(x, weight, scale, bias, quantize_input)
    assert found.dtype is dtype
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_token_does_not_depend_on_the_others() -> None:
    weight, scale = stored(7, 33)
    x = normal(4, 33) * torch.tensor([[1e-3], [1.0], [50.0], [1e4]])
    together = float8_linear(x, weight, scale, None, True)
    alone = torch.cat([float8_linear(row[None], weight, scale, None, True) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_sums_beyond_half_precision() -> None:
    """The sum of the products is 512 * 448 * 448, no float16."""
    x, weight = torch.full((1, 512), 448.0, dtype=torch.float16), torch.full((1, 512), 448.0).to(FLOAT8)
    assert float8_linear(x, weight, torch.tensor([2.0**-12])).item() == 512 * 448 * 448 / 4096


def test_linear_of_an_empty_batch() -> None:
    weight, scale = stored(7, 33)
    assert float8_linear(torch.zeros(0, 33), weight, scale, None, True).shape == (0, 7)


def test_gradient_of_the_input_is_that_of_the_dequantized_weight() -> None:
    weight, scale = stored(7, 33)
    x = normal(5, 33).requires_grad_()
    float8_linear(x, weight, scale, None, True).sum().backward()
    expected = dequantize(weight, scale[:, None]).sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
