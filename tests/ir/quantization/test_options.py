"""The ways in which a site may be quantized: what is measured, when smoothing is found, what fitting adds."""

from __future__ import annotations

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.quantization.choice import UNTOUCHED, Activation, Choice, measured
from fxpress.ir.quantization.grid import Grid, nearest
from fxpress.ir.quantization.options import Data, Way, options, plain, refined

WIDTH = 32
WEIGHTS = [normal(16, WIDTH, seed=1) / 6, normal(8, WIDTH, seed=2) / 6]


def rows(outliers: float = 1.0, seed: int = 0, count: int = 64) -> Tensor:
    """Rows [count, WIDTH] with one channel that is larger than the others."""
    x = normal(count, WIDTH, seed=seed)
    x[:, 5] *= outliers
    return x


def data(outliers: float = 1.0) -> Data:
    return Data([rows(outliers), rows(outliers, 1, 40)])


def way(level: str = "tensor", **given: object) -> Way:
    return Way(level, Grid(), **given)  # type: ignore[arg-type]


# --- data ------------------------------------------------------------------------------------------------------


def test_a_sample_is_spread_over_all_batches() -> None:
    given = Data([torch.full((600, 2), 0.0), torch.full((600, 2), 1.0)])
    sample = given.sample()
    assert len(sample) == 512 and sample.mean().item() == pytest.approx(0.5, abs=0.01)


def test_few_rows_are_all_sampled() -> None:
    assert torch.equal(data().sample(), torch.cat(list(data().rows)))


def test_the_top_of_each_channel() -> None:
    given = Data([torch.tensor([[1.0, -5.0]]), torch.tensor([[-2.0, 3.0]]), torch.zeros(0, 2)])
    assert given.top().tolist() == [2, 5]


def test_the_gram_matrix_of_floats_is_that_of_the_rows() -> None:
    x = torch.cat(list(data().rows))
    torch.testing.assert_close(data().gram(UNTOUCHED), x.T @ x, rtol=1e-4, atol=1e-3)


def test_rounding_adds_to_the_diagonal_of_the_gram_matrix_alone() -> None:
    added = data().gram(Choice(Activation("tensor"))) - data().gram(UNTOUCHED)
    assert (added.diagonal() > 0).all()
    assert (added - added.diagonal().diag()).abs().max() < 1e-3


def test_a_channel_that_is_rounded_to_zero_is_not_dead() -> None:
    """Seen after rounding beside a channel 10000 times as large, its inputs would all be zero."""
    x = torch.stack([torch.linspace(-1000, 1000, 50), torch.linspace(-0.1, 0.1, 50)], 1)
    gram = Data([x]).gram(Choice(Activation("tensor")))
    assert gram[1, 1] > x[:, 1].square().sum()


# --- plain and measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "low"), [("token", -0.5), ("tensor", None), ("float", None)])
def test_the_least_value_is_used_by_tokens_only(level: str, low: float | None) -> None:
    assert plain(way(level), WEIGHTS, -0.5).activation == Activation(level, low)


def test_plain_weights_are_rounded_to_nearest() -> None:
    found = plain(way(), WEIGHTS, None).weights
    assert found is not None
    for one, weight in zip(found, WEIGHTS, strict=True):
        assert torch.equal(one.integers, nearest(weight, Grid()).integers)


def test_half_precision_weights_are_rounded_as_they_are() -> None:
    half = WEIGHTS[0].half()
    found = plain(way(), [half], None).weights
    assert found is not None and torch.equal(found[0].integers, nearest(half.float(), Grid()).integers)


def test_noise_is_the_energy_of_the_error_over_that_of_the_outputs() -> None:
    """Weights of zero: all of the signal is missing."""
    zeros = nearest(torch.zeros_like(WEIGHTS[0]), Grid())
    choice = measured(Choice(Activation("float"), None, (zeros,)), WEIGHTS[:1], rows())
    assert choice.noise == pytest.approx(1) and choice.sqnr_db == pytest.approx(0)


def test_noise_of_floats_is_nothing() -> None:
    assert measured(UNTOUCHED, WEIGHTS, rows()).noise == 0


def test_noise_of_no_signal_is_nothing() -> None:
    assert measured(plain(way(), WEIGHTS, None), WEIGHTS, torch.zeros(4, WIDTH)).noise == 0


