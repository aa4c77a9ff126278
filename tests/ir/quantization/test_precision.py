"""The search for the layers that must be finer: a synthetic model of which exactly one layer is sensitive."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor

from fxpress.ir.calibration.lockstep import Lockstep
from fxpress.ir.calibration.target import Target, cosines
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.quantization.choice import UNTOUCHED, Choice
from fxpress.ir.quantization.grid import Grid
from fxpress.ir.quantization.options import Data, Way, options
from fxpress.ir.quantization.precision import Search, applied, closest, cost, run, search
from fxpress.ir.quantization.sites import Site, least, linear_sites
from fxpress.ir.rewrite import untracked

WIDTH = 16
Batches = Sequence[Sequence[Tensor]]


def forward(m: Any, x: Tensor) -> Tensor:
    """Three layers; in what the second reads, one channel is 500 times as large as the others."""
    hidden = F.linear(x, m.a).tanh()
    scales = torch.ones_like(hidden[:, :1]) * (1 + 500 * (torch.arange(WIDTH) == 3).to(x.dtype))
    hidden = (F.linear(hidden * scales, m.b) * 0.02).tanh() + hidden
    return F.linear(hidden, m.c)


def weight(seed: int) -> Tensor:
    found = normal(WIDTH, WIDTH, seed=seed) / 4
    if seed == 1:
        found[:, 3] *= 1e-3  # what reads the outlier hardly matters: the others, rounded to zero beside it, do
    return found


@functools.cache
def model() -> tuple[Program, list[Site]]:
    traced = program(forward, normal(2, WIDTH), a=weight(0), b=weight(1) * 30, c=weight(2))
    return traced, linear_sites(traced, ())[0]


BATCHES = [[normal(40, WIDTH, seed=seed)] for seed in range(3)]


@functools.cache
def found() -> Mapping[Site, Sequence[Choice]]:
    """Of each site the activation in one range, and floats."""
    traced, sites = model()
    lockstep = Lockstep(traced, BATCHES)
    made: dict[Site, list[Choice]] = {}

    def choose(site: Site) -> Choice:
        weights = [traced.tensor(linear.args[1]).detach() for linear in site.linears]  # type: ignore[arg-type]
        data = Data(lockstep.rows(site.source))
        made[site] = [*options(Way("tensor", Grid()), weights, least(site.source), data), UNTOUCHED]
        return UNTOUCHED

    lockstep.run(applied(traced, lockstep, choose, dict.fromkeys(sites, UNTOUCHED)))
    return made


def searched(target: Target, choices: Mapping[Site, Sequence[Choice]] | None = None) -> Search:
    return search(model()[0], choices or found(), BATCHES, target, lambda chosen: chosen, untracked)


def levels(outcome: Search) -> list[str]:
    return [choice.activation.level for choice in outcome.choices.values()]


def error(target: Target, choices: Mapping[Site, Choice]) -> float:
    traced, _ = model()
    return target.error(run(traced, BATCHES, choices), run(traced, BATCHES, {}))


# --- the search ------------------------------------------------------------------------------------------------


def test_a_loose_target_leaves_every_layer_at_its_cheapest() -> None:
    outcome = searched(Target(min_cosine=0.2))
    assert outcome.reached and levels(outcome) == ["tensor"] * 3


@pytest.mark.parametrize("target", [Target(min_cosine=0.9995), Target(min_sqnr_db=30)], ids=str)
def test_the_sensitive_layer_becomes_finer_and_no_other(target: Target) -> None:
    outcome = searched(target)
    assert outcome.reached and levels(outcome) == ["tensor", "float", "tensor"]


@pytest.mark.parametrize("target", [Target(min_cosine=0.9995), Target(min_sqnr_db=30)], ids=str)
def test_the_target_is_missed_without_it(target: Target) -> None:
    """Else the test above would show nothing."""
    assert error(target, {site: choices[0] for site, choices in found().items()}) > target.budget


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("place", [0, 1])
def test_an_output_of_zeros_is_as_close_as_it_is_equal(noise: float, place: int) -> None:
    """Wherever it stands among the outputs: what is measured of the others still counts."""
    signal, zeros = normal(4, 8), torch.zeros(4, 8)
    truth, outputs = [signal, signal], [signal * 1.1, signal * 1.1]
    truth[place], outputs[place] = zeros, zeros + noise
    assert Target(min_sqnr_db=20).error(outputs, truth) == pytest.approx(math.inf if noise else 0.01)


def test_a_metric_is_reached() -> None:
    def score(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        return -float((outputs[0] - truth[0]).abs().max())

    coarse = run(model()[0], BATCHES, {site: choices[0] for site, choices in found().items()})
    assert score(coarse, run(model()[0], BATCHES, {})) < -0.3
    outcome = searched(Target(metric=score, min_metric=-0.1))
    assert outcome.reached and "tensor" in levels(outcome)


BAD_METRICS: list[tuple[Any, str]] = [
    (lambda outputs, truth: 1 / 0, "metric fails: ZeroDivisionError: division by zero; mend that function"),
    (lambda outputs, truth: None, "metric must give a number, found .*None"),
    (lambda outputs, truth: outputs[0], "metric must give a number, found"),
]


@pytest.mark.parametrize(("metric", "problem"), BAD_METRICS, ids=["raises", "none", "tensor"])
def test_a_metric_that_gives_no_number(metric: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Target(metric=metric).reached([normal(2, 3)], [normal(2, 3)])


def test_a_target_that_only_floats_reach_is_reached_by_floats() -> None:
    outcome = searched(Target(min_sqnr_db=200))
    assert outcome.reached and levels(outcome) == ["float"] * 3


def test_a_target_that_no_option_reaches_is_not_said_to_be_reached() -> None:
    quantized = {site: choices[:1] for site, choices in found().items()}
    outcome = searched(Target(min_cosine=0.9995), quantized)
    assert not outcome.reached and outcome.error > 0.0005 and levels(outcome) == ["tensor"] * 3


def test_the_error_is_that_of_the_choices() -> None:
    target = Target(min_cosine=0.9995)
    outcome = searched(target)
    assert outcome.error == error(target, outcome.choices)


def test_what_finishing_gives_is_measured_and_kept() -> None:
    def floats(chosen: Mapping[Site, Choice]) -> Mapping[Site, Choice]:
        return dict.fromkeys(chosen, UNTOUCHED)

    outcome = search(model()[0], found(), BATCHES, Target(min_cosine=0.99), floats, untracked)
    assert outcome.error == pytest.approx(0, abs=1e-12) and set(levels(outcome)) == {"float"}


def test_no_sites_reach_any_target() -> None:
    outcome = search(model()[0], {}, BATCHES, Target(min_cosine=0.999), lambda chosen: chosen, untracked)
    assert outcome.reached and not outcome.choices


# --- targets, costs and outputs --------------------------------------------------------------------------------


def test_cosines_of_zero_vectors() -> None:
    a, b = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert cosines(a, b).tolist() == [1, 0, 1]


def test_the_worst_output_counts() -> None:
    truth = [normal(5, 4), normal(5, 4, seed=1)]
    outputs = [truth[0], truth[1] * 0.9]
    assert Target(min_sqnr_db=20).error(outputs, truth) == pytest.approx(0.01)
    assert Target(min_cosine=0.9).error([truth[0], -truth[1]], truth) == pytest.approx(2)


@pytest.mark.parametrize(
    ("target", "budget"), [(Target(min_cosine=0.99), 0.01), (Target(min_sqnr_db=20), 0.01), (Target(), 0.001)]
)
def test_the_budget_of_a_target(target: Target, budget: float) -> None:
    assert target.budget == pytest.approx(budget)


def test_targets_are_printed() -> None:
    metric = Target(metric=lambda a, b: 1.0, min_metric=0.5)
    assert [str(item) for item in (Target(0.99), Target(min_sqnr_db=20), metric)] == [
        "cosine 0.99",
        "SQNR 20 dB",
        "metric 0.5",
    ]


def test_finer_is_dearer() -> None:
    _, sites = model()
    coarse = found()[sites[0]][0]
    token, smoothed = (
        Choice(type(coarse.activation)("token"), None, coarse.weights),
        Choice(coarse.activation, torch.ones(WIDTH), coarse.weights),
    )
    static = Choice(type(coarse.activation)("static"), None, coarse.weights)
    assert {cost(site, static) for site in sites} == {0.0}
    assert 0 < cost(sites[0], coarse) < cost(sites[0], smoothed) < cost(sites[0], token)
    assert 0 < cost(sites[0], UNTOUCHED) < math.inf


def test_the_closest_is_the_cheapest_of_those_near_the_smallest_noise() -> None:
    _, (site, *_) = model()
    kind, weights = type(found()[site][0].activation), found()[site][0].weights
    static, tensor, token = (
        Choice(kind(level), None, weights, noise=noise)
        for level, noise in (("static", 1.2e-2), ("tensor", 1.05e-2), ("token", 1e-2))
    )
    every = [static, tensor, token]
    assert [closest(site, every, most) for most in (1.0, 1.1, 1.3)] == [token, tensor, static]


def outputs(function: Any, *batches: Sequence[Tensor]) -> list[Tensor]:
    return run(program(function, *batches[0], w=weight(0)), batches, {})


def test_outputs_are_rows_over_all_batches() -> None:
    (rows,) = outputs(lambda m, x: F.linear(x, m.w), [normal(2, 3, WIDTH)], [normal(1, 5, WIDTH)])
    assert rows.shape == (2 * 3 + 5, WIDTH)


def test_outputs_as_wide_as_a_batch_is_long() -> None:
    """Scores by position: their rows differ in width from batch to batch."""
    (rows,) = outputs(lambda m, x: F.linear(x, m.w).sum(-1), [normal(2, 3, WIDTH)], [normal(2, 5, WIDTH)])
    assert rows.shape == (4, 5) and not rows[:2, 3:].any()


def test_outputs_of_one_number_a_row_of_the_batch() -> None:
    (rows,) = outputs(lambda m, x: F.linear(x, m.w).sum((1, 2)), [normal(2, 3, WIDTH)], [normal(4, 5, WIDTH)])
    assert rows.shape == (2, 4)


def test_outputs_that_are_no_floats_do_not_count() -> None:
    found = outputs(lambda m, x: (F.linear(x, m.w).argmax(-1), F.linear(x, m.w)), [normal(2, 3, WIDTH)])
    assert [rows.shape for rows in found] == [(6, WIDTH)]


def test_a_program_without_float_outputs_cannot_be_measured() -> None:
    with pytest.raises(RewriteError, match="no output of float vectors"):
        outputs(lambda m, x: F.linear(x, m.w).argmax(-1), [normal(2, 3, WIDTH)])
