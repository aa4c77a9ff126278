"""Weights that are fitted to what exact attention gives on data."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import sites
import torch
from build import normal
from sites import attend, exactly, lengths, qkv, samples, site
from torch import Tensor

from fxpress.ir.ops.attention import attention
from fxpress.ir.replacement.fit import error, fit
from fxpress.ir.replacement.kind import Kind
from fxpress.ir.replacement.kinds.depthwise_conv import DepthwiseConv
from fxpress.ir.replacement.kinds.linear import Linear
from fxpress.ir.replacement.kinds.linformer import Linformer
from fxpress.ir.replacement.site import Sample, Site
from fxpress.ir.rewrite import untracked


def error_of(kind: Kind, at: Site, weights: Mapping[str, Tensor], data: list[Sample]) -> float:
    def output(sample: Sample, given: Mapping[str, Tensor]) -> Tensor:
        return attend(kind, at, (sample.query, sample.key, sample.value), sample.key_mask, given)

    return error(output, weights, data)


# --- fit -------------------------------------------------------------------------------------------------------


def sample(output: Tensor, mask: Tensor | None = None) -> Sample:
    return Sample(output, output, output, mask, output)


def times(sample: Sample, weights: Mapping[str, Tensor]) -> Tensor:
    """A model of one number, which is right at 1."""
    return sample.output * weights["by"]


ONE = [sample(normal(2, 3, 5, 4)), sample(normal(2, 3, 7, 4, seed=1))]


def test_the_error_is_energy_over_energy() -> None:
    assert error(times, {"by": torch.tensor(0.5)}, ONE) == pytest.approx(0.25)
    assert error(times, {"by": torch.tensor(1.0)}, ONE) == 0


def test_the_error_leaves_padding_out() -> None:
    output, mask = normal(2, 3, 5, 4), lengths(5, 2)

    def wrong_at_padding(sample: Sample, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.where(mask[:, None, :, None], sample.output, 100.0)

    assert error(wrong_at_padding, {}, [sample(output, mask)]) == 0


def test_a_fit_gets_better() -> None:
    found = fit(times, {"by": torch.tensor(0.5)}, ONE, untracked, "", steps=100, rate=0.05)
    assert found["by"].item() == pytest.approx(1, abs=0.01)
    assert not found["by"].requires_grad


def test_the_start_is_not_changed() -> None:
    start = {"by": torch.tensor(0.5)}
    fit(times, start, ONE, untracked, "", steps=5, rate=0.05)
    assert start["by"].item() == 0.5


@pytest.mark.parametrize(
    ("start", "steps", "rate", "data"),
    [(1.0, 20, 0.1, ONE), (0.9, 20, 100.0, ONE), (0.5, 0, 0.1, ONE), (0.5, 20, 0.1, [])],
    ids=["it is the best", "steps too long", "no steps", "no data"],
)
def test_where_nothing_is_better_the_start_stays(start: float, steps: int, rate: float, data: list[Sample]) -> None:
    found = fit(times, {"by": torch.tensor(start)}, data, untracked, "", steps=steps, rate=rate)
    assert found["by"].item() == pytest.approx(start) and error(times, found, ONE) <= (1 - start) ** 2 + 1e-6


# --- kinds -----------------------------------------------------------------------------------------------------

FITTED = [
    Linformer(4, "fitted", steps=30),
    Linear(4, window=2, steps=30),
    Linear(6, window=0, steps=30),
    DepthwiseConv(5),
    DepthwiseConv(4, dynamic=True, steps=30),
]


@pytest.mark.parametrize(
    ("kind", "causal"),
    [(kind, causal) for causal in (False, True) for kind in FITTED if kind.refusal(site(causal)) is None],
    ids=str,
)
def test_calibration_lessens_the_error(kind: Kind, causal: bool) -> None:
    at = site(causal)
    data, start = samples(at), kind.weights(at)
    found = kind.calibrate(at, dict(start), data, untracked)
    assert found.keys() == start.keys()
    assert all(found[name].shape == start[name].shape for name in start)
    assert error_of(kind, at, found, data) < error_of(kind, at, start, data)


def test_fitting_taps_of_each_token_lessens_the_error_of_fixed_ones() -> None:
    data = samples(site())
    fixed, fitted = (
        (kind, kind.calibrate(site(), kind.weights(site()), data, untracked))
        for kind in (DepthwiseConv(5), DepthwiseConv(5, dynamic=True, steps=100))
    )
    assert error_of(fitted[0], site(), fitted[1], data) < error_of(fixed[0], site(), fixed[1], data)


@pytest.mark.parametrize("kind", FITTED, ids=str)
def test_what_padding_holds_does_not_matter(kind: Kind) -> None:
    first, second = samples(site()), []
    for item in first:
        assert item.key_mask is not None
        noise = 5 * ~item.key_mask[:, None, :, None]
        tensors = (item.query + noise, item.key + noise, item.value + noise)
        second.append(Sample(*tensors, key_mask=item.key_mask, output=item.output + noise))
    found, expected = (kind.calibrate(site(), kind.weights(site()), data, untracked) for data in (second, first))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def mean_attention(at: Site, data: list[Sample], kernel: int) -> Tensor:
    """[H, K], by hand: values of one token each make attention give its probabilities."""
    before = kernel - 1 if at.causal else kernel // 2
    total, count = torch.zeros(at.heads, kernel), 0
    for item in data:
        batch, _, length, _ = item.query.shape
        each = torch.eye(length).expand(batch, at.groups, -1, -1)
        probabilities = exactly(at, (item.query, item.key, each), item.key_mask)
        for b in range(batch):
            assert item.key_mask is not None
            for i in item.key_mask[b].nonzero()[:, 0].tolist():
                count += 1
                for tap in range(kernel):
                    j = i + tap - before
                    if 0 <= j < length:
                        total[:, tap] += probabilities[b, :, i, j]
    return total / count


@pytest.mark.parametrize("kernel", [1, 4, 5, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_taps_are_the_mean_attention_at_each_distance(causal: bool, kernel: int) -> None:
    at, kind = site(causal), DepthwiseConv(kernel)
    data = samples(at)
    found = kind.calibrate(at, kind.weights(at), data, untracked)["taps"].softmax(-1)
    masses = mean_attention(at, data, kernel)
    torch.testing.assert_close(found, masses / masses.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def positional() -> list[Sample]:
    """Head 1 of 4 looks at the token before its own, the others everywhere."""
    length = 16
    angle = 0.3 * torch.arange(length)
    code = torch.stack((angle.cos(), angle.sin()), 1) * 30
    query, key = torch.zeros(2, 4, length, sites.SIZE), torch.zeros(2, 4, length, sites.SIZE)
    query[:, 1, :, :2], key[:, 1, :, :2] = code.roll(1, 0), code
    query[:, 1, 0, :2] = code[0]
    value, mask = normal(2, 4, length, sites.SIZE), lengths(length, 11)
    return [Sample(query, key, value, mask, attention(query, key, value, key_mask=mask))]


@pytest.mark.parametrize("dynamic", [False, True])
def test_heads_that_look_elsewhere_stay_exact(dynamic: bool) -> None:
    at, kind, data = site(False, 4, 4), DepthwiseConv(3, dynamic, min_mass=0.9, steps=5), positional()
    found = kind.calibrate(at, kind.weights(at), data, untracked)
    assert found["mixed"].tolist() == [1] and found["others"].tolist() == [0, 2, 3]
    assert len(found["taps"]) == 1
    tensors, mask = qkv(9, 2, 4, 4), lengths(9, 5)
    result, exact = attend(kind, at, tensors, mask, found), exactly(at, tensors, mask)
    torch.testing.assert_close(result[:, [0, 2, 3]], exact[:, [0, 2, 3]])
    assert (result[:, 1] - exact[:, 1]).abs().amax() > 0.01


@pytest.mark.parametrize("length", [37, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_where_every_head_stays_the_result_is_exact(causal: bool, length: int) -> None:
    at, kind = site(causal, 4, 4), DepthwiseConv(3, min_mass=0.999)
    found = kind.calibrate(at, kind.weights(at), samples(at), untracked)
    assert len(found["mixed"]) == 0
    tensors, mask = qkv(length, 2, 4, 4), lengths(length, 1)
    torch.testing.assert_close(attend(kind, at, tensors, mask, found), exactly(at, tensors, mask))


def test_taps_are_right_for_a_head_that_looks_at_one_distance() -> None:
    at, kind, data = site(False, 4, 4), DepthwiseConv(3), positional()
    taps = kind.calibrate(at, kind.weights(at), data, untracked)["taps"].softmax(-1)
    assert taps[1, 0] > 0.8  # the token before
    torch.testing.assert_close(taps[0], torch.full((3,), 1 / 3), rtol=0.1, atol=0)