def test_smoothing_alone_changes_no_output() -> None:
    smooth = torch.linspace(0.5, 2, WIDTH)
    choice = Choice(Activation("float"), smooth)
    found = choice.output(choice.inputs(rows()), 0, WEIGHTS[0] * smooth, None)
    torch.testing.assert_close(found, rows() @ WEIGHTS[0].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smooth", [None, torch.linspace(0.5, 2, WIDTH)])
def test_the_bias_makes_up_for_the_shift_of_the_input(smooth: Tensor | None) -> None:
    weights = WEIGHTS if smooth is None else [weight * smooth for weight in WEIGHTS]
    quantized = tuple(nearest(weight, Grid()) for weight in weights)
    x, bias = rows().abs() - 0.17, normal(16)
    shifted = Choice(Activation("token", -0.17), smooth, quantized)
    straight = Choice(Activation("float"), smooth, quantized)
    found = shifted.output(shifted.inputs(x), 0, WEIGHTS[0], bias)
    expected = straight.output(straight.inputs(x), 0, WEIGHTS[0], bias)
    assert (found - expected).square().mean() < 1e-4 * expected.square().mean()


def test_without_shift_and_correction_the_bias_is_the_layers_own() -> None:
    bias = normal(16)
    assert plain(way(), WEIGHTS, None).bias(0, bias) is bias
    assert plain(way(), WEIGHTS, None).bias(0, None) is None


# --- options ---------------------------------------------------------------------------------------------------


def test_smoothing_is_found_where_it_helps() -> None:
    first, best = options(way(smooth=True), WEIGHTS, None, data(100.0))
    assert first.smooth is None and best.smooth is not None
    assert best.noise < first.noise / 10


def test_smoothing_scales_outliers_down() -> None:
    best = options(way(smooth=True), WEIGHTS, None, data(100.0))[-1]
    assert best.smooth is not None and best.smooth.argmax() == 5


def test_smoothing_is_not_found_where_it_does_not_help() -> None:
    """Weights whose grid is exact, and inputs that are on the grid of their range: nothing is left to win."""
    weights = [torch.eye(4)]
    x = torch.tensor([[255.0, 0.0, 1.0, 7.0], [0.0, 255.0, 255.0, 255.0]])
    assert [choice.smooth for choice in options(way(smooth=True), weights, None, Data([x]))] == [None]


def test_smoothing_is_not_looked_for_unless_asked() -> None:
    assert len(options(way(smooth=False), WEIGHTS, None, data(100.0))) == 1


def test_activations_of_floats_are_not_smoothed() -> None:
    assert len(options(way("float", smooth=True), WEIGHTS, None, data(100.0))) == 1


def test_options_know_their_noise() -> None:
    for choice in options(way(smooth=True), WEIGHTS, None, data(100.0)):
        assert choice.noise == measured(choice, WEIGHTS, data(100.0).sample()).noise > 0


def test_tokens_are_finer_than_a_tensor() -> None:
    mixed = Data([rows() * torch.linspace(0.01, 1, 64)[:, None]])
    coarse, fine = (options(way(level), WEIGHTS, None, mixed)[0].noise for level in ("tensor", "token"))
    assert fine < coarse


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_range_is_that_of_the_rows(symmetric: bool) -> None:
    given = Data([torch.tensor([[-1.0, 0.5]]), torch.tensor([[4.0, 2.0]])])
    found = options(way("static", symmetric=symmetric), [torch.ones(1, 2)], None, given)[0].activation
    assert found.scale is not None and found.zero_point is not None
    assert found.scale.item() == pytest.approx(4 / 127 if symmetric else 5 / 255)
    assert found.zero_point.item() == (0 if symmetric else -77)


def test_a_static_range_is_that_of_the_smoothed_rows() -> None:
    best = options(way("static", smooth=True), WEIGHTS, None, data(100.0))[-1]
    assert best.smooth is not None and best.activation.scale is not None
    scaled = torch.cat([best.scaled(each) for each in data(100.0).rows])
    assert best.activation.scale.item() == pytest.approx((scaled.max() - scaled.min()).item() / 255, rel=1e-4)


def test_a_clipped_static_range_is_narrower() -> None:
    x = rows(count=500)
    x[0, 0] = 1000
    wide, narrow = (options(way("static", range=name), WEIGHTS, None, Data([x]))[0] for name in ("minmax", "mse"))
    assert wide.activation.scale is not None and narrow.activation.scale is not None
    assert narrow.activation.scale <= wide.activation.scale


def test_awq_smooths_weights_for_inputs_of_floats() -> None:
    four = Way("float", Grid(4, False, 16), "mse", awq=True)
    found = options(four, WEIGHTS, None, data(30.0))
    assert len(found) == 2 and found[1].smooth is not None and found[1].noise < found[0].noise


# --- refined ---------------------------------------------------------------------------------------------------


def correlated() -> Data:
    return Data([rows(3.0, count=256) @ (torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=3) / 3)])


def test_gptq_lowers_the_noise_on_correlated_inputs() -> None:
    four = Way("float", Grid(4, False, 16), "mse", gptq=True)
    (first,) = options(four, WEIGHTS, None, correlated())
    assert refined(first, four, WEIGHTS, correlated()).noise < 0.7 * first.noise


def test_fitted_weights_are_kept_only_where_they_are_better() -> None:
    """Weights on the grid: there is nothing to gain."""
    weights = [nearest(weight, Grid()).dequantize() for weight in WEIGHTS]
    fine = way("float", gptq=True, correct=True)
    (first,) = options(fine, weights, None, correlated())
    found = refined(first, fine, weights, correlated())
    assert found.weights is first.weights and found.corrections is None


def test_corrected_biases_take_off_the_mean_error() -> None:
    """Inputs far from zero mean: an error of the weights is then mostly an error of the mean."""
    given = Data([rows() * 0.1 + 5])
    four = Way("float", Grid(4), correct=True)
    (first,) = options(four, WEIGHTS, None, given)
    found = refined(first, four, WEIGHTS, given)
    assert found.corrections is not None and found.noise < first.noise / 20
    x, truth = given.sample(), given.sample() @ WEIGHTS[0].T
    output = found.output(found.inputs(x), 0, WEIGHTS[0], torch.zeros(16))
    torch.testing.assert_close(output.mean(0), truth.mean(0), rtol=1e-4, atol=1e-4)
