"""Which numbers of a weight go: exact counts, the lowest scores, and patterns."""

from __future__ import annotations

import math

import pytest
import torch
from build import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.pruning.select import Pattern, blocks, lowest, mask, n_of_m, rows, shares

SIZES = st.integers(1, 23)
SPARSITIES = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
EXACT = st.integers(0, 64).map(lambda part: part / 64)  # times any size without rounding
UNSTRUCTURED = Pattern("unstructured")


@st.composite
def scores(draw: st.DrawFn, height: int | None = None, width: int | None = None) -> Tensor:
    """[N, K], with many equal numbers among them."""
    sizes = height or draw(SIZES), width or draw(SIZES)
    return normal(*sizes, seed=draw(st.integers(0, 99))).mul(draw(st.sampled_from([1, 3, 1000]))).round()


def is_of_the_lowest(keep: Tensor, values: Tensor) -> bool:
    """Whether nothing that goes is above anything that stays."""
    gone, stay = values[~keep], values[keep]
    return not len(gone) or not len(stay) or bool(gone.max() <= stay.min())


# --- lowest ----------------------------------------------------------------------------------------------------


@given(scores(), SPARSITIES)
def test_lowest_takes_exactly_its_share(values: Tensor, sparsity: float) -> None:
    (keep,) = lowest([values], sparsity)
    assert keep.shape == values.shape
    assert int((~keep).sum()) == round(sparsity * values.numel())


@given(scores(), SPARSITIES)
def test_lowest_takes_the_lowest(values: Tensor, sparsity: float) -> None:
    assert is_of_the_lowest(lowest([values], sparsity)[0], values)


@given(st.lists(scores(), min_size=1, max_size=4), SPARSITIES)
def test_lowest_of_several_weights_has_one_threshold(several: list[Tensor], sparsity: float) -> None:
    keeps = lowest(several, sparsity)
    assert [keep.shape for keep in keeps] == [item.shape for item in several]
    flat, values = torch.cat([keep.flatten() for keep in keeps]), torch.cat([item.flatten() for item in several])
    assert int((~flat).sum()) == round(sparsity * len(flat))
    assert is_of_the_lowest(flat, values)


def test_of_equal_scores_the_first_go() -> None:
    assert lowest([torch.ones(2, 3)], 0.5)[0].tolist() == [[False] * 3, [True] * 3]
    first, second = lowest([torch.ones(2), torch.zeros(1)], 2 / 3)
    assert first.tolist() == [False, True]
    assert second.tolist() == [False]


# --- rows ------------------------------------------------------------------------------------------------------


@given(scores(), EXACT)
def test_rows_take_as_many_in_all_as_lowest(values: Tensor, sparsity: float) -> None:
    assert int((~rows(values, sparsity)).sum()) == int((~lowest([values], sparsity)[0]).sum())


@given(scores(), SPARSITIES)
def test_each_row_loses_its_share_to_one_number(values: Tensor, sparsity: float) -> None:
    gone = (~rows(values, sparsity)).sum(1)
    assert bool(((gone - sparsity * values.shape[1]).abs() <= 1).all())


@given(scores(), SPARSITIES)
def test_each_row_loses_its_lowest(values: Tensor, sparsity: float) -> None:
    keep = rows(values, sparsity)
    assert all(is_of_the_lowest(*pair) for pair in zip(keep, values, strict=True))


def test_of_equal_scores_in_a_row_the_first_go() -> None:
    assert rows(torch.ones(2, 4), 0.25).tolist() == [[False, True, True, True]] * 2


# --- shares ----------------------------------------------------------------------------------------------------


@given(EXACT, st.integers(0, 30), SIZES)
def test_every_sum_of_shares_from_the_front_is_right(sparsity: float, parts: int, size: int) -> None:
    sums = shares(sparsity, parts, size).cumsum(0).tolist()
    assert sums == [round(sparsity * size * count) for count in range(1, parts + 1)]


@given(SPARSITIES, st.integers(1, 30), SIZES)
def test_no_share_is_larger_than_its_part_or_negative(sparsity: float, parts: int, size: int) -> None:
    found = shares(sparsity, parts, size)
    assert int(found.min()) >= 0 and int(found.max()) <= size


