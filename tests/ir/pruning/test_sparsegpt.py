"""SparseGPT against least squares, which is the best that any weight with the same zeros can do."""

from __future__ import annotations

import pytest
import torch
from build import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.calibration.sweep import output_error
from fxpress.ir.pruning.select import Pattern, lowest, n_of_m
from fxpress.ir.pruning.sparsegpt import refit, sparsegpt

ROWS, COLUMNS = 8, 24
UNSTRUCTURED = Pattern("unstructured")
SEEDS = range(4)


def correlated(columns: int, seed: int = 0) -> Tensor:
    """The gram matrix of inputs of different sizes, of which some are much alike (0.8, 0.64, ... in some order)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(columns, generator=generator, dtype=torch.float64) / 2).exp()
    place = torch.randperm(columns, generator=generator)
    return 0.8 ** (place[:, None] - place).abs() * sizes[:, None] * sizes * 100


def weight(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return normal(rows, columns, dtype=torch.float64, seed=100 + seed)


def best(values: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """The weight with these zeros whose outputs are the closest, row by row: min |x w^T - x_kept v^T|^2."""
    result = torch.zeros_like(values)
    for row, (old, kept) in enumerate(zip(values, keep, strict=True)):
        places = kept.nonzero().flatten()
        result[row, places] = torch.linalg.solve(gram[places][:, places], gram[places] @ old)
    return result


def error(new: Tensor, old: Tensor, gram: Tensor) -> float:
    return float(output_error(new - old, gram).sum())


# --- how many zeros, and where ---------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 21), st.integers(1, 24), st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
def test_zeros_are_exactly_the_share(rows: int, columns: int, block: int, sparsity: float) -> None:
    """Of blocks that do not divide the columns, too."""
    values, keep = sparsegpt(weight(rows, columns), correlated(columns), sparsity, UNSTRUCTURED, block=block)
    assert int((~keep).sum()) == round(sparsity * rows * columns)
    assert torch.equal(values != 0, keep)


def test_nothing_goes_at_sparsity_zero() -> None:
    values, _ = sparsegpt(weight(), correlated(COLUMNS), 0.0, UNSTRUCTURED)
    assert torch.equal(values, weight())


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8), (2, 3)])
def test_n_of_m_neighbours_stay(keep: int, of: int) -> None:
    values, mask = sparsegpt(weight(), correlated(COLUMNS), 1 - keep / of, Pattern("n:m", keep, of))
    assert bool((mask.reshape(-1, of).sum(1) == keep).all())
    assert torch.equal(values != 0, mask)


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.5, 2), (0.3, 1), (0.9, 4)])
def test_of_each_column_of_blocks_the_share_goes(sparsity: float, zeros: int) -> None:
    values, mask = sparsegpt(weight(), correlated(COLUMNS), sparsity, Pattern("blocks", block=2))
    whole = mask.reshape(ROWS // 2, 2, COLUMNS // 2, 2)
    assert torch.equal(whole, whole[:, :1, :, :1].expand_as(whole))
    assert bool(((~whole[:, 0, :, 0]).sum(0) == zeros).all())
    assert torch.equal(values != 0, mask)


def test_inputs_that_are_always_zero_are_chosen_first() -> None:
    gram, dead = correlated(COLUMNS), [3, 11, 12]
    gram[dead], gram[:, dead] = 0, 0
    values = weight()
    values[:, dead] *= 1000
    _, keep = sparsegpt(values, gram, len(dead) / COLUMNS, UNSTRUCTURED)
    assert (~keep).any(0).nonzero().flatten().tolist() == dead


def test_inputs_that_are_always_zero_are_chosen_first_of_their_neighbours() -> None:
    gram = correlated(COLUMNS)
    gram[5], gram[:, 5] = 0, 0
    _, keep = sparsegpt(weight(), gram, 0.25, Pattern("n:m", 3, 4))
    assert not keep[:, 5].any()


def test_of_inputs_that_do_not_depend_on_each_other_the_smallest_products_go_and_nothing_moves() -> None:
    """That is what Wanda takes, of all rows together."""
    values, power = weight(), torch.linspace(0.1, 9, COLUMNS).double()
    found, keep = sparsegpt(values, torch.diag(power), 0.5, UNSTRUCTURED, damp=0)
    assert torch.equal(keep, lowest([values.abs() * power.sqrt()], 0.5)[0])
    assert torch.equal(found, torch.where(keep, values, 0))


# --- how close the outputs are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("block", [4, 128])
def test_error_lies_between_least_squares_and_magnitude(block: int, sparsity: float, seed: int) -> None:
    """At most 2.5 times that of the best weight with the same zeros, at most 3 / 4 of magnitude's."""
    old, gram = weight(seed=seed), correlated(COLUMNS, seed)
    found, keep = sparsegpt(old, gram, sparsity, UNSTRUCTURED, block=block)
    optimum = error(best(old, gram, keep), old, gram)
    smallest = torch.where(lowest([old.abs()], sparsity)[0], old, 0)
    assert optimum <= error(found, old, gram) < 2.5 * optimum
    assert error(found, old, gram) < 0.75 * error(smallest, old, gram)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8)])
