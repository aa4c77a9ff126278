"""Ranges of activations and the integers for them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.quantization.grid import limits
from fxpress.ir.quantization.ranges import METHODS, Histogram, range_of, scale_of


def histogram(values: Tensor) -> Histogram:
    made = Histogram()
    made.add(values)
    return made


def error(values: Tensor, low: float, high: float, symmetric: bool, bits: int = 8) -> float:
    """The mean squared error of values that are rounded to the integers for a range."""
    scale, zero = scale_of(low, high, symmetric, bits)
    integers = ((values.double() / scale).round() + zero).clamp(*limits(bits, symmetric))
    return float(((integers - zero) * scale - values).square().mean())


def outliers() -> Tensor:
    """Normal values, one in ten thousand of them thirty times as large."""
    values = normal(100_000)
    values[::10_000] *= 30
    return values


VALUES = {
    "normal": normal(100_000),
    "uniform": torch.linspace(-1, 1, 100_001),
    "outliers": outliers(),
    "gelu": F.gelu(1.5 * normal(100_000)),
    "relu": F.relu(normal(100_000)),
    "laplace": normal(100_000).abs() * normal(100_000, seed=1),
    "positive": 5 + normal(100_000).sigmoid(),
    "negative": -5 - normal(100_000).sigmoid(),
    "constant": torch.full((100,), 3.0),
    "sparse": torch.cat([torch.zeros(100_000), normal(1000)]),
}


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "bits", "expected"),
    [
        (-127.0, 50.0, True, 8, (1.0, 0)),
        (10.0, 254.0, True, 8, (2.0, 0)),
        (-7.5, 3.0, True, 4, (1.0, 0)),  # as weights: all sixteen integers
        (0.0, 255.0, False, 8, (1.0, -128)),
        (20.0, 255.0, False, 8, (1.0, -128)),
        (-255.0, -20.0, False, 8, (1.0, 127)),
        (-100.5, 154.5, False, 8, (1.0, -28)),  # -27.5 is half way: to even
        (-5.0, 10.0, False, 4, (1.0, -3)),
        (0.0, 0.0, True, 8, (1.0, 0)),
        (0.0, 0.0, False, 8, (1.0, 0)),
        (0.0, 1e-30, True, 8, (1e-12, 0)),
        (0.0, 1e-30, False, 8, (1e-12, -128)),
    ],
)
def test_scale_and_zero_point(low: float, high: float, symmetric: bool, bits: int, expected: tuple[float, int]) -> None:
    assert scale_of(low, high, symmetric, bits) == expected


@settings(deadline=None, max_examples=200)
@given(
    ends=st.tuples(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300)).map(sorted),
    symmetric=st.booleans(),
    bits=st.integers(2, 8),
)
def test_every_value_of_a_range_is_at_most_half_a_step_away(ends: list[float], symmetric: bool, bits: int) -> None:
    low, high = ends
    scale, zero = scale_of(low, high, symmetric, bits)
    smallest, largest = limits(bits, symmetric)
    assert scale >= 1e-12
    assert smallest <= zero <= largest
    for value in (low, high):
        integer = max(smallest, min(largest, round(value / scale) + zero))
        assert abs((integer - zero) - value / scale) <= 0.5 + 1e-9


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_range_that_is_none_is_an_error(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected finite numbers in order"):
        scale_of(low, high, True)


@pytest.mark.parametrize("name", VALUES)
def test_minmax_clips_nothing(name: str) -> None:
    values = VALUES[name]
    low, high = range_of(histogram(values), "minmax", symmetric=False)
    assert (low, high) == (min(float(values.min()), 0), max(float(values.max()), 0))
    largest = float(values.abs().max())
    assert range_of(histogram(values), "minmax", symmetric=True) == (-largest, largest)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_range_lies_within_the_values_and_contains_zero(name: str, symmetric: bool, method: str) -> None:
    made = histogram(VALUES[name])
    low, high = range_of(made, method, symmetric=symmetric)
    widest = range_of(made, "minmax", symmetric=symmetric)
    assert widest[0] <= low <= 0 <= high <= widest[1]
    assert low < high


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9])
@pytest.mark.parametrize("name", ["normal", "uniform", "laplace", "gelu"])
def test_percentile_is_that_of_the_magnitudes(name: str, percentile: float) -> None:
    made = histogram(VALUES[name])
    _, high = range_of(made, "percentile", percentile=percentile, symmetric=True)
    assert high == pytest.approx(float(VALUES[name].abs().quantile(percentile / 100)), abs=2 * made.width)


def test_asymmetric_percentile_clips_both_ends() -> None:
    values = VALUES["normal"] + 1
    made = histogram(values)
    low, high = range_of(made, "percentile", percentile=98.0, symmetric=False)
    assert low == pytest.approx(float(values.quantile(0.01)), abs=made.width)
    assert high == pytest.approx(float(values.quantile(0.99)), abs=made.width)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_hundredth_percentile_is_minmax(name: str, symmetric: bool) -> None:
    made = histogram(VALUES[name])
    all_values = range_of(made, "percentile", percentile=100, symmetric=symmetric)
    assert all_values == pytest.approx(range_of(made, "minmax", symmetric=symmetric), abs=made.width)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_mse_is_near_the_best_of_many_ranges(name: str, symmetric: bool, bits: int) -> None:
    values = VALUES[name]
    low, high = range_of(histogram(values), "minmax", symmetric=symmetric)
    tried = [error(values, low * ratio / 100, high * ratio / 100, symmetric, bits) for ratio in range(4, 101, 2)]
    found = range_of(histogram(values), "mse", symmetric=symmetric, bits=bits)
    assert error(values, *found, symmetric, bits) <= 1.05 * min(tried)


@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_clips_outliers_and_keeps_the_rest(symmetric: bool) -> None:
    _, high = range_of(histogram(VALUES["outliers"]), "entropy", symmetric=symmetric)
    assert 4 < high < 0.5 * float(VALUES["outliers"].max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_values_without_tails_are_not_clipped(method: str, symmetric: bool) -> None:
    assert range_of(histogram(VALUES["uniform"]), method, symmetric=symmetric) == (-1, 1)


@pytest.mark.parametrize("method", ["entropy", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_zeros_have_no_say(symmetric: bool, method: str) -> None:
    values = normal(1000)
    with_zeros = torch.cat([values, torch.zeros(100_000)])
    expected = range_of(histogram(values), method, symmetric=symmetric)
    assert range_of(histogram(with_zeros), method, symmetric=symmetric) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_but_zeros_has_the_range_of_zero(symmetric: bool, method: str) -> None:
    low, high = range_of(histogram(torch.zeros(10)), method, symmetric=symmetric)
    assert (low, high) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_sign_does_not_matter(method: str) -> None:
    values = VALUES["gelu"]
    low, high = range_of(histogram(values), method, symmetric=False)
    mirrored = histogram(-values)
    # values on an edge change their bin when they change their sign
    assert range_of(mirrored, method, symmetric=False) == pytest.approx((-high, -low), abs=2 * mirrored.width)


def test_empty_histogram_is_an_error() -> None:
    with pytest.raises(ValueError, match="histogram is empty"):
        range_of(Histogram(), "minmax", symmetric=True)


def test_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="method is 'best', expected one of minmax, percentile, entropy, mse"):
        range_of(histogram(torch.ones(1)), "best", symmetric=True)


@pytest.mark.parametrize("percentile", [0.0, 101.0, math.nan])
def test_percentile_out_of_range_is_an_error(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile is"):
        range_of(histogram(torch.ones(1)), "percentile", percentile=percentile, symmetric=True)
