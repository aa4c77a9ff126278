"""Least squares from sums: against torch's own, zeros that are exact, and how strongly the weight is held."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from build import normal
from torch import Tensor

from fxpress.ir.pruning.leastsquares import DAMPS, Batch, by_length, fitted, off

ROWS, COLUMNS, TOKENS = 4, 6, 50
KEEP = torch.tensor([True, False, True, True, False, True])
ALL = torch.ones(COLUMNS, dtype=torch.bool)
W, B = normal(ROWS, COLUMNS), normal(ROWS, seed=1)
ALIKE = normal(TOKENS, 3, seed=2) @ normal(3, COLUMNS, seed=3)  # every input is made of any three others


def correlated(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Tokens of similar lengths."""
    return normal(tokens, COLUMNS, seed=seed + 10) @ (torch.eye(COLUMNS) + normal(COLUMNS, COLUMNS, seed=20) / 2)


def batch(rows: Tensor, bias: Tensor | None = None, noise: float = 0, seed: int = 30) -> Batch:
    """The layer is to give what it gave, and noise."""
    outputs = F.linear(rows, W.to(rows), None if bias is None else bias.to(rows))
    return Batch(rows, outputs + noise * normal(len(rows), ROWS, seed=seed).to(rows), by_length(outputs))


def fit(rows: Tensor, bias: Tensor | None, keep: Tensor, damp: float | None = None) -> tuple[Tensor, Tensor | None]:
    """To what the layer gave."""
    return fitted([batch(rows, bias)], W.to(rows), None if bias is None else bias.to(rows), keep, damp)