def test_error_with_n_of_m_lies_between_least_squares_and_magnitude(keep: int, of: int, seed: int) -> None:
    old, gram = weight(seed=seed), correlated(COLUMNS, seed)
    found, mask = sparsegpt(old, gram, 1 - keep / of, Pattern("n:m", keep, of))
    optimum = error(best(old, gram, mask), old, gram)
    smallest = torch.where(n_of_m(old.abs(), keep, of), old, 0)
    assert optimum <= error(found, old, gram) < 2.5 * optimum
    assert error(found, old, gram) < 0.75 * error(smallest, old, gram)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_error_of_a_given_mask_lies_between_least_squares_and_zeros_alone(sparsity: float, seed: int) -> None:
    old, gram = weight(seed=seed), correlated(COLUMNS, seed)
    keep = lowest([old.abs()], sparsity)[0]
    optimum = error(best(old, gram, keep), old, gram)
    found = error(refit(old, gram, keep), old, gram)
    assert optimum <= found < 2.5 * optimum
    assert found < 0.95 * error(torch.where(keep, old, 0), old, gram)


# --- a given mask ----------------------------------------------------------------------------------------------


def test_zeros_of_a_given_mask_are_exact() -> None:
    keep = normal(ROWS, COLUMNS) > 0
    assert torch.equal(refit(weight(), correlated(COLUMNS), keep) != 0, keep)


@pytest.mark.parametrize("block", [1, 5, 128])
def test_zeros_before_all_that_stays_are_made_up_for_as_least_squares_would(block: int) -> None:
    """In each row another number of them."""
    keep = torch.arange(COLUMNS) >= torch.arange(ROWS)[:, None]
    old, gram = weight(), correlated(COLUMNS)
    torch.testing.assert_close(refit(old, gram, keep, damp=0, block=block), best(old, gram, keep))


def test_zeros_in_the_last_column_come_too_late_to_be_made_up_for() -> None:
    keep = torch.arange(COLUMNS).expand(ROWS, -1) < COLUMNS - 1
    assert torch.equal(refit(weight(), correlated(COLUMNS), keep), torch.where(keep, weight(), 0))


@pytest.mark.parametrize("block", [5, 128])
def test_the_mask_that_was_chosen_gives_the_same_weight_again(block: int) -> None:
    found, keep = sparsegpt(weight(), correlated(COLUMNS), 0.5, UNSTRUCTURED, block=block)
    assert torch.equal(refit(weight(), correlated(COLUMNS), keep, block=block), found)


@pytest.mark.parametrize("block", [1, 5, 24])
def test_size_of_the_blocks_does_not_matter_to_a_given_mask(block: int) -> None:
    keep = normal(ROWS, COLUMNS) > 0
    once = refit(weight(), correlated(COLUMNS), keep)
    torch.testing.assert_close(refit(weight(), correlated(COLUMNS), keep, block=block), once)


# --- types and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    old, gram = weight().to(dtype), correlated(COLUMNS)
    found, keep = sparsegpt(old, gram, 0.5, UNSTRUCTURED)
    expected, same = sparsegpt(old.float(), gram, 0.5, UNSTRUCTURED)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected) and torch.equal(keep, same)
    assert refit(old, gram, keep).dtype == torch.float32


def test_the_weight_given_is_not_changed() -> None:
    old = weight()
    sparsegpt(old, correlated(COLUMNS), 0.5, UNSTRUCTURED)
    refit(old, correlated(COLUMNS), normal(ROWS, COLUMNS) > 0)
    assert torch.equal(old, weight())


def test_gram_matrix_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gram is \[3, 3\], expected \[4, 4\]"):
        sparsegpt(weight(2, 4), torch.eye(3), 0.5, UNSTRUCTURED)
    with pytest.raises(ValueError, match=r"gram is \[3, 3\], expected \[4, 4\]"):
        refit(weight(2, 4), torch.eye(3), torch.ones(2, 4).bool())
