"""Optimal brain surgeon against brute force: least squares for every set of units that could go."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.pruning.surgeon import Reading, eliminate, reading

DAMP = 0.01
SEEDS = range(4)


@dataclass(frozen=True)
class Layer:
    """A layer that reads units, as `reading` is given it: gram [K, K], channels [N, N], units [K]."""

    weight: Tensor
    gram: Tensor
    channels: Tensor
    units: Tensor

    def reading(self, damp: float = DAMP) -> Reading:
        return reading(self.weight, self.gram, self.channels, self.units, damp)

    def loss(self, gone: Iterable[int]) -> float:
        """The weighed squared error of the outputs without some units, when the other columns fit them best."""
        gram = self.gram.double() + DAMP * self.gram.diagonal().mean() * torch.eye(len(self.gram)).double()
        kept = (~torch.isin(self.units, torch.tensor(sorted(gone)))).nonzero().flatten()
        old = self.weight.double()
        new = torch.zeros_like(old)
        new[:, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ old.T).T
        share = self.channels.double() / self.channels.double().trace()
        return float((share @ (new - old) @ gram * (new - old)).sum())


def layer(units: Sequence[int], rows: int = 5, seed: int = 0) -> Layer:
    """Correlated inputs of different sizes; errors of the outputs count differently, and together."""
    count = len(units)
    mix = torch.eye(count) + normal(count, count, seed=seed + 10) / 2
    x = (normal(60, count, seed=seed + 20) @ mix) * torch.linspace(0.5, 2, count)
    derivatives = normal(30, rows, seed=seed + 30) * torch.linspace(0.2, 3, rows)
    weight = normal(rows, count, seed=seed + 40)
    return Layer(weight, x.T @ x, derivatives.T @ derivatives, torch.tensor(units))


ONE_EACH = (0, 1, 2, 3, 4)
SEVERAL = (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
SCATTERED = (3, -1, 0, 2, 1, 0, -1, 4, 2, 3, 1, 4)  # some columns belong to no unit
CASES = {
    "one_column_each": [ONE_EACH],
    "several_columns_each": [SEVERAL],
    "scattered_columns": [SCATTERED],
    "two_readers": [ONE_EACH, SCATTERED],
    "a_reader_of_some": [(0, 1, -1), SEVERAL],
}
UNITS = 5


def layers(case: str, seed: int) -> list[Layer]:
    return [layer(units, seed=seed + place) for place, units in enumerate(CASES[case])]


def true_loss(found: Sequence[Layer], gone: Iterable[int]) -> float:
    gone = list(gone)
    return sum(item.loss(gone) for item in found)


def run(found: Sequence[Layer], together: int = 1, least: int = 0, units: int = UNITS) -> tuple[list[int], Tensor]:
    order, loss = eliminate([item.reading() for item in found], units, together, least)
    return order.tolist(), loss


# --- which units go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_the_first_unit_is_the_one_without_which_least_is_lost(case: str, seed: int) -> None:
    found = layers(case, seed)
    order, _ = run(found)
    assert order[0] == min(range(UNITS), key=lambda unit: true_loss(found, [unit]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_each_further_unit_adds_least_to_those_that_went(case: str, seed: int) -> None:
    found = layers(case, seed)
    order, _ = run(found)
    for place in range(1, UNITS):
        gone, left = order[:place], order[place:]
        assert left[0] == min(left, key=lambda unit: true_loss(found, [*gone, unit]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_least_squares(case: str, seed: int) -> None:
    """Of all units that went together, though they went one by one."""
    found = layers(case, seed)
    order, loss = run(found)
    expected = [true_loss(found, order[:count]) for count in range(UNITS + 1)]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_one_by_one_comes_close_to_the_best_pair() -> None:
    found = layers("several_columns_each", 0)
    order, _ = run(found)
    best = min(true_loss(found, pair) for pair in itertools.combinations(range(UNITS), 2))
    assert true_loss(found, order[:2]) < 1.5 * best


def test_of_two_units_that_do_the_same_one_goes_for_nothing_and_the_other_stays_long() -> None:
    """Large weights alone do not keep it."""
    x = normal(80, 4)
    x = torch.cat([x, x[:, :1]], 1)
    weight = normal(3, 5, seed=1)
    weight[:, [0, 4]] = torch.tensor([[9.0], [9.0], [9.0]])
    twins = Layer(weight, x.T @ x, torch.eye(3), torch.arange(5))
    order, loss = eliminate([twins.reading(1e-6)], 5, 1, 0)
    assert {order[0].item(), order[-1].item()} == {0, 4}
    assert loss[1] < 1e-2 * loss[2]


def test_outputs_that_do_not_reach_the_model_do_not_count() -> None:
    """Of two outputs only the second reaches it, which hardly reads unit 0."""
    weight = torch.tensor([[9.0, 1.0, 1.0], [0.1, 1.0, 2.0]])
    item = Layer(weight, torch.eye(3), torch.diag(torch.tensor([0.0, 1.0])), torch.arange(3))
    assert run([item], units=3)[0] == [0, 1, 2]


def test_outputs_whose_errors_cancel_count_little() -> None:
    """Unit 0 moves both outputs alike, and only their difference counts."""
    weight = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
    item = Layer(weight, torch.eye(2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.arange(2))
    order, loss = run([item], units=2)
    assert order == [0, 1]
    assert loss[1] < 1e-6 < loss[2]


def test_a_factor_of_all_errors_does_not_matter() -> None:
    (item,) = layers("scattered_columns", 0)
    louder = Layer(item.weight, item.gram, item.channels * 1000, item.units)
    assert torch.equal(run([item])[1], run([louder])[1])


def test_a_unit_that_no_layer_reads_goes_first_for_nothing() -> None:
    order, loss = run([layer((0, 1, 3, 4, -1)), layer((4, 3, 1, 0), seed=1)])
    assert order[0] == 2 and loss[1] == 0


# --- several at a time, and those that stay --------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_of_units_that_go_together_is_the_one_that_costs_least(seed: int) -> None:
    found = layers("two_readers", seed)
    order, _ = run(found, together=2)
    assert order[0] == min(range(UNITS), key=lambda unit: true_loss(found, [unit]))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_of_units_that_go_together_is_that_of_least_squares(seed: int) -> None:
    found = layers("two_readers", seed)
    order, loss = run(found, together=2)
    for count in (2, 4, 5):
        assert float(loss[count]) == pytest.approx(true_loss(found, order[:count]), rel=1e-4)


def test_units_that_go_together_are_those_that_would_go_one_by_one() -> None:
    one, two = run(layers("two_readers", 0), together=1), run(layers("two_readers", 0), together=2)
    assert one[0] == two[0]
    torch.testing.assert_close(one[1][:-1], two[1][:-1])


@pytest.mark.parametrize(("together", "least"), [(1, 1), (1, 3), (2, 2), (4, 2), (9, 4), (1, 5), (3, 5)])
def test_units_that_have_to_stay_come_last_at_a_higher_loss(together: int, least: int) -> None:
    found = layers("two_readers", 0)
    order, loss = run(found, together, least)
    assert sorted(order) == list(range(UNITS)) and len(loss) == UNITS + 1
    assert order[UNITS - least :] == sorted(order[UNITS - least :])
    assert bool((loss[UNITS - least + 1 :] > loss[UNITS - least]).all())


@pytest.mark.parametrize("together", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_starts_at_nothing_and_never_sinks(case: str, together: int) -> None:
    _, loss = run(layers(case, 1), together)
    assert loss[0] == 0
    assert bool((loss.diff() >= 0).all())


# --- numbers at the edge ---------------------------------------------------------------------------------------


def test_units_that_are_always_zero_go_first() -> None:
    item = layer(SEVERAL)
    item.gram[4:6], item.gram[:, 4:6] = 0, 0
    order, loss = run([item])
    assert order[0] == 2
    assert float(loss[1]) < 0.1 * float(loss[2])  # what damping makes of it


@pytest.mark.parametrize("dead", ["gram", "channels"])
def test_layers_that_read_nothing_or_reach_nothing_cost_nothing(dead: str) -> None:
    item = layer(SEVERAL)
    getattr(item, dead).zero_()
    order, loss = eliminate([item.reading()], UNITS, 1, 0)
    assert sorted(order.tolist()) == list(range(UNITS))
    assert bool((loss.abs() < 1e-6).all())


def test_fewer_tokens_than_columns() -> None:
    """Damping makes the sums invertible."""
    x = normal(2, 10)
    item = Layer(normal(5, 10, seed=1), x.T @ x, torch.eye(5), torch.tensor(SEVERAL))
    order, loss = run([item])
    assert order[0] == min(range(UNITS), key=lambda unit: item.loss([unit]))
    assert bool(loss.isfinite().all())


def test_the_weight_given_is_not_changed() -> None:
    item = layer(SEVERAL)
    weight, gram = item.weight.clone(), item.gram.clone()
    run([item])
    assert torch.equal(item.weight, weight) and torch.equal(item.gram, gram)


def test_no_units_at_all() -> None:
    order, loss = eliminate([], 0, 1, 0)
    assert order.tolist() == [] and loss.tolist() == [0.0]