def error(rows: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Each token in units of its length."""
    return off([batch(rows, None if bias is None else B)], weight, bias)


biases = pytest.mark.parametrize("bias", [None, B], ids=["no_bias", "bias"])


# --- what is solved --------------------------------------------------------------------------------------------


@biases
def test_it_is_weighed_least_squares(bias: Tensor | None) -> None:
    """Outputs that no weight gives."""
    given = batch(correlated(), bias, noise=1)
    share = given.tokens.sqrt().unsqueeze(1)
    x = given.inputs.double()[:, KEEP]
    x = x if bias is None else torch.cat([x, torch.ones(TOKENS, 1)], 1)
    truth = torch.linalg.lstsq(x * share, given.outputs.double() * share).solution.T.float()
    weight, level = fitted([given], W, bias, KEEP, damp=1e-9)
    torch.testing.assert_close(weight[:, KEEP], truth[:, : int(KEEP.sum())], rtol=1e-4, atol=1e-5)
    if level is not None:
        torch.testing.assert_close(level, truth[:, -1], rtol=1e-4, atol=1e-5)


def test_damping_is_a_penalty_on_the_change() -> None:
    given = batch(correlated(), noise=1)
    share = given.tokens.sqrt().unsqueeze(1)
    x, y = given.inputs.double()[:, KEEP] * share, given.outputs.double() * share
    pull = (0.3 * x.square().sum(0).mean()).sqrt()
    count = int(KEEP.sum())
    held = torch.cat([x, pull * torch.eye(count)]), torch.cat([y, pull * W.double()[:, KEEP].T])
    truth = torch.linalg.lstsq(*held).solution.T.float()
    torch.testing.assert_close(fitted([given], W, None, KEEP, damp=0.3)[0][:, KEEP], truth, rtol=1e-4, atol=1e-5)


@biases
def test_several_batches_are_as_good_as_one(bias: Tensor | None) -> None:
    parts = [batch(correlated(seed, 10 + seed), bias, noise=1, seed=seed) for seed in range(3)]
    whole = Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "outputs", "tokens")))
    torch.testing.assert_close(fitted(parts, W, bias, KEEP, damp=0.1), fitted([whole], W, bias, KEEP, damp=0.1))


@biases
def test_columns_that_go_are_exactly_zero(bias: Tensor | None) -> None:
    weight, _ = fit(correlated(), bias, KEEP)
    assert torch.equal((weight != 0).all(0), KEEP) and torch.equal((weight != 0).any(0), KEEP)


def test_a_layer_without_a_bias_gets_none() -> None:
    assert fit(correlated(), None, KEEP)[1] is None


@biases
@pytest.mark.parametrize("seed", range(4))
def test_the_outputs_are_closer_than_with_zeros_alone(seed: int, bias: Tensor | None) -> None:
    rows = correlated(seed)
    assert error(rows, *fit(rows, bias, KEEP)) < 0.9 * error(rows, W * KEEP, bias)


def test_what_stays_makes_up_for_all_where_it_holds_the_same() -> None:
    assert error(ALIKE, W * KEEP, None) > 0.1
    assert error(ALIKE, *fit(ALIKE, None, KEEP, damp=1e-9)) < 1e-7


def test_the_bias_makes_up_for_an_input_that_is_always_the_same() -> None:
    """Without the others having to move, and however strongly they are held."""
    rows = correlated()
    rows[:, ~KEEP] = torch.tensor([3.0, -2.0])
    for damp in (1e-9, 1e3):
        weight, bias = fit(rows, B, KEEP, damp)
        assert bias is not None
        torch.testing.assert_close(bias, B + W[:, 1] * 3 - W[:, 4] * 2, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weight, W * KEEP, rtol=1e-4, atol=1e-4)


# --- what is left alone ----------------------------------------------------------------------------------------


def test_where_everything_stays_nothing_moves() -> None:
    weight, bias = fit(correlated(), B, ALL)
    torch.testing.assert_close(weight, W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, B, rtol=1e-5, atol=1e-5)


def test_inputs_that_say_nothing_of_those_that_go_do_not_move() -> None:
    """Each token has one input that is not zero."""
    weight, _ = fit(torch.eye(COLUMNS).repeat(5, 1), None, KEEP)
    torch.testing.assert_close(weight, W * KEEP)


@biases
def test_inputs_of_nothing_but_zeros_move_nothing(bias: Tensor | None) -> None:
    weight, level = fit(torch.zeros(TOKENS, COLUMNS), bias, KEEP)
    torch.testing.assert_close(weight, W * KEEP)
    assert bias is None or (level is not None and bool(torch.isclose(level, bias).all()))


def test_what_is_given_is_not_changed() -> None:
    rows, weight, bias, keep = (item.clone() for item in (correlated(), W, B, KEEP))
    fitted([batch(rows, bias)], weight, bias, keep)
    for found, before in zip((rows, weight, bias, keep), (correlated(), W, B, KEEP), strict=True):
        assert torch.equal(found, before)


# --- extremes --------------------------------------------------------------------------------------------------


@biases
def test_all_may_go(bias: Tensor | None) -> None:
    weight, level = fit(correlated(), bias, ~ALL)
    assert not weight.any()
    assert (level is None) is (bias is None) and (level is None or bool(level.isfinite().all()))


@pytest.mark.parametrize("size", [1, 3])
@biases
def test_fewer_tokens_than_inputs(bias: Tensor | None, size: int) -> None:
    rows = correlated()[:size]
    found = fit(rows, bias, KEEP)
    assert all(bool(item.isfinite().all()) for item in found if item is not None)
    assert error(rows, *found) < error(rows, W * KEEP, bias)


def test_a_token_of_zeros_among_others_is_no_harm() -> None:
    rows = torch.cat([correlated(), torch.zeros(1, COLUMNS)])
    assert bool(fit(rows, None, KEEP)[0].isfinite().all())


def test_ordinary_tokens_are_fitted_beside_some_that_are_a_thousand_times_as_long() -> None:
    """Those would be all that plain least squares fits to."""
    rows = correlated()
    giants = rows.clone()
    giants[:3] = normal(3, COLUMNS, seed=7) * 1000
    assert error(rows[3:], *fit(giants, None, KEEP)) < error(rows[3:], W * KEEP, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_weights_type(dtype: torch.dtype) -> None:
    weight, bias = fit(correlated().to(dtype), B, KEEP)
    assert bias is not None
    assert weight.dtype is bias.dtype is dtype
    torch.testing.assert_close(weight.float(), fit(correlated(), B, KEEP)[0], rtol=0.1, atol=0.05)


# --- how strongly the weight is held ---------------------------------------------------------------------------


def held_out(damp: float | None, count: int, noise: float) -> float:
    """The error on other tokens of a fit to batches of 4 tokens."""
    parts = [batch(correlated(seed, 4), noise=noise, seed=seed) for seed in range(count)]
    return error(correlated(99, 500), *fitted(parts, W, None, ALL, damp))


def test_beside_few_and_noisy_tokens_it_is_held() -> None:
    assert held_out(None, 4, noise=3) < 0.6 * held_out(DAMPS[0], 4, noise=3)


def test_where_there_is_much_to_make_up_for_it_is_not_held() -> None:
    rows = [batch(ALIKE[start : start + 5]) for start in range(0, TOKENS, 5)]
    weight, _ = fitted(rows, W, None, KEEP)
    torch.testing.assert_close(weight, fitted(rows, W, None, KEEP, damp=DAMPS[0] / 2)[0])
