"""Weights on a grid of integers."""

from __future__ import annotations

import math

import pytest
import torch
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.quantization.grid import Clip, Grid, Quantized, find_scale, multiples, nearest, quantize, spread

GRIDS = [Grid(bits, symmetric, group) for bits in (8, 4, 3, 2) for symmetric in (True, False) for group in (None, 16)]


def error(quantized: Quantized, weight: Tensor, importance: float | Tensor = 1.0) -> float:
    return float(((quantized.dequantize() - weight).square() * importance).sum())


def test_symmetric_eight_bits() -> None:
    quantized = nearest(torch.tensor([[-254.0, 1.0, 3.0, 2.0], [0.5, -0.25, 0.0, 0.0]]), Grid())
    # 1 / 2 and 3 / 2 lie half way between two integers: the even one is taken
    assert quantized.integers.tolist() == [[-127, 0, 2, 1], [127, -64, 0, 0]]
    torch.testing.assert_close(quantized.scale, torch.tensor([[2.0], [0.5 / 127]]))
    assert quantized.zero_point is None


def test_four_bits_use_all_sixteen_integers() -> None:
    quantized = nearest(torch.tensor([[-7.5, 7.5, 3.0]]), Grid(4))
    assert quantized.integers.tolist() == [[-8, 7, 3]]
    assert quantized.scale.tolist() == [[1.0]]


def test_asymmetric_range_contains_zero() -> None:
    quantized = nearest(torch.tensor([[255.0, 100.0], [-255.0, -100.0], [-100.0, 155.0]]), Grid(symmetric=False))
    assert quantized.scale.tolist() == [[1.0], [1.0], [1.0]]
    assert quantized.zero_point is not None
    assert quantized.zero_point.tolist() == [[-128], [127], [-28]]
    assert quantized.integers.tolist() == [[127, -28], [-128, 27], [-128, 127]]


def test_last_group_may_be_shorter() -> None:
    weight = torch.tensor([[127.0, 1.0, 254.0, 2.0, 508.0]])
    quantized = nearest(weight, Grid(group=2))
    assert quantized.scale.tolist() == [[1.0, 2.0, 4.0]]
    assert torch.equal(quantized.dequantize(), weight)


@pytest.mark.parametrize("group", [5, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_group_as_long_as_a_row_is_the_row(group: int, symmetric: bool) -> None:
    whole = nearest(normal(3, 5), Grid(symmetric=symmetric))
    grouped = nearest(normal(3, 5), Grid(symmetric=symmetric, group=group))
    assert torch.equal(grouped.dequantize(), whole.dequantize())
    assert grouped.scale.shape == (3, 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_is_at_most_half_a_step(grid: Grid) -> None:
    weight = normal(20, 50)
    quantized = nearest(weight, grid)
    steps = (quantized.dequantize() - weight).abs() / spread(quantized.scale, grid.group, 50)
    assert steps.max() < 0.5 + 1e-4


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dequantizing_undoes_the_rounding_only(grid: Grid) -> None:
    once = nearest(normal(20, 50), grid)
    again = quantize(once.dequantize(), once.scale, once.zero_point, grid)
    assert torch.equal(again.integers, once.integers)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mse_is_no_worse_in_any_row(grid: Grid) -> None:
    weight = normal(20, 50)
    weight[:, 7] *= 4
    for row in weight.split(1):
        assert error(nearest(row, grid, clip="mse"), row) <= error(nearest(row, grid), row)


def test_mse_clips_a_lonely_outlier() -> None:
    weight = normal(1, 1000)
    weight[0, 3] = 6.0
    assert error(nearest(weight, Grid(4), clip="mse"), weight) < 0.8 * error(nearest(weight, Grid(4)), weight)


def test_importance_decides_what_is_clipped() -> None:
    weight = normal(1, 1000)
    weight[0, 3] = 8.0
    importance = torch.ones(1000)
    importance[3] = 1e4
    plain, weighted = (nearest(weight, Grid(3), clip="mse", importance=given) for given in (None, importance))
    assert error(weighted, weight, importance) < error(plain, weight, importance)
    assert error(plain, weight) < error(weighted, weight)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-42], ids=["zero", "subnormal"])
def test_zeros_have_scale_one(value: float, symmetric: bool, clip: Clip) -> None:
    weight = torch.cat([torch.full((1, 6), value), torch.ones(1, 6)], dim=1)
    quantized = nearest(weight, Grid(symmetric=symmetric, group=6), clip=clip)
    assert quantized.scale[0, 0] == 1
    assert quantized.dequantize()[0, :6].tolist() == [0.0] * 6


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("size", [2.0**-120, 2.0**-70, 2.0**70, 2.0**127])
def test_size_of_the_numbers_changes_no_integer(size: float, clip: Clip) -> None:
    weight = normal(4, 30)
    weight /= weight.abs().max()
    expected = nearest(weight, Grid(4), clip=clip)
    quantized = nearest(weight * size, Grid(4), clip=clip)
    assert torch.equal(quantized.integers, expected.integers)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, computed: torch.dtype) -> None:
    weight = normal(4, 30).to(dtype)
    quantized, expected = nearest(weight, Grid(symmetric=False)), nearest(weight.to(computed), Grid(symmetric=False))
    assert quantized.integers.dtype == torch.int8
    assert quantized.dequantize().dtype == computed
    assert torch.equal(quantized.dequantize(), expected.dequantize())


