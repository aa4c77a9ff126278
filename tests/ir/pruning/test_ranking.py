"""Rankings of units by each method, against sums and derivatives written out; how many go, and which in the end."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.pruning import ranking as ranking_module
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.costs import unit_macs
from fxpress.ir.pruning.ranking import Ranking, by_worth, chosen, counts_by_loss, counts_by_share, grams, rank
from fxpress.ir.pruning.units import ROUND, Family, families
from fxpress.ir.rewrite import untracked

HEADS, SIZE, INNER = 4, 2, 20
WIDTH = HEADS * SIZE
X = normal(2, 5, WIDTH)
BATCHES = [[normal(3, 5, WIDTH, seed=seed)] for seed in (1, 2)]
WEIGHTS = {
    **{name: normal(WIDTH, WIDTH, seed=seed) / 2 for seed, name in enumerate("qkvo")},
    "u": normal(INNER, WIDTH, seed=5),
    "b": normal(INNER, seed=6),
    "d": normal(WIDTH, INNER, seed=7) / 3,
    "e": normal(3, INNER, seed=8),
}


def heads_of(m: Any, x: Tensor, name: str) -> Tensor:
    return F.linear(x, getattr(m, name)).view(x.shape[0], x.shape[1], HEADS, SIZE).transpose(1, 2)


def mixed(m: Any, x: Tensor) -> Tensor:
    """What the layer reads that reads heads."""
    y = torch.ops.fxpress.attention(heads_of(m, x, "q"), heads_of(m, x, "k"), heads_of(m, x, "v"))
    return y.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def forward(m: Any, x: Tensor, head: Tensor | None = None, neuron: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """4 heads, and 20 neurons that two layers read; with a mask of each for derivatives."""
    y = mixed(m, x)
    x = x + F.linear(y if head is None else y * head.repeat_interleave(SIZE), m.o)
    h = torch.tanh(F.linear(x, m.u, m.b))
    h = h if neuron is None else h * neuron
    return x + F.linear(h, m.d), F.linear(h, m.e)


@functools.cache
def traced() -> Program:
    """Not to be changed."""
    return program(lambda m, x: forward(m, x), X, **WEIGHTS)


@functools.cache
def found() -> list[Family]:
    return families(follow(traced()))[0]


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return (outputs[0] - 1).square().mean() + outputs[1].square().mean()


def ranked(method: str, seed: int = 0) -> list[Ranking]:
    wanted = loss if method in ("fisher", "movement") else None
    return rank(traced(), found(), method, BATCHES, wanted, untracked, seed)


def worths(ranking: Ranking) -> Tensor:
    """By unit."""
    result = torch.empty(len(ranking.order))
    result[ranking.order] = ranking.loss.diff()
    return result


class Weights:
    def __init__(self) -> None:
        self.__dict__.update(WEIGHTS)


def by_head(columns: Tensor) -> Tensor:
    return columns.view(HEADS, SIZE).sum(1)


# --- worth -----------------------------------------------------------------------------------------------------


def test_units_go_by_their_worth_and_losses_add_up() -> None:
    ranking = by_worth(torch.tensor([3.0, 1.0, 2.0]))
    assert ranking.order.tolist() == [1, 2, 0]
    assert ranking.loss.tolist() == [0, 1, 3, 6]


def test_of_units_worth_the_same_the_first_go() -> None:
    assert by_worth(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])).order.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt", "fisher", "movement"])
def test_every_method_orders_all_units(method: str) -> None:
    for family, ranking in zip(found(), ranked(method), strict=True):
        size = len(family.channels)
        assert sorted(ranking.order.tolist()) == list(range(size))
        assert len(ranking.loss) == size + 1 and ranking.loss[0] == 0


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt", "fisher", "movement"])
def test_the_same_again(method: str) -> None:
    for first, second in zip(ranked(method), ranked(method), strict=True):
        assert torch.equal(first.order, second.order) and torch.equal(first.loss, second.loss)


def test_another_seed_gives_another_random_order() -> None:
    assert not torch.equal(ranked("random", 0)[1].order, ranked("random", 1)[1].order)


def test_magnitude_is_the_squares_of_what_reads_a_unit() -> None:
    heads, neurons = map(worths, ranked("magnitude"))
    torch.testing.assert_close(heads, by_head(WEIGHTS["o"].square().sum(0)))
    torch.testing.assert_close(neurons, WEIGHTS["d"].square().sum(0) + WEIGHTS["e"].square().sum(0))


def test_wanda_weighs_them_by_what_is_read() -> None:
    heads, neurons = map(worths, ranked("wanda"))
    x = torch.cat([batch[0] for batch in BATCHES])
    y = mixed(Weights(), x)
    torch.testing.assert_close(heads, by_head((y.square().sum((0, 1)) * WEIGHTS["o"].square()).sum(0)))
    h = torch.tanh(F.linear(x + F.linear(y, WEIGHTS["o"]), WEIGHTS["u"], WEIGHTS["b"]))
    both = WEIGHTS["d"].square().sum(0) + WEIGHTS["e"].square().sum(0)
    torch.testing.assert_close(neurons, h.square().sum((0, 1)) * both)


@functools.cache
def derivatives() -> list[tuple[Tensor, ...]]:
    """Of the loss on each batch by a mask of heads and one of neurons, by autograd."""
    result = []
    for (x,) in BATCHES:
        masks = torch.ones(HEADS, requires_grad=True), torch.ones(INNER, requires_grad=True)
        result.append(torch.autograd.grad(loss(forward(Weights(), x, *masks)), masks))
    return result


def test_fisher_is_the_squares_of_derivatives_by_masks() -> None:
    for place, ranking in enumerate(ranked("fisher")):
        slopes = torch.stack([batch[place] for batch in derivatives()])
        assert ranking.joint is not None
        torch.testing.assert_close(ranking.joint, slopes.T @ slopes, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(worths(ranking), slopes.square().sum(0), rtol=1e-3, atol=1e-5)


def test_movement_is_what_the_loss_would_have_to_pay_for_a_smaller_mask() -> None:
    """The first to go are those that the loss would shrink the most."""
    for place, ranking in enumerate(ranked("movement")):
        slopes = torch.stack([batch[place] for batch in derivatives()])
        torch.testing.assert_close(worths(ranking), -slopes.sum(0), rtol=1e-3, atol=1e-5)


def test_sparsegpt_takes_what_others_can_do_first() -> None:
    """The last head gives what the third gives, and what both give is the largest."""
    given = {name: WEIGHTS[name].clone() for name in "qkvo"}
    for name in "qkv":
        given[name][-SIZE:] = given[name][-2 * SIZE : -SIZE]
    given["o"][:, -2 * SIZE :] *= 3
    alone = program(lambda m, x: F.linear(mixed(m, x), m.o), X, **given)
    family = families(follow(alone))[0]
    (fitting,) = rank(alone, family, "sparsegpt", BATCHES, None, untracked, 0)
    (smallest,) = rank(alone, family, "magnitude", [], None, untracked, 0)
    assert fitting.order[0] in (2, 3) and fitting.order[-1] in (2, 3)
    assert smallest.order[0] in (0, 1)


def test_sparsegpt_multiplies_so_many_batches_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ranking_module, "_RANKED", 2)
    monkeypatch.setattr(ranking_module, "grams", lambda *given: seen.append(given) or grams(*given))
    batches = [[normal(2, 5, WIDTH, seed=seed)] for seed in range(5)]
    reaches = ranking_module.reader_reaches(traced(), found(), batches, None, untracked)
    rank(traced(), found(), "sparsegpt", batches, None, untracked, 0, reaches)
    _, _, looked_at, _, weights = seen[0]
    assert [batch[0] is batches[place][0] for batch, place in zip(looked_at, (0, 3), strict=True)] == [True, True]
    for node, reach in reaches.items():
        assert all(a is b for a, b in zip(weights[node].tokens, (reach.tokens[0], reach.tokens[3]), strict=True))


@pytest.mark.parametrize("method", ["sparsegpt", "fisher"])
def test_without_a_loss_what_the_outputs_do_not_depend_on_goes_first(method: str) -> None:
    """Of 4 heads the second is multiplied with zeros behind the layer that reads it."""
    gate = torch.ones(WIDTH)
    gate[:SIZE] = 0

    def gated(m: Any, x: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(mixed(m, x), m.o) * m.gate)

    o = torch.eye(WIDTH).roll(-SIZE, 0) * 9  # the second head makes the first outputs
    alone = program(gated, X, **{name: WEIGHTS[name] for name in "qkv"}, o=o, gate=gate)
    (found,) = rank(alone, families(follow(alone))[0], method, BATCHES, None, untracked, 0)
    assert found.order[0] == 1
    assert found.loss[1] < 1e-3 * found.loss[2]


def test_losses_of_families_can_be_compared_by_how_far_they_reach() -> None:
    """Two blocks that do the same, but what one gives is divided by 100."""

    def parallel(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, m.u)), m.d) / 100 + F.linear(torch.tanh(F.linear(x, m.w)), m.e)

    u, d = WEIGHTS["u"], WEIGHTS["d"]
    alone = program(parallel, X, u=u, d=d, w=u + 0, e=d + 0)
    near, far = rank(alone, families(follow(alone))[0], "sparsegpt", BATCHES, None, untracked, 0)
    ratio = near.loss[1 : INNER - ROUND] / far.loss[1 : INNER - ROUND]
    assert bool((ratio < 0.05).all())


def test_grams_are_of_what_each_reader_reads() -> None:
    result = {
        str(node.args[1].target): total for node, total in grams(traced(), found(), BATCHES, untracked, None).items()
    }  # type: ignore[union-attr]
    y = mixed(Weights(), torch.cat([batch[0] for batch in BATCHES])).reshape(-1, WIDTH)
    assert list(result) == ["o", "d", "e"]
    torch.testing.assert_close(result["o"], y.T @ y)
    torch.testing.assert_close(result["d"], result["e"])


# --- how many of each family -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "stay"),
    [(0.0, [4, 20]), (0.25, [3, 16]), (0.5, [2, 8]), (0.4, [2, 16]), (0.75, [1, 8]), (1.0, [1, 8])],
)
def test_by_share_each_family_loses_the_same_part(sparsity: float, stay: list[int]) -> None:
    assert counts_by_share(found(), sparsity) == stay


def random_rankings(seed: int) -> list[Ranking]:
    generator = torch.Generator().manual_seed(seed)
    return [by_worth(torch.rand(len(family.channels), generator=generator)) for family in found()]


@functools.cache
def costs() -> list[float]:
    channels = follow(traced())
    return [unit_macs(traced(), channels, family) for family in found()]


def stay_by_loss(rankings: list[Ranking], sparsity: float) -> list[int]:
    return counts_by_loss(traced(), follow(traced()), found(), rankings, sparsity)


def removed_macs(stay: Sequence[int]) -> float:
    sizes = [len(family.channels) for family in found()]
    return sum(cost * (size - count) for cost, size, count in zip(costs(), sizes, stay, strict=True))


def next_steps(stay: Sequence[int]) -> list[float]:
    """Multiplications of the next units of each family that has some to lose."""
    result = []
    for family, cost, count in zip(found(), costs(), stay, strict=True):
        fewer = [n for n in range(count) if n >= family.least and family.rounded(n) == n]
        if fewer:
            result.append(cost * (count - max(fewer)))
    return result


@settings(max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
def test_by_loss_the_budget_of_multiplications_is_met(seed: int, sparsity: float) -> None:
    """Never more goes than was asked for, and not a step of any family less."""
    stay = stay_by_loss(random_rankings(seed), sparsity)
    budget = sparsity * sum(cost * len(family.channels) for cost, family in zip(costs(), found(), strict=True))
    assert removed_macs(stay) <= budget * (1 + 1e-6)
    assert all(removed_macs(stay) + step > budget * (1 - 1e-6) for step in next_steps(stay))


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_by_loss_families_keep_a_number_of_units_that_may_stay(seed: int, sparsity: float) -> None:
    for family, count in zip(found(), stay_by_loss(random_rankings(seed), sparsity), strict=True):
        assert count == family.rounded(count) >= family.least


def test_by_loss_a_family_loses_more_if_it_matters_less() -> None:
    cheap, dear = ([by_worth(torch.full((len(family.channels),), worth)) for family in found()] for worth in (1e-6, 1))
    few_heads, all_neurons = stay_by_loss([cheap[0], dear[1]], 0.3)
    all_heads, few_neurons = stay_by_loss([dear[0], cheap[1]], 0.3)
    assert few_heads < all_heads
    assert few_neurons < all_neurons


def test_a_unit_that_costs_more_multiplications_goes_before_one_that_loses_as_much() -> None:
    same = [by_worth(torch.ones(len(family.channels))) for family in found()]
    assert costs()[0] > costs()[1]
    assert stay_by_loss(same, costs()[0] / (costs()[0] * HEADS + costs()[1] * INNER)) == [HEADS - 1, INNER]


# --- which units in the end ------------------------------------------------------------------------------------


def joint_loss(joint: Tensor, keep: Tensor) -> float:
    gone = (~keep).float()
    return float(gone @ joint @ gone)


def random_joint(size: int, rank: int, seed: int) -> Tensor:
    slopes = normal(rank, size, seed=seed)
    return slopes.T @ slopes


@given(st.integers(0, 6), st.integers(0, 50))
def test_the_first_of_the_order_go(stay: int, seed: int) -> None:
    ranking = by_worth(normal(6, seed=seed))
    keep = chosen(ranking, stay)
    assert keep[ranking.order].tolist() == [False] * (6 - stay) + [True] * stay


@given(st.integers(0, 7), st.integers(1, 10), st.integers(0, 50))
def test_no_exchange_of_two_units_would_lose_less(stay: int, rank: int, seed: int) -> None:
    joint = random_joint(7, rank, seed)
    keep = chosen(by_worth(joint.diagonal().clone(), joint), stay)
    assert int(keep.sum()) == stay
    for comes, goes in itertools.product(range(7), repeat=2):
        if keep[goes] and not keep[comes]:
            other = keep.clone()
            other[comes], other[goes] = True, False
            assert joint_loss(joint, keep) <= joint_loss(joint, other) + 1e-4


@pytest.mark.parametrize("stay", range(1, 6))
def test_rearranging_comes_close_to_the_best_of_all_choices(stay: int) -> None:
    """Over 50 families: the mean loss is at most a tenth above the smallest there is, and below that of the order."""
    best = found = plain = 0.0
    for seed in range(50):
        joint = random_joint(6, 4, seed)
        ranking = by_worth(joint.diagonal().clone(), joint)
        every = [
            torch.ones(6, dtype=torch.bool).index_fill(0, torch.tensor(gone), False)
            for gone in itertools.combinations(range(6), 6 - stay)
        ]
        best += min(joint_loss(joint, keep) for keep in every)
        found += joint_loss(joint, chosen(ranking, stay))
        plain += joint_loss(joint, chosen(by_worth(joint.diagonal().clone()), stay))
    assert best <= found + 1e-3 and found < 1.1 * best + 1e-3
    assert found < plain or stay == 5


def test_of_two_units_that_do_the_same_one_stays() -> None:
    """Each is worth little beside the other, so that both would go first."""
    slopes = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.2, 0.0], [0.0, 0.0, 0.0, 1.3]])
    joint = slopes.T @ slopes
    keep = chosen(by_worth(joint.diagonal().clone(), joint), 2)
    assert int(keep[:2].sum()) == 1 and not keep[2]