def test_shares_alternate_where_they_are_no_whole_numbers() -> None:
    assert shares(0.5, 4, 5).tolist() == [2, 3, 3, 2]  # of 2.5, 5, 7.5 and 10; halves are rounded to even numbers


# --- n:m -------------------------------------------------------------------------------------------------------


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores, and how many are kept of how many neighbours."""
    of = draw(st.integers(2, 8))
    return draw(scores(width=of * draw(st.integers(1, 5)))), draw(st.integers(1, of - 1)), of


@given(groups())
def test_exactly_n_of_every_m_neighbours_stay(drawn: tuple[Tensor, int, int]) -> None:
    values, keep, of = drawn
    found = n_of_m(values, keep, of)
    assert found.shape == values.shape
    assert bool((found.reshape(-1, of).sum(1) == keep).all())


@given(groups())
def test_those_that_stay_are_the_largest_of_their_neighbours(drawn: tuple[Tensor, int, int]) -> None:
    values, keep, of = drawn
    found = n_of_m(values, keep, of)
    pairs = zip(found.reshape(-1, of), values.reshape(-1, of), strict=True)
    assert all(is_of_the_lowest(*pair) for pair in pairs)


def test_two_of_four() -> None:
    values = torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert n_of_m(values, 2, 4).int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1]]  # of equal ones the first go


# --- blocks ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), SPARSITIES, st.data())
def test_blocks_go_as_a_whole_and_exactly_their_share(
    size: int, high: int, wide: int, sparsity: float, data: st.DataObject
) -> None:
    values = data.draw(scores(high * size, wide * size))
    found = blocks(values, sparsity, size).reshape(high, size, wide, size)
    whole = found[:, 0, :, 0]
    assert torch.equal(found, whole[:, None, :, None].expand_as(found))
    assert int((~whole).sum()) == round(sparsity * high * wide)


def test_blocks_with_the_lowest_sums_go() -> None:
    values = torch.tensor([[9.0, 0.0, 3.0, 3.0], [0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 9.0, 9.0]])
    found = blocks(values, 0.5, 2)  # sums 9, 12, 4 and 18
    assert found.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_of_blocks_with_equal_sums_the_first_go() -> None:
    assert blocks(torch.ones(2, 4), 0.5, 2).int().tolist() == [[0, 0, 1, 1]] * 2


# --- patterns --------------------------------------------------------------------------------------------------


def test_mask_is_what_its_pattern_says() -> None:
    values = normal(4, 8)
    assert torch.equal(mask(values, 0.3, UNSTRUCTURED), lowest([values], 0.3)[0])
    assert torch.equal(mask(values, 0.3, UNSTRUCTURED, by_row=True), rows(values, 0.3))
    assert torch.equal(mask(values, 0.5, Pattern("n:m", 1, 4)), n_of_m(values, 1, 4))
    assert torch.equal(mask(values, 0.3, Pattern("blocks", block=2)), blocks(values, 0.3, 2))


@pytest.mark.parametrize(
    ("pattern", "sizes", "reason"),
    [
        (UNSTRUCTURED, (3, 5), None),
        (Pattern("n:m", 2, 4), (3, 8), None),
        (Pattern("n:m", 2, 4), (4, 6), "6 inputs are no multiple of 4"),
        (Pattern("blocks", block=4), (8, 12), None),
        (Pattern("blocks", block=4), (6, 8), "6 x 8 numbers are not made of blocks of 4 x 4"),
        (Pattern("blocks", block=4), (8, 6), "8 x 6 numbers are not made of blocks of 4 x 4"),
    ],
)
def test_misfit_says_why_a_weight_cannot_have_a_pattern(
    pattern: Pattern, sizes: tuple[int, int], reason: str | None
) -> None:
    assert pattern.misfit(*sizes) == reason


@pytest.mark.parametrize("by_row", [False, True])
def test_infinite_scores_are_ordered_too(by_row: bool) -> None:
    values = torch.tensor([[math.inf, 1.0, -math.inf, 2.0]])
    assert mask(values, 0.5, UNSTRUCTURED, by_row).tolist() == [[True, False, False, True]]