def test_gradients_are_left_behind() -> None:
    quantized = nearest(torch.nn.Parameter(normal(2, 3)), Grid())
    assert not quantized.scale.requires_grad


@settings(deadline=None, max_examples=200)
@given(
    row=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=12),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.none() | st.integers(1, 5),
    clip=st.sampled_from(["minmax", "mse"]),
)
def test_any_row_of_finite_numbers_is_representable(
    row: list[float], bits: int, symmetric: bool, group: int | None, clip: Clip
) -> None:
    grid = Grid(bits, symmetric, group)
    quantized = nearest(torch.tensor([row], dtype=torch.float32), grid, clip=clip)
    smallest, largest = grid.limits
    assert smallest <= quantized.integers.min() <= quantized.integers.max() <= largest
    assert (quantized.scale > 0).all()
    assert quantized.scale.isfinite().all()
    assert quantized.dequantize().isfinite().all()


@settings(deadline=None, max_examples=100)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), value=st.floats(-1e3, 1e3, width=32))
def test_zero_stays_zero(bits: int, symmetric: bool, value: float) -> None:
    assert nearest(torch.tensor([[0.0, value, 1.0]]), Grid(bits, symmetric)).dequantize()[0, 0] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_named(value: float) -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=rf"weight is {value} at \[1, 2\], expected finite numbers"):
        nearest(weight, Grid())


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.zeros(3), r"float32\[3\]"),
        (torch.zeros(3, 0), r"float32\[3, 0\]"),
        (torch.zeros(3, 2, dtype=torch.int8), r"int8\[3, 2\]"),
    ],
)
def test_weight_is_a_float_matrix(weight: Tensor, kind: str) -> None:
    with pytest.raises(ValueError, match=f"weight is {kind}, expected a float matrix"):
        nearest(weight, Grid())


@pytest.mark.parametrize("importance", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan]), torch.ones(3)])
def test_importance_is_one_number_for_each_input(importance: Tensor) -> None:
    with pytest.raises(ValueError, match="importance"):
        find_scale(torch.ones(1, 2), Grid(), clip="mse", importance=importance)


def test_unknown_clip_is_an_error() -> None:
    with pytest.raises(ValueError, match="clip is 'entropy', expected 'minmax' or 'mse'"):
        nearest(torch.ones(1, 2), Grid(), clip="entropy")  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "group"), [(1, None), (9, None), (8, 0)])
def test_grid_that_does_not_exist_is_an_error(bits: int, group: int | None) -> None:
    with pytest.raises(ValueError, match="grid has"):
        Grid(bits, group=group)


# --- float8 ----------------------------------------------------------------------------------------------------


def test_float8_brings_the_largest_of_a_row_to_448() -> None:
    quantized = nearest(torch.tensor([[-224.0, 1.0, 1.1], [0.5, 0.25, 0.0]]), Grid(float8=True))
    assert quantized.integers.dtype is torch.float8_e4m3fn and quantized.zero_point is None
    assert quantized.integers.tolist() == [[-448, 2, 2.25], [448, 224, 0]]
    torch.testing.assert_close(quantized.scale, torch.tensor([[0.5], [0.5 / 448]]))


