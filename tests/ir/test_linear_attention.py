"""Features and linear attention against their formulas, loops that follow them, and exact attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.linear_attention import linear_attention, random_features, softmax_features

LEAST = 1e-4  # of a random feature


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def inputs(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the features of two samples; four heads share two of keys."""
    sizes = ((2, 4, length, 3), (2, 2, length, 3), (2, 2, length, 5))
    query, key, value = (normal(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes))
    return query, key, value, normal(2, 4, length, 6).abs().to(dtype), normal(2, 2, length, 6, seed=7).abs().to(dtype)


def mask_of(length: int) -> Tensor:
    """With holes in the first sample, and at least one key in both."""
    mask = normal(2, length, seed=3) > -0.5
    mask[:, 0] = mask[1] = True
    return mask


# --- random features -------------------------------------------------------------------------------------------

PROJECTION = normal(7, 4, seed=9)
X = normal(2, 3, 5, 4)


def exponents(x: Tensor, scale: float) -> Tensor:
    x = x * math.sqrt(scale)
    return x @ PROJECTION.t() - x.square().sum(-1, keepdim=True) / 2


def test_without_a_shift_features_are_exponentials() -> None:
    close(random_features(X, PROJECTION), exponents(X, 4**-0.5).exp() + LEAST)


def test_rows_of_queries_have_a_shift_of_their_own() -> None:
    expected = exponents(X, 0.3)
    expected = (expected - expected.amax(-1, keepdim=True)).exp() + LEAST
    close(random_features(X, PROJECTION, None, "row", 0.3), expected)


def test_keys_share_the_shift_of_those_that_may_be_seen() -> None:
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    expected = exponents(X, 0.3)
    for b in range(2):
        for h in range(3):
            largest = expected[b, h, mask[b]].max()
            expected[b, h] = (expected[b, h] - largest).clamp(max=0).exp()
    close(random_features(X, PROJECTION, mask, "all", 0.3), expected + LEAST)


def test_hidden_keys_do_not_shift_the_others() -> None:
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    poisoned = X.clone()
    poisoned[:, :, 3:] = PROJECTION[0] * 50
    found, expected = (random_features(x, PROJECTION, mask, "all") for x in (poisoned, X))
    assert torch.equal(found[:, :, :3], expected[:, :, :3]) and found.isfinite().all()


def test_without_a_shift_rows_know_nothing_of_each_other() -> None:
    """As causal attention needs it."""
    changed = X.clone()
    changed[:, :, 4] *= 20
    assert torch.equal(random_features(changed, PROJECTION)[:, :, :4], random_features(X, PROJECTION)[:, :, :4])


@pytest.mark.parametrize("shift", ["fixed", "row", "all"])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
def test_features_stay_finite_and_positive(size: float, shift: str) -> None:
    """Even for a projection whose exponentials would overflow."""
    found = random_features(X * size, PROJECTION * 10, None, shift)
    assert found.isfinite().all() and found.amin() >= LEAST


def test_products_are_exponentials_of_scores_on_average() -> None:
    query, key = normal(1, 1, 6, 4) * 0.7, normal(1, 1, 6, 4, seed=1) * 0.7
    projection = normal(100_000, 4, seed=2)
    rows, columns = (random_features(x, projection) for x in (query, key))
    close(rows @ columns.transpose(-1, -2) / 100_000, (query @ key.transpose(-1, -2) / 2).exp(), 0.05)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_random_features_of_half_precision_are_rounded_once(half: torch.dtype) -> None:
    x, projection = X.to(half), PROJECTION.to(half)
    assert torch.equal(random_features(x, projection), random_features(x.float(), projection.float()).to(half))


def test_other_shifts_are_refused() -> None:
    with pytest.raises(ValueError, match="shift must be 'row', 'all' or 'fixed'"):
        random_features(X, PROJECTION, None, "none")


@pytest.mark.parametrize("shift", ["fixed", "row", "all"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True] * 3 + [False] * 2] * 2)], ids=["all", "some"])
def test_gradient_of_random_features(mask: Tensor | None, shift: str) -> None:
    given = (X.double().requires_grad_(), PROJECTION.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: random_features(x, w, mask, shift, 0.3), given)


# --- learned features ------------------------------------------------------------------------------------------


def test_learned_features_are_two_softmaxes_a_head() -> None:
    weight = normal(3, 4, 6, seed=5)
    found = softmax_features(X, weight)
    for head in range(3):
        logits = X[:, head] @ weight[head]
        close(found[:, head], torch.cat((logits.softmax(-1), (-logits).softmax(-1)), -1))


