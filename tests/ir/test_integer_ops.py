"""The integer operators against what they stand for in real numbers, by hand-computed cases, and at their extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from integers import NoFloats
from torch import Tensor

from fxpress.ir.errors import RewriteError
from fxpress.ir.ops.attention import attention, band
from fxpress.ir.ops.integer import (
    EPS_FRACTION,
    FRACTION,
    INT32,
    PROBABILITY,
    TORCH,
    integer_add,
    integer_gelu,
    integer_layer_norm,
    integer_linear,
    integer_matmul,
    integer_softmax,
    requantize,
    shifted,
    square_root,
)
from fxpress.ir.quantization.integers import Codes, choose_codes, dyadic, integer_weight

ONE = 1 << FRACTION
ERF = 0.0182  # the largest error of I-BERT's polynomial, times |x| / 2, over all x


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def fixed(x: Tensor) -> Tensor:
    return (x.double() * ONE).round().to(torch.int32)


def real(x: Tensor) -> Tensor:
    return x.double() / ONE


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def int8(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


# --- requantize and add ----------------------------------------------------------------------------------------


def test_halves_are_rounded_up() -> None:
    given = ints(-6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6)
    found = requantize(given, torch.tensor(1), 2, None, *INT32)  # quarters: -1.5, -1.25, -.75, -.5, ...
    assert found.tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 2]
    assert found.dtype is torch.int32


def test_zero_point_is_added_before_the_limits_and_bytes_are_int8() -> None:
    found = requantize(ints(-1000, -10, 0, 10, 1000), torch.tensor(2), 1, torch.tensor(5), -128, 127)
    assert found.tolist() == [-128, -5, 5, 15, 127]
    assert found.dtype is torch.int8


def test_every_channel_has_its_multiplier_and_zero_point() -> None:
    given = ints([100, 100, 100], [-7, -7, -7])
    found = requantize(given, torch.tensor([1, 4, 6]), 3, torch.tensor([0, 1, -1]), -128, 127)
    assert found.tolist() == [[13, 51, 74], [-1, -2, -6]]  # 12.5 up; -0.875; -3.5 up; -5.25


@given(st.integers(*INT32), st.integers(0, 2**30 - 1), st.integers(1, 61), st.integers(*INT32))
def test_requantize_is_exact(value: int, multiplier: int, shift: int, zero_point: int) -> None:
    found = requantize(ints(value), torch.tensor(multiplier), shift, torch.tensor(zero_point), *INT32)
    exact = ((value * multiplier + (1 << shift - 1)) >> shift) + zero_point
    assert found.item() == min(max(exact, INT32[0]), INT32[1])


@given(
    st.tuples(st.integers(*INT32), st.integers(0, 2**29 - 1)),
    st.tuples(st.integers(*INT32), st.integers(0, 2**29 - 1)),
    st.integers(1, 61),
)
def test_add_is_exact(first: tuple[int, int], second: tuple[int, int], shift: int) -> None:
    found = integer_add(
        ints(first[0]), ints(second[0]), torch.tensor(first[1]), torch.tensor(second[1]), shift, -32768, 32767
    )
    exact = (first[0] * first[1] + second[0] * second[1] + (1 << shift - 1)) >> shift
    assert found.item() == min(max(exact, -32768), 32767)


@given(st.integers(-(2**61) + 1, 2**61 - 1), st.integers(1, 61))
def test_shifted_is_exact(value: int, bits: int) -> None:
    assert shifted(TORCH, torch.tensor([value]), bits).item() == (value + (1 << bits - 1)) >> bits


@given(st.floats(1e-12, 1e8), st.floats(1e-3, 1e3))
def test_dyadic_numbers_are_close(ratio: float, spread: float) -> None:
    ratios = torch.tensor([ratio, ratio * spread], dtype=torch.float64)
    if ratios.max() >= 2.0**28:
        with pytest.raises(RewriteError, match="too far apart"):
            dyadic(ratios)
        return
    (multiplier,), shift = dyadic(ratios)
    assert int(multiplier.max()) < 2**29 and 1 <= shift <= 61
    error = (multiplier.double() / 2.0**shift - ratios).abs().max()
    assert error <= max(float(ratios.max()) * 2.0**-28, 2.0**-62)


def test_a_ratio_that_is_no_number_is_refused() -> None:
    with pytest.raises(RewriteError, match="nan"):
        dyadic(torch.tensor(math.nan))


# --- products --------------------------------------------------------------------------------------------------


def test_linear_by_hand() -> None:
    input, weight = ints([1, -2], [127, -128], dtype=torch.int8), ints([3, 4], [-127, 127], [0, 1], dtype=torch.int8)
    assert integer_linear(input, weight, None).tolist() == [[-5, -381, -2], [-131, -32385, -128]]
    assert integer_linear(input, weight, ints(10, 2**30, -7)).tolist() == [
        [5, 2**30 - 381, -9],
        [-121, 2**30 - 32385, -135],
    ]


@pytest.mark.parametrize("sizes", [(7, 33, 5), (1, 1, 1), (2, 4096, 3)])
def test_linear_is_exact(sizes: tuple[int, int, int]) -> None:
    rows, columns, outputs = sizes
    input, weight = int8(2, rows, columns), int8(outputs, columns, seed=1)
    found = integer_linear(input, weight, None)
    assert found.dtype is torch.int32
    assert torch.equal(found.double(), F.linear(input.double(), weight.double()))


def test_the_widest_linear_does_not_overflow() -> None:
    columns = 2**16
    low, high = (torch.full((1, columns), value, dtype=torch.int8) for value in (-128, 127))
    assert integer_linear(low, high, ints(-(2**29))).item() == -128 * 127 * columns - 2**29


def test_matmul_of_probabilities() -> None:
    weights = ints([[0, 1 << PROBABILITY], [255, 256]])
    value = ints([[1, -128], [127, 3]], dtype=torch.int8)
    assert integer_matmul(weights, value).tolist() == [[[127 << 15, 3 << 15], [255 + 256 * 127, -255 * 128 + 768]]]


# --- functions -------------------------------------------------------------------------------------------------


def test_gelu_is_gelu_but_for_its_polynomial() -> None:
    x = torch.linspace(-10, 10, 40001, dtype=torch.float64)
    assert (real(integer_gelu(fixed(x))) - F.gelu(x)).abs().max() < ERF + 1e-4
    t = (x.abs() / math.sqrt(2)).clamp(max=1.769)
    polynomial = x / 2 * (1 + x.sign() * (1 - 0.2888 * (t - 1.769) ** 2))
    assert (real(integer_gelu(fixed(x))) - polynomial).abs().max() < 2e-4


def test_gelu_at_the_ends() -> None:
    given = ints(INT32[0], INT32[0] + 1, -8 * ONE, 0, 8 * ONE, INT32[1])
    assert integer_gelu(given).tolist() == [0, 0, 0, 0, 8 * ONE, INT32[1]]


def softmax_bound(probability: Tensor) -> Tensor:
    return probability * 5e-3 + 2.0 ** -(PROBABILITY + 1) + 1e-9


@pytest.mark.parametrize("keys", [1, 2, 17, 128, 1000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_softmax_is_softmax(keys: int, spread: float) -> None:
    scores = random(2, 3, 5, keys) * spread
    found = integer_softmax(fixed(scores))
    exact = real(fixed(scores)).softmax(-1)
    assert ((found.double() / 2**PROBABILITY - exact).abs() <= softmax_bound(exact)).all()
    assert (found.sum(-1) - 2**PROBABILITY).abs().max() <= keys / 2


def test_softmax_of_equal_scores_and_of_one() -> None:
    assert integer_softmax(torch.full((1, 1, 1, 5), -77)).tolist() == [[[[6554] * 5]]]  # 2^15 / 5 = 6553.6
    assert integer_softmax(ints([[[INT32[0]]]])).tolist() == [[[[1 << PROBABILITY]]]]
    assert integer_softmax(ints([[[INT32[0], INT32[1]]]])).tolist() == [[[[0, 1 << PROBABILITY]]]]


def test_a_long_row_keeps_its_weight() -> None:
    """Floored bytes lose a tenth of a row of 128 keys, and all of one of 512."""
    found = integer_softmax(fixed(random(1, 1, 4, 4096)))
    assert (found.sum(-1) / 2**PROBABILITY - 1).abs().max() < 0.01


@pytest.mark.parametrize("empty", ["zeros", "mean"])
def test_masks_are_those_of_attention(empty: str) -> None:
    scores = random(2, 3, 6, 6)
    key_mask = torch.tensor([[True] * 6, [False, True, True, True, False, False]])
    mask = (torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3) & ~torch.eye(6, dtype=torch.bool)
    allowed = mask & key_mask[:, None, None] & band(6, 6, 2, 1)
    assert (~allowed.any(-1)).any(), "there is a row without keys"
    found = integer_softmax(fixed(scores), mask, key_mask, 2, 1, empty).double() / 2**PROBABILITY
    eye = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    exact = attention(scores, eye, eye, mask, key_mask, 2, 1, 1.0, empty=empty)
    assert ((found - exact).abs() <= softmax_bound(exact) + 2e-5).all()


def test_rows_of_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="but not nan, found 'nan'"):
        integer_softmax(ints([[[1]]]), empty="nan")


@given(st.one_of(st.integers(0, 2**62 - 1), st.integers(1, 2**31 - 1).map(lambda root: root * root)))
def test_square_root_is_exact(value: int) -> None:
    for x in (value, max(value - 1, 0)):
        assert square_root(TORCH, torch.tensor([[x]])).item() == max(math.isqrt(x), 1)


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    found = integer_layer_norm(
        x, weight if weight is None else fixed(weight), bias if bias is None else fixed(bias),
        round(eps * 2**EPS_FRACTION),
    )  # fmt: skip
    return real(found)


@pytest.mark.parametrize("size", [1, 3, 64, 1023])
@pytest.mark.parametrize("spread", [100, 8000])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_layer_norm(size: int, spread: int, affine: bool) -> None:
    x = (random(4, size) * spread + spread / 3).round().clamp(-32768, 32767).to(torch.int32)
    weight, bias = (random(size, seed=1), random(size, seed=2)) if affine else (None, None)
    exact = F.layer_norm(x.double(), (size,), weight, bias, 1e-5)
    # A sixteenth of a step of the mean, and a thousandth of the deviation's step of 2^-10.
    assert (normed(x, weight, bias, 1e-5) - exact).abs().max() < 0.5 / spread


def test_layer_norm_by_hand() -> None:
    assert normed(ints([1000, -1000]), None, None, 0.0).tolist() == [[1.0, -1.0]]
    assert normed(ints([3, 3, 3]), None, ints(1, 2, 3).double(), 0.0).tolist() == [[1.0, 2.0, 3.0]]
    # The deviation of 2, 0, 0, 0 is sqrt(3)/2; eps 13/4 makes it 2.
    assert normed(ints([2, 0, 0, 0]), None, None, 3.25).tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_layer_norm_at_the_ends() -> None:
    alternating = torch.tensor([-32768, 32767] * 2048, dtype=torch.int32)
    assert (normed(alternating[None], None, None, 1e-5).abs() - 1).abs().max() < 1e-4
    lone = torch.full((1, 4096), -32768, dtype=torch.int32)
    lone[0, 7] = 32767
    assert abs(normed(lone, None, None, 0.0)[0, 7] - math.sqrt(4095)) < 1e-2
    heavy = torch.full((4096,), INT32[1], dtype=torch.int32)
    assert integer_layer_norm(lone, heavy, heavy, 2**61).abs().max() <= INT32[1]
    assert integer_layer_norm(lone, heavy, -heavy, 0)[0, 7] == INT32[1]  # 64 * 32768 does not fit, and is kept in range
    step = torch.zeros(1, 4096, dtype=torch.int32)
    step[0, 0] = 1
    assert abs(normed(step, None, None, 0.0)[0, 0] - 16) < 0.1  # a deviation of 1/64 counts as 1/16


def test_no_operator_computes_in_floats() -> None:
    x, weight = torch.randint(-30000, 30000, (2, 5, 8), dtype=torch.int32), int8(4, 8)
    scores, mask = torch.randint(-(2**20), 2**20, (2, 3, 5, 5), dtype=torch.int32), torch.ones(2, 5, dtype=torch.bool)
    one = torch.tensor(3)
    with NoFloats():
        small = requantize(x, one, 9, one, -128, 127)
        integer_add(x, small, one, one, 4, -32768, 32767)
        integer_linear(small, weight, x[0, 0, :4])
        integer_matmul(integer_softmax(scores, None, mask, 3, 0, "mean"), small[:, None].expand(2, 3, 5, 8))
        integer_gelu(x)
        integer_layer_norm(x, x[0, 0], x[0, 1], 100)


# --- the numbers of a linear layer -----------------------------------------------------------------------------


def linear_error(rows: Tensor, weight: Tensor, bias: Tensor) -> float:
    codes = choose_codes(rows.amin(0), rows.amax(0), rows, [weight], [bias])
    made = integer_weight(weight, bias, codes)
    given = ((rows / codes.scale).round() + codes.zero_point).clamp(-128, 127).to(torch.int8)
    found = integer_linear(given, made.weight, made.bias.to(torch.int32)) * made.scale
    exact = F.linear(rows, weight, bias)
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_linear_layer_in_integers_is_close() -> None:
    rows, weight, bias = random(64, 48), random(32, 48, seed=1), random(32, seed=2)
    assert linear_error(rows, weight, bias) < 0.02
    outliers, middles = torch.ones(48).double(), torch.zeros(48).double()
    outliers[::12], middles[5] = 30.0, 200.0  # with one scale the rest of the rows would be lost
    assert linear_error(rows * outliers + middles, weight, bias) < 0.02


def test_a_channel_of_zeros_and_a_weight_of_zeros() -> None:
    rows, weight, bias = random(64, 48), random(32, 48, seed=1), random(32, seed=2)
    rows[:, 3], weight[4] = 0.0, 0.0
    assert linear_error(rows, weight, bias) < 0.02


def test_zero_points_that_do_not_fit_are_left_out() -> None:
    """All channels far to one side: the zero points' part of the bias would leave 32 bits."""
    rows = random(8, 2**14) * 1e-3 + 100
    weight, bias = torch.ones(2, 2**14).double(), torch.zeros(2).double()
    codes = choose_codes(rows.amin(0), rows.amax(0), rows, [weight], [bias])
    assert not codes.zero_point.any()
    assert integer_weight(weight, bias, codes).fits


def test_codes_round_like_the_operator() -> None:
    codes = Codes(torch.tensor([0.5, 2.0]).double(), torch.tensor([3, -100]))
    assert codes.rounded(torch.tensor([[1.0, 1000.0], [-100.0, -1.0]]).double()).tolist() == [
        [1.0, 454.0],
        [-65.5, 0.0],
    ]