def test_dequantizing_float8_undoes_the_rounding_only() -> None:
    grid = Grid(float8=True)
    once = nearest(normal(20, 50), grid)
    again = quantize(once.dequantize(), once.scale, once.zero_point, grid)
    assert torch.equal(again.integers.float(), once.integers.float())


def test_float8_keeps_small_numbers_beside_a_large_one() -> None:
    """Of integers with the same scale they would be no more than a few."""
    weight = torch.cat([torch.full((1, 1), 100.0), normal(1, 200)], 1)
    small = weight[:, 1:]
    found, integers = (nearest(weight, Grid(float8=each)).dequantize()[:, 1:] - small for each in (True, False))
    assert found.norm() < 0.25 * integers.norm()


@pytest.mark.parametrize("options", [{"bits": 4}, {"symmetric": False}], ids=str)
def test_float8_has_8_bits_and_no_zero_point(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="grid of float8 has other bits or a zero point"):
        Grid(float8=True, **options)  # type: ignore[arg-type]


# --- nested scales ---------------------------------------------------------------------------------------------


def integers_of_eight(quantized: Quantized, group: int) -> Tensor:
    """What a nested weight's integers stand for, before the row's scale, as the plain sum has it."""
    columns = quantized.integers.shape[1]
    values = quantized.integers.to(torch.int64)
    if quantized.zero_point is not None:
        values = values - spread(quantized.zero_point, group, columns)
    return values * spread(multiples(quantized.scale)[0], group, columns)


@settings(max_examples=60)
@given(
    symmetric=st.booleans(),
    bits=st.integers(2, 4),
    group=st.sampled_from([1, 4, 16, 64]),
    clip=st.sampled_from(["minmax", "mse"]),
    spread_=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_nested_scales_are_multiples_that_fit_in_eight_bits(
    symmetric: bool, bits: int, group: int, clip: Clip, spread_: float, seed: int
) -> None:
    weight = normal(7, 37, seed=seed) * 10 ** (spread_ * normal(7, 37, seed=seed + 1)) + 0.3
    weight[2] = 0
    weight[3, 16:] = 0
    quantized = nearest(weight, Grid(bits, symmetric, group, nested=True), clip=clip)
    steps, rows = multiples(quantized.scale)
    assert steps.dtype is torch.int8 and bool((steps >= 1).all()) and rows.shape == (7, 1)
    torch.testing.assert_close(steps * rows, quantized.scale)
    assert int(integers_of_eight(quantized, group).abs().max()) <= 127
    assert not quantized.dequantize()[2].any()


def test_nested_scales_cost_little() -> None:
    weight = normal(64, 512)
    free, nested = (nearest(weight, Grid(4, False, 32, nested=each), clip="mse") for each in (False, True))
    assert error(free, weight) < error(nested, weight) < 1.05 * error(free, weight)


def test_nested_scales_that_cover_the_range_clip_nothing() -> None:
    weight = normal(20, 64)
    quantized = nearest(weight, Grid(4, True, 16, nested=True), clip="minmax")
    steps = (quantized.dequantize() - weight).abs() / spread(quantized.scale, 16, 64)
    assert steps.max() < 0.5 + 1e-4


def test_importance_chooses_multiples() -> None:
    """With all the weight on the small numbers of a group, its step is as fine as they want it."""
    weight = torch.tensor([[15.0, 0.1, 0.2, 0.3, 3.0, 3.0, 3.0, 3.0]])
    grid = Grid(4, True, 4, nested=True)
    importance = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1])
    small = torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0])
    plain, weighed = (nearest(weight, grid, clip="mse", importance=each) for each in (None, importance))
    assert error(weighed, weight, small) < 0.1 * error(plain, weight, small)


def test_a_row_below_the_smallest_normal_number_is_zero() -> None:
    quantized = nearest(torch.full((1, 8), 1e-38), Grid(4, True, 4, nested=True), clip="mse")
    assert not quantized.dequantize().any() and multiples(quantized.scale)[0].tolist() == [[1, 1]]


def test_scales_that_are_no_multiples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no multiples of one scale of their row"):
        multiples(torch.tensor([[1.0, 2**0.5, 3**0.5]]))


def test_nested_scales_of_eight_bits_are_an_error() -> None:
    with pytest.raises(ValueError, match="nested scales has 8 bits, expected 4 or fewer"):
        Grid(8, nested=True)