def test_gradient_of_learned_features() -> None:
    given = (X[:1].double().requires_grad_(), normal(3, 4, 2, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(softmax_features, given)


# --- attention -------------------------------------------------------------------------------------------------


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, gain: Tensor, mask: Tensor, window: int,
    causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    batch, heads, length, _ = query.shape
    result = torch.zeros(batch, heads, length, value.shape[3])
    for b in range(batch):
        for h in range(heads):
            g = h * key.shape[1] // heads
            for i in range(length):
                keys = [j for j in range(length) if mask[b, j] and not (causal and j > i)]
                near = [j for j in keys if window and abs(i // window - j // window) <= 1]
                far = [j for j in keys if j not in near]
                share = columns[b, g, far] @ rows[b, h, i]
                if window:
                    share = share * gain[h].exp()
                exact = torch.softmax(key[b, g, near] @ query[b, h, i] * scale, 0)
                total = exact.sum() + share.sum()
                if keys:
                    result[b, h, i] = (exact @ value[b, g, near] + share @ value[b, g, far]) / total
    return result


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 9), window=st.integers(0, 4), causal=st.booleans(), scale=st.sampled_from([0.3, 2.0]),
)  # fmt: skip
def test_equals_its_definition(length: int, **options: Any) -> None:
    given = (*inputs(length), normal(4, seed=8), mask_of(length))
    close(linear_attention(*given, **options), by_loops(*given, **options))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [9, 20])
def test_a_window_over_all_keys_is_attention(window: int, causal: bool) -> None:
    query, key, value, *features = inputs(9)
    exact = attention(query, key, value, key_mask=mask_of(9), right=0 if causal else None)
    close(linear_attention(query, key, value, *features, None, mask_of(9), window, causal), exact)


def test_a_gain_of_zero_is_none() -> None:
    given = inputs(9)
    close(linear_attention(*given, torch.zeros(4), None, 3), linear_attention(*given, None, None, 3))


def test_with_no_gain_left_only_the_window_is_seen() -> None:
    query, key, value, *features = inputs(9)
    block = torch.arange(9) // 3
    window = attention(query, key, value, bias=(block[:, None] - block).abs() <= 1)
    close(linear_attention(query, key, value, *features, torch.full((4,), -80.0), None, 3), window)


def test_without_a_window_only_features_count() -> None:
    query, key, value, *features = inputs(9)
    assert torch.equal(
        linear_attention(query, key, value, *features), linear_attention(query * 5, -key, value, *features)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("ends", "window"),
    [((0, 30), 0), ((30, 0), 0), ((7, 5), 0), ((0, 30), 2), ((30, 0), 2)],
    ids=["right", "left", "both", "right of a window", "left of a window, by whole blocks"],
)
def test_padding_changes_nothing(ends: tuple[int, int], window: int, causal: bool) -> None:
    given = inputs(11)
    wide = [F.pad(tensor, (0, 0, *ends), value=3.0) for tensor in given]
    mask = F.pad(torch.ones(2, 11, dtype=torch.bool), ends)
    found = linear_attention(*wide, None, mask, window, causal)[:, :, ends[0] : ends[0] + 11]
    close(found, linear_attention(*given, None, None, window, causal))


@pytest.mark.parametrize("window", [0, 2])
def test_rows_without_a_key_are_zero(window: int) -> None:
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])
    found = linear_attention(*inputs(5), None, mask, window, True)
    assert not found[0, :, :2].any() and not found[1].any()
    assert found[0, :, 2:].abs().amin() > 0


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(half: torch.dtype, window: int) -> None:
    given = inputs(9, half)
    gain = normal(4).to(half)
    wide = linear_attention(*(tensor.float() for tensor in given), gain.float(), None, window)
    assert torch.equal(linear_attention(*given, gain, None, window), wide.to(half))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 2])
def test_gradient(window: int, causal: bool) -> None:
    given = [tensor.requires_grad_() for tensor in (*inputs(4, torch.float64), normal(4).double())]
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    assert torch.autograd.gradcheck(lambda *t: linear_attention(*t, mask, window, causal, 0.7), given)


def test_features_of_other_numbers_are_an_error() -> None:
    query, key, value, rows, columns = inputs(5)
    with pytest.raises(RuntimeError):
        linear_attention(query, key, value, rows[..., :5], columns)
