"""Statistics of activations that come in batches."""

from __future__ import annotations

import math

import pytest
import torch
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.quantization.histogram import BINS, Histogram, MovingAverage

# Numbers of very different size, so that a second batch outgrows the bins of the first.
FLOATS = st.floats(-1e300, 1e300) | st.floats(-2, 2) | st.floats(5, 5.001) | st.just(0.0)
BATCHES = st.lists(FLOATS, min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float64))


def histogram(*batches: Tensor) -> Histogram:
    made = Histogram()
    for batch in batches:
        made.add(batch)
    return made


def same(a: Histogram, b: Histogram) -> bool:
    one, other = a.state(), b.state()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_bins_hold_the_values_from_their_edge_on() -> None:
    made = histogram(torch.tensor([-1.0, -0.6, -0.5, 0.0, 0.5, 1022.999]))
    assert (made.width, made.first) == (0.5, -2)
    used = made.counts.nonzero()[:, 0]
    assert dict(zip(used.tolist(), made.counts[used].tolist(), strict=True)) == {0: 2, 1: 1, 2: 1, 3: 1, 2047: 1}


def test_extremes_are_exact_and_everything_is_counted() -> None:
    values = normal(3, 1000)
    made = histogram(values)
    assert (made.low, made.high) == (float(values.min()), float(values.max()))
    assert made.count == 3000


def test_zeros_are_counted_exactly() -> None:
    assert histogram(torch.tensor([0.0, -0.0, 1e-30, 5.0]), torch.zeros(2)).zeros == 4


def test_counts_are_those_of_numpys_bins() -> None:
    values = normal(10_000, dtype=torch.float64)
    made = histogram(*values.split(999))
    edges = (made.first + torch.arange(BINS + 1)).double() * made.width
    assert torch.equal(made.counts.double(), torch.histogram(values, edges).hist)


def test_at_least_half_of_the_bins_span_the_values() -> None:
    made = histogram(normal(100) * 1e-3, normal(1000, seed=1))
    assert 1023 <= (made.high - made.low) / made.width <= 2048


def test_values_that_are_nearly_the_same_are_told_apart_as_fp32_does() -> None:
    value = torch.tensor([5.0])
    made = histogram(value, torch.nextafter(value, torch.tensor(6.0)))
    assert made.counts.max() == 1


@settings(deadline=None, max_examples=200)
@given(first=BATCHES, second=BATCHES)
def test_halves_count_like_the_whole(first: Tensor, second: Tensor) -> None:
    whole = histogram(torch.cat([first, second]))
    assert same(histogram(first, second), whole)
    assert same(histogram(second, first), whole)


@settings(deadline=None, max_examples=50)
@given(first=BATCHES, second=BATCHES)
def test_saved_statistics_go_on(first: Tensor, second: Tensor) -> None:
    resumed = Histogram.from_state(histogram(first).state())
    resumed.add(second)
    assert same(resumed, histogram(first, second))


def test_state_is_a_copy() -> None:
    made = histogram(torch.ones(3))
    state = made.state()
    made.add(torch.ones(3))
    assert Histogram.from_state(state).count == 3


def test_empty_statistics_can_be_saved() -> None:
    resumed = Histogram.from_state(Histogram().state())
    resumed.add(torch.ones(3))
    assert same(resumed, histogram(torch.ones(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_values_does_not_matter(dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, -3.0, 0.0, 1.25])
    assert same(histogram(values.to(dtype)), histogram(values))


def test_empty_batch_changes_nothing() -> None:
    assert same(histogram(torch.ones(2), torch.empty(0, 5)), histogram(torch.ones(2)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_refused(value: float) -> None:
    made = histogram(torch.ones(2))
    with pytest.raises(ValueError, match="values hold NaN or infinity"):
        made.add(torch.tensor([7.0, value]))
    assert same(made, histogram(torch.ones(2)))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="values are int64, expected floats"):
        histogram(torch.arange(3))


@pytest.mark.parametrize("change", [{"counts": torch.zeros(5)}, {"more": torch.zeros(1)}])
def test_state_of_something_else_is_refused(change: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="state of a histogram expected"):
        Histogram.from_state({**Histogram().state(), **change})


def test_moving_average() -> None:
    average = MovingAverage(0.75)
    average.add(torch.tensor([-4.0, 8.0]))
    assert (average.low, average.high) == (-4, 8)
    average.add(torch.tensor([[0.0], [4.0]]))
    assert (average.low, average.high) == (-3, 7)
    average.add(torch.empty(0))
    assert (average.low, average.high) == (-3, 7)


@pytest.mark.parametrize("batches", [0, 2])
def test_saved_average_goes_on(batches: int) -> None:
    average = MovingAverage(0.3)
    for seed in range(batches):
        average.add(normal(5, seed=seed))
    resumed = MovingAverage.from_state(average.state())
    for each in (average, resumed):
        each.add(normal(5, seed=9))
    assert (resumed.momentum, resumed.low, resumed.high) == (average.momentum, average.low, average.high)


def test_average_refuses_what_is_not_finite() -> None:
    average = MovingAverage()
    with pytest.raises(ValueError, match="values hold NaN or infinity"):
        average.add(torch.tensor([math.nan]))


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum is"):
        MovingAverage(momentum)


def test_average_refuses_the_state_of_a_histogram() -> None:
    with pytest.raises(ValueError, match="state of a moving average expected"):
        MovingAverage.from_state(Histogram().state())
