"""Columns that make up for the errors of those before."""

from __future__ import annotations

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.calibration.sweep import inverse_factor, output_error, sweep


def correlated(columns: int, seed: int = 0) -> Tensor:
    """The gram matrix of inputs that depend on each other."""
    inputs = normal(4 * columns, columns, dtype=torch.float64, seed=seed) @ normal(columns, columns, seed=seed).double()
    return inputs.T @ inputs


def test_nothing_projected_changes_nothing() -> None:
    weight = normal(5, 20)
    assert torch.equal(sweep(weight, correlated(20), lambda column, index: column, block=6), weight)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_later_columns_make_up_for_the_first_as_least_squares_would(block: int) -> None:
    weight, gram = normal(5, 8, dtype=torch.float64), correlated(8)
    found = sweep(weight, gram, lambda column, index: column * (index > 0), damp=0, block=block)
    # minimise |x W^T - x_rest V^T|^2: V = W gram[:, rest] gram[rest, rest]^-1
    best = weight @ gram[:, 1:] @ torch.linalg.inv(gram[1:, 1:])
    torch.testing.assert_close(found, torch.cat([torch.zeros(5, 1).double(), best], 1))


def test_cost_of_a_replacement_is_its_square_over_the_pivots() -> None:
    weight, gram = normal(5, 8, dtype=torch.float64), correlated(8)
    pivots = []
    found = sweep(
        weight,
        gram,
        lambda column, index: column * (index > 0),
        enter=lambda columns, pivot, index: pivots.append(pivot),
        damp=0,
    )
    torch.testing.assert_close(output_error(found - weight, gram), (weight[:, 0] / pivots[0][0]).square())


@pytest.mark.parametrize("block", [1, 7, 64])
def test_size_of_the_blocks_does_not_matter(block: int) -> None:
    weight, gram = normal(5, 20, dtype=torch.float64), correlated(20)
    one = sweep(weight, gram, lambda column, index: column.round(), block=20)
    torch.testing.assert_close(sweep(weight, gram, lambda column, index: column.round(), block=block), one)


def test_order_is_that_of_the_visits_and_not_of_the_result() -> None:
    weight, gram = normal(5, 6, dtype=torch.float64), correlated(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    seen: list[int] = []

    def project(column: Tensor, index: int) -> Tensor:
        seen.append(index)
        return column.round()

    entered: list[int] = []
    found = sweep(weight, gram, project, order=order, block=4, enter=lambda c, p, index: entered.extend(index.tolist()))
    assert seen == entered == order.tolist()
    permuted = sweep(weight[:, order], gram[order][:, order], lambda column, index: column.round())
    assert torch.equal(found[:, order], permuted)


def test_block_is_shown_as_the_errors_before_have_left_it() -> None:
    weight, gram = normal(5, 4, dtype=torch.float64), correlated(4)
    shown: list[Tensor] = []
    found = sweep(
        weight,
        gram,
        lambda column, index: column * (index > 0),
        enter=lambda columns, pivots, index: shown.append(columns.clone()),
        block=1,
    )
    assert torch.equal(shown[0], weight[:, :1])
    assert torch.equal(torch.cat(shown[1:], 1), found[:, 1:])  # they are kept as they are


def test_input_that_is_always_zero_influences_nothing() -> None:
    weight, gram = normal(5, 6, dtype=torch.float64), correlated(6)
    gram[2] = gram[:, 2] = 0
    live = torch.tensor([0, 1, 3, 4, 5])
    found = sweep(weight, gram, lambda column, index: column.round())
    assert torch.equal(found[:, 2], weight[:, 2].round())
    without = sweep(weight[:, live], gram[live][:, live], lambda column, index: column.round())
    assert torch.equal(found[:, live], without)


def test_no_inputs_at_all_is_plain_projection() -> None:
    weight = normal(3, 4)
    assert torch.equal(sweep(weight, torch.zeros(4, 4), lambda column, index: column.round()), weight.round())


def test_factor_is_of_the_inverse() -> None:
    gram = correlated(6)
    factor = inverse_factor(gram, 0)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(gram))
    assert torch.equal(factor, factor.triu())


def test_damping_grows_until_the_factor_exists() -> None:
    gram = torch.full((4, 4), 1.0) - 0.05 * torch.eye(4)  # its smallest eigenvalue is -0.05
    assert torch.equal(inverse_factor(gram, 0.01), inverse_factor(gram, 0.1))


@pytest.mark.parametrize(
    ("gram", "problem"),
    [
        (torch.eye(3), r"gram is \[3, 3\], expected \[4, 4\]"),
        (torch.eye(4) * torch.nan, "gram has NaN or infinity"),
        (-torch.eye(4), "its diagonal has negative numbers"),
        (torch.eye(4) - 5, "gram is not positive semidefinite"),
        (torch.ones(4, 4) * 5 - 4 * torch.eye(4), "Cholesky fails with damping"),
    ],
)
def test_matrix_that_is_no_gram_matrix_is_an_error(gram: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        sweep(normal(2, 4), gram, lambda column, index: column)
