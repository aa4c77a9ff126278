"""ReplaceAttention where it chooses: within a budget of error, for speed, and never what is slower."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import integers
import pytest
from build import reasons, rewritten
from torch import Tensor

from fxpress.ir.calibration.target import Target, cosines, run
from fxpress.ir.equality import sqnr_db
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.low_rank_attention import nystrom_attention
from fxpress.ir.ops.table import OPERATORS
from fxpress.ir.printer import print_program
from fxpress.ir.rewrite import Context, PassResult
from fxpress.ir.verify import verify
from fxpress.passes import ReplaceAttention

Clock = Callable[[Program], float]
TEXTS = [integers.batch(3, length, seed=length) for length in (12, 16, 20)]


@functools.cache
def encoder() -> Program:
    """Four layers with a key mask, canonical; not to be changed."""
    return integers.canonical(integers.Encoder(layers=4))


def replaced(
    rewrite: ReplaceAttention, seconds: Callable[[Program], float] | None = None
) -> tuple[Program, PassResult]:
    return rewritten(encoder(), rewrite, Context(calibration=TEXTS, seconds=seconds))


def names(result: PassResult) -> list[str]:
    """Of the attentions that were replaced."""
    return [match.node for match in result.matches]


def automatic(kind: str | list[str] = "sliding_window", **options: Any) -> tuple[Program, PassResult]:
    if "sliding_window" in kind:
        options.setdefault("window", 4)
    return replaced(ReplaceAttention(kind, layers="auto", **options))


def outputs(traced: Program) -> list[Tensor]:
    return run(traced, TEXTS)


# --- within a budget of error ---------------------------------------------------------------------------------------


def test_a_budget_of_cosine_is_kept() -> None:
    """Measured on the data it was given; a tighter one leaves more attentions as they are."""
    counts = []
    for budget in (0.9, 0.99, 0.9999999):
        after, result = automatic(min_cosine=budget)
        found = cosines(outputs(after)[0], outputs(encoder())[0])
        assert found.mean() >= budget and found.min() >= 1 - 5 * (1 - budget) - 1e-6
        assert Target(budget).reached(outputs(after), outputs(encoder()))
        assert len(result.refusals) == 4 - result.changes
        counts.append(result.changes)
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 0


def test_a_budget_of_noise_is_kept() -> None:
    counts = []
    for budget in (5, 15, 200):
        after, result = automatic(min_sqnr_db=budget)
        assert result.changes == 0 or sqnr_db(outputs(after)[0], outputs(encoder())[0]) >= budget
        counts.append(result.changes)
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 0


def test_without_a_budget_the_cosine_is_99_percent() -> None:
    assert print_program(automatic()[0]) == print_program(automatic(min_cosine=0.99)[0])


def test_what_stays_says_what_it_would_have_cost() -> None:
    _, result = automatic(min_cosine=0.9999999)
    assert len(reasons(result, "sliding_window")) == 4
    assert all(reason.startswith("the budget is spent: alone an error of ") for reason in reasons(result))


def test_what_is_replaced_says_what_it_costs() -> None:
    _, result = automatic(min_cosine=0.1)
    assert result.changes == 4 and all("; alone an error of " in match.detail for match in result.matches)


def test_of_several_kinds_each_attention_gets_the_best() -> None:
    """Nothing is as good as exact attention."""
    _, result = automatic(["nystrom", "exact", "sliding_window"], min_cosine=0.9999, landmarks=2)
    assert result.rewrites == {"exact": 4}


def test_the_better_of_two_kinds() -> None:
    _, result = automatic(["nystrom", "sliding_window"], min_cosine=0.1, landmarks=19, window=1)
    assert result.rewrites == {"nystrom": 4}


# --- time ------------------------------------------------------------------------------------------------------


def clock(exact: float, other: float) -> Clock:
    """What attentions take, in seconds: exact ones, and others."""

    def seconds(alone: Program) -> float:
        (call,) = [node for node in alone.calls(*OPERATORS) if OPERATORS[node.target].name.endswith("attention")]
        verify(alone)
        return exact if call.target is attention else other

    return seconds


def test_what_is_slower_is_refused_with_both_times() -> None:
    rewrite = ReplaceAttention("nystrom", landmarks=8)
    after, result = replaced(rewrite, seconds=clock(0.001, 0.00234))
    assert result.changes == 0 and not after.calls(nystrom_attention)
    assert reasons(result, "nystrom") == 4 * [
        "slower than exact attention at the example's sizes: 2.34 ms, exact 1 ms; a longer example, or force=True, "
        "replaces it"
    ]


def test_what_is_slower_is_replaced_by_force() -> None:
    _, result = replaced(ReplaceAttention("nystrom", landmarks=8, force=True), seconds=clock(0.001, 0.002))
    assert result.changes == 4 and result.refusals == []


def test_force_measures_nothing() -> None:
    def seconds(alone: Program) -> float:
        raise AssertionError("it was measured")

    assert replaced(ReplaceAttention("nystrom", force=True), seconds=seconds)[1].changes == 4


def test_what_is_faster_says_so() -> None:
    _, result = replaced(ReplaceAttention("nystrom", landmarks=8), seconds=clock(0.002, 0.001))
    assert [match.detail for match in result.matches] == 4 * ["nystrom(landmarks=8, iterations=6); 1 ms, exact 2 ms"]


def test_exact_attention_is_never_too_slow() -> None:
    assert replaced(ReplaceAttention("exact"), seconds=clock(0.001, 0.001))[1].changes == 4


@pytest.mark.parametrize(("speedup", "count"), [(1.1, 1), (1.4, 2), (2, 3), (3.9, 4)])
def test_as_few_as_make_attention_so_much_faster(speedup: float, count: int) -> None:
    """Four of 10 ms, each 7.5 ms faster when replaced."""
    rewrite = ReplaceAttention("nystrom", layers="auto", speedup=speedup, landmarks=4)
    _, result = replaced(rewrite, seconds=clock(0.01, 0.0025))
    assert result.changes == count and len(result.refusals) == 4 - count


def test_a_speedup_that_is_not_reached_is_said() -> None:
    rewrite = ReplaceAttention("nystrom", layers="auto", speedup=50, landmarks=4)
    _, result = replaced(rewrite, seconds=clock(0.01, 0.0025))
    assert result.changes == 4
    assert [item.reason for item in result.refusals] == [
        "all attention together is 4 times as fast at most, 50 was asked"
    ]


def test_for_speed_those_go_that_harm_least() -> None:
    rewrite = ReplaceAttention("nystrom", layers="auto", speedup=1.1, landmarks=4)
    _, result = replaced(rewrite, seconds=clock(0.01, 0.0025))
    errors = {}
    for index in range(4):
        alone, _ = replaced(ReplaceAttention("nystrom", layers=[index], landmarks=4))
        errors[f"layers.{index}"] = Target(0.99).error(outputs(alone), outputs(encoder()))
    assert names(result) == [min(errors, key=errors.__getitem__)]


def test_what_is_slower_is_no_way_to_speed() -> None:
    rewrite = ReplaceAttention("nystrom", layers="auto", speedup=2, landmarks=4, force=True)
    assert replaced(rewrite, seconds=clock(0.01, 0.02))[1].changes == 0
