"""Operators of quantization: integers worked out by hand, saturation, scales of every shape, gradients, packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.ops.quantize import (
    SMALLEST_SCALE,
    dequantize,
    dynamic_quantize,
    expand_int4,
    int4_embedding,
    int4_linear,
    int8_linear,
    int8_weight_linear,
    pack_int4,
    quantize,
    unpack_int4,
)

HALF = (torch.float16, torch.bfloat16)


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def int8(*sizes: int, seed: int = 0, low: int = -128) -> Tensor:
    """Random integers, low..127."""
    return torch.randint(low, 128, sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


# --- quantize --------------------------------------------------------------------------------------------------


def test_quantize_rounds_to_the_nearest_and_ties_to_even() -> None:
    x = numbers(-1.25, -0.75, -0.25, 0.24, 0.25, 0.26, 0.75, 1.25)
    assert quantize(x, torch.tensor(0.5)).tolist() == [-2, -2, 0, 0, 0, 1, 2, 2]


def test_quantize_adds_the_zero_point_after_rounding() -> None:
    """2.5 is rounded to 2, then 3 is added; 2.5 + 3 rounded would be 6."""
    assert quantize(numbers(2.5), torch.tensor(1.0), torch.tensor(3.0)).tolist() == [5]


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (4, -8, 7), (2, -2, 1)])
def test_quantize_saturates(bits: int, low: int, high: int) -> None:
    x = numbers(-1e30, low - 1, low, high, high + 1, 1e30)
    assert quantize(x, torch.tensor(1.0), bits=bits).tolist() == [low, low, low, high, high, high]


def test_quantize_saturates_behind_the_zero_point() -> None:
    found = quantize(numbers(-228, -227, 27, 28), torch.tensor(1.0), torch.tensor(100))
    assert found.tolist() == [-128, -127, 127, 127]


def test_quantize_keeps_infinities_at_the_ends() -> None:
    assert quantize(numbers(-torch.inf, torch.inf), torch.tensor(1.0)).tolist() == [-128, 127]


def test_quantize_by_output_channel() -> None:
    found = quantize(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[1.0], [0.5]]))
    assert found.tolist() == [[1, 2], [2, 4]]


def test_quantize_by_channel_of_the_last_axis() -> None:
    assert quantize(torch.ones(2, 2), torch.tensor([[1.0, 0.5]])).tolist() == [[1, 2], [1, 2]]


def test_quantize_by_token() -> None:
    found = quantize(torch.ones(1, 2, 3), torch.tensor([[[1.0], [0.25]]]))
    assert found.tolist() == [[[1, 1, 1], [4, 4, 4]]]


@pytest.mark.parametrize(
    ("width", "groups", "sizes"),
    [
        (4, 2, (2, 2)),
        (8, 2, (4, 4)),
        (5, 2, (4, 1)),  # two groups of 4 suffice, two of 2 do not
        (7, 2, (4, 3)),
        (9, 3, (4, 4, 1)),
        (96, 3, (32, 32, 32)),
        (100, 4, (32, 32, 32, 4)),
        (3, 1, (3,)),
        (3, 3, (1, 1, 1)),
    ],
)
def test_groups_are_of_the_least_power_of_two_that_suffices(width: int, groups: int, sizes: tuple[int, ...]) -> None:
    scale = 2.0 ** -torch.arange(groups)
    found = quantize(torch.ones(1, width), scale[None])
    assert found.tolist() == [[2**place for place, size in enumerate(sizes) for _ in range(size)]]


def test_each_group_has_its_zero_point() -> None:
    scale, zero_point = torch.ones(1, 2), torch.tensor([[1, -1]], dtype=torch.int8)
    integers = quantize(torch.zeros(1, 5), scale, zero_point)
    assert integers.tolist() == [[1, 1, 1, 1, -1]]
    assert dequantize(integers, scale, zero_point).tolist() == [[0.0] * 5]


def test_stored_integers_are_int8_and_equal_those_that_are_not() -> None:
    x, scale = normal(3, 5), torch.tensor(0.02)
    found = quantize(x, scale, stored=True)
    assert found.dtype is torch.int8
    assert torch.equal(found.float(), quantize(x, scale))


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_quantize_gives_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    found = quantize(numbers(0.5, 0.75, 1.0, dtype=dtype), torch.tensor(0.25), torch.tensor(1, dtype=torch.int8))
    assert found.dtype is dtype and found.tolist() == [3, 4, 5]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_an_empty_batch(shape: tuple[int, ...]) -> None:
    assert quantize(torch.zeros(shape), torch.tensor(1.0)).shape == shape


# --- dequantize ------------------------------------------------------------------------------------------------


def test_dequantize_takes_the_zero_point_off() -> None:
    found = dequantize(torch.tensor([-128, 3, 127], dtype=torch.int8), torch.tensor(0.5), torch.tensor(3))
    assert found.tolist() == [-65.5, 0, 62]


def test_dequantize_does_not_overflow_bytes() -> None:
    """-128 - 127 is no byte."""
    integers, zero_point = torch.tensor([-128], dtype=torch.int8), torch.tensor(127, dtype=torch.int8)
    assert dequantize(integers, torch.tensor(1.0), zero_point).tolist() == [-255]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float16, torch.float8_e4m3fn])
def test_dequantize_takes_any_dtype_and_gives_the_scales(dtype: torch.dtype) -> None:
    found = dequantize(torch.tensor([2.0, 6.0]).to(dtype), torch.tensor(0.5, dtype=torch.float64))
    assert found.dtype is torch.float64 and found.tolist() == [1, 3]


@st.composite
def inside(draw: Any) -> tuple[list[float], float, int]:
    """Numbers that integers of 8 bits reach, with their scale and zero point."""
    scale = draw(st.floats(1e-6, 1e6))
    zero_point = draw(st.integers(-128, 127))
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    return draw(st.lists(st.floats(low, high), min_size=1, max_size=20)), scale, zero_point


@given(inside())
def test_error_inside_the_range_is_at_most_half_a_step(case: tuple[list[float], float, int]) -> None:
    values, number, shift = case
    x, scale, zero_point = (torch.tensor(item, dtype=torch.float64) for item in (values, number, shift))
    error = (x - dequantize(quantize(x, scale, zero_point), scale, zero_point)).abs()
    assert (error <= scale / 2 * (1 + 1e-12)).all()


@given(st.integers(-128, 127), st.integers(-128, 127), st.floats(1e-6, 1e6))
def test_what_integers_stand_for_is_quantized_to_them(integer: int, shift: int, number: float) -> None:
    scale, zero_point = torch.tensor(number), torch.tensor(float(shift))
    value = dequantize(torch.tensor([integer], dtype=torch.int8), scale, zero_point)
    assert quantize(value, scale, zero_point).tolist() == [integer]


# --- gradients -------------------------------------------------------------------------------------------------


def test_gradient_passes_rounding_and_stops_where_saturated() -> None:
    x = numbers(-200, -128, -0.4, 0, 0.5, 127, 200).requires_grad_()
    quantize(x, torch.tensor(1.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_gradient_of_quantize_and_dequantize_is_that_of_the_identity() -> None:
    x = normal(3, 8).requires_grad_()
    scale = torch.tensor([[0.1], [0.2], [0.3]])
    dequantize(quantize(x, scale), scale).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 8))


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_gradient_passes_a_range_taken_at_run_time(per: str) -> None:
    x = normal(3, 8).requires_grad_()
    dequantize(*dynamic_quantize(x, per)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 8))


def test_no_gradient_passes_stored_integers() -> None:
    x = normal(3, 8).requires_grad_()
    assert not quantize(x, torch.tensor(0.1), stored=True).requires_grad
    assert not dynamic_quantize(x, "token", stored=True)[0].requires_grad


# --- dynamic_quantize ------------------------------------------------------------------------------------------


def test_dynamic_per_tensor() -> None:
    """-1..4 in 255 steps: scale 5/255, zero is 51 steps above the lowest integer."""
    integers, scale, zero_point = dynamic_quantize(torch.tensor([[-1.0, 0.0], [1.0, 4.0]]), "tensor")
    assert integers.tolist() == [[-128, -77], [-26, 127]]
    assert zero_point.item() == -77 and scale.item() == pytest.approx(5 / 255)


@pytest.mark.parametrize(
    ("values", "integers", "point"), [((1.0, 2.0), [0, 127], -128), ((-1.0, -2.0), [0, -128], 127)]
)
def test_range_of_a_tensor_contains_zero(values: tuple[float, ...], integers: list[int], point: int) -> None:
    """Half of the range is 127.5 steps from either end: a tie, that goes to the even integer, 128 steps."""
    found, _, zero_point = dynamic_quantize(numbers(*values), "tensor")
    assert found[1].item() == integers[1] and abs(found[0].item() - integers[0]) <= 1
    assert zero_point.item() == point


def test_dynamic_per_token_is_symmetric() -> None:
    integers, scale, zero_point = dynamic_quantize(torch.tensor([[-1.0, 0.5], [2.0, 254.0]]), "token")
    assert integers.tolist() == [[-127, 64], [1, 127]]  # 63.5 steps: a tie
    torch.testing.assert_close(scale, torch.tensor([[1 / 127], [2.0]]))
    assert zero_point.item() == 0


def test_dynamic_of_unsigned_tokens_starts_at_the_lowest_integer() -> None:
    integers, scale, zero_point = dynamic_quantize(torch.tensor([[0.0, 1.0, 255.0], [0.0, 0.2, 1.0]]), "token", True)
    assert integers.tolist() == [[-128, -127, 127], [-128, -77, 127]]
    torch.testing.assert_close(scale, torch.tensor([[1.0], [1 / 255]]))
    assert zero_point.item() == -128


def test_unsigned_tokens_have_half_the_error() -> None:
    x = normal(64, 64).abs()
    signed, unsigned = (dequantize(*dynamic_quantize(x, "token", each)) - x for each in (False, True))
    assert unsigned.square().mean().sqrt() < 0.55 * signed.square().mean().sqrt()


def test_dynamic_shapes() -> None:
    x = normal(2, 3, 4)
    assert [item.shape for item in dynamic_quantize(x, "tensor")] == [(2, 3, 4), (), ()]
    assert [item.shape for item in dynamic_quantize(x, "token")] == [(2, 3, 4), (2, 3, 1), ()]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("arguments", [("tensor", False), ("token", False), ("token", True)])
def test_zeros_stay_zeros(dtype: torch.dtype, arguments: tuple[str, bool]) -> None:
    found = dequantize(*dynamic_quantize(torch.zeros(3, 4, dtype=dtype), *arguments))
    assert found.dtype is dtype and not found.any()


def test_a_row_of_zeros_beside_others() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    integers, scale, _ = dynamic_quantize(x, "token")
    assert integers.tolist() == [[0, 0], [64, -127]]
    assert scale[0].item() == pytest.approx(SMALLEST_SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("value", [-3.0, 7.0])
@pytest.mark.parametrize("per", ["tensor", "token"])
def test_a_constant_input_is_kept(value: float, per: str, dtype: torch.dtype) -> None:
    x = torch.full((3, 4), value, dtype=dtype)
    torch.testing.assert_close(dequantize(*dynamic_quantize(x, per)), x, rtol=2e-2 if dtype in HALF else 1e-6, atol=0)


@pytest.mark.parametrize("arguments", [("tensor", False), ("token", False), ("token", True)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("size", ["subnormal", "largest"])
def test_extreme_sizes_give_finite_numbers(size: str, dtype: torch.dtype, arguments: tuple[str, bool]) -> None:
    """The range of half-precision numbers may be wider than their largest, and a step less than their smallest."""
    info = torch.finfo(dtype)
    if size == "largest" and dtype is not torch.float16:
        end = info.max / 4
    else:
        end = info.smallest_normal / 64 if size == "subnormal" else info.max
    x = torch.tensor([[end, 0.0, -end * (not arguments[1])]], dtype=dtype)
    assert all(item.isfinite().all() for item in dynamic_quantize(x, *arguments))


def test_dynamic_of_half_precision_keeps_its_dtype() -> None:
    assert [item.dtype for item in dynamic_quantize(normal(2, 4).half(), "token")] == [torch.float16] * 3


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_dynamic_of_an_empty_batch(per: str) -> None:
    integers, scale, _ = dynamic_quantize(torch.zeros(0, 4), per, stored=True)
    assert integers.shape == (0, 4) and scale.shape == (() if per == "tensor" else (0, 1))


def test_dynamic_refuses_another_range() -> None:
    with pytest.raises(ValueError, match="per must be 'tensor' or 'token', found 'row'"):
        dynamic_quantize(torch.zeros(2), "row")


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_error_of_a_range_taken_at_run_time_is_at_most_half_a_step(per: str) -> None:
    """The ends of a tensor's range may be off by half a step more: zero has to be an integer."""
    x = normal(50, 33)
    integers, scale, zero_point = dynamic_quantize(x, per)
    steps = (dequantize(integers, scale, zero_point) - x).abs() / scale
    assert steps.max() <= (1.0 if per == "tensor" else 0.5) + 1e-4


# --- int8_linear -----------------------------------------------------------------------------------------------


def test_int8_linear_by_hand() -> None:
    """Row (3 - 1, -2 - 1) times (4, 5) is -7; times 0.5 * 2, plus 1: -6."""
    integers = torch.tensor([[3, -2]], dtype=torch.int8)
    weight = torch.tensor([[4, 5], [1, 0]], dtype=torch.int8)
    scales = torch.tensor(0.5), torch.tensor([[2.0], [4.0]])
    found = int8_linear(integers, scales[0], torch.tensor(1.0), weight, scales[1], numbers(1, 0))
    assert found.tolist() == [[-6, 4]]


@pytest.mark.parametrize("zero_point", [None, -128, 127, 3])
def test_int8_linear_is_exact_at_the_extremes(zero_point: int | None) -> None:
    """Sums of 4096 products of which the largest are 255 * 128, against Python's integers."""
    integers, weight = int8(3, 4096), int8(2, 4096, seed=1)
    integers[0], integers[1], weight[0] = -128, 127, -128
    wide = torch.ones((), dtype=torch.float64)
    point = None if zero_point is None else torch.tensor(float(zero_point))
    found = int8_linear(integers, wide, point, weight, wide.expand(2, 1), None)
    rows, columns = integers.tolist(), weight.tolist()
    shift = zero_point or 0
    expected = [[sum((a - shift) * b for a, b in zip(row, column, strict=True)) for column in columns] for row in rows]
    assert found.tolist() == expected


def test_int8_linear_in_fp32_rounds_only_the_sum_and_the_product() -> None:
    integers, weight = torch.full((1, 4096), 127, dtype=torch.int8), torch.full((1, 4096), 127, dtype=torch.int8)
    found = int8_linear(integers, torch.tensor(0.1), None, weight, torch.tensor([[0.3]]), None)
    assert found.item() == (torch.tensor(float(4096 * 127 * 127)) * (torch.tensor(0.1) * torch.tensor(0.3))).item()


@pytest.mark.parametrize("per", ["tensor", "token"])
@pytest.mark.parametrize("bias", [None, normal(6, seed=3)])
def test_int8_linear_is_the_linear_layer_of_dequantized_operands(per: str, bias: Tensor | None) -> None:
    integers, scale, zero_point = dynamic_quantize(normal(2, 5, 33), per, stored=True)
    weight, columns = int8(6, 33, seed=1, low=-127), normal(6, 1, seed=2).abs()
    expected = F.linear(dequantize(integers, scale, zero_point), dequantize(weight, columns), bias)
    torch.testing.assert_close(
        int8_linear(integers, scale, zero_point, weight, columns, bias), expected, rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("dtype", HALF)
def test_int8_linear_sums_beyond_half_precision(dtype: torch.dtype) -> None:
    """The sum is 128 * 127 * 127 = 2064512, no float16; the result is near 2."""
    integers = torch.full((1, 128), 127, dtype=torch.int8)
    scale = torch.tensor(0.001, dtype=dtype)
    found = int8_linear(integers, scale, None, integers, torch.tensor([[0.001]], dtype=dtype), None)
    assert found.dtype is dtype and found.item() == pytest.approx(2064512 * scale.item() ** 2, rel=1e-2)


def test_int8_linear_of_an_empty_batch() -> None:
    integers = torch.zeros(0, 3, dtype=torch.int8)
    found = int8_linear(integers, torch.ones(0, 1), None, int8(2, 3), torch.ones(2, 1), torch.ones(2))
    assert found.shape == (0, 2)


# --- four bits -------------------------------------------------------------------------------------------------


def test_pack_puts_the_first_integer_in_the_lower_half() -> None:
    assert pack_int4(torch.tensor([[-8, 7], [0, 1]], dtype=torch.int8)).tolist() == [[0xF0], [0x98]]


def test_pack_fills_odd_widths_with_zero() -> None:
    assert pack_int4(torch.tensor([[-7, 2, 5]], dtype=torch.int8)).tolist() == [[0xA1, 0x8D]]


@pytest.mark.parametrize("width", [1, 2, 3, 16, 33])
def test_unpack_gives_what_was_packed(width: int) -> None:
    integers = int8(5, width) >> 4
    packed = pack_int4(integers)
    assert packed.dtype is torch.uint8 and packed.shape == (5, (width + 1) // 2)
    assert torch.equal(unpack_int4(packed, width), integers)


def test_every_pair_of_integers_survives_packing() -> None:
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(pairs)
    assert len(packed.unique()) == 256 and torch.equal(unpack_int4(packed, 2), pairs)


def test_int4_linear_by_hand() -> None:
    """The weights are (3 - 1) * 2 = 4 and (-8 - 1) * 2 = -18."""
    weight = pack_int4(torch.tensor([[3, -8]], dtype=torch.int8))
    point = torch.ones(1, 1, dtype=torch.int8)
    assert int4_linear(numbers(1, 0.5), weight, torch.tensor([[2.0]]), point, numbers(10)).tolist() == [5]


@pytest.mark.parametrize("width", [64, 70, 33])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_linear_is_the_linear_layer_of_the_dequantized_weight(width: int, symmetric: bool) -> None:
    """Groups of 32, the last of them shorter, and odd widths."""
    integers, groups = int8(6, width) >> 4, -(-width // 32)
    scale = normal(6, groups).abs()
    zero_point = None if symmetric else int8(6, groups, seed=1) >> 4
    x, bias = normal(2, 3, width), normal(6)
    columns = torch.arange(width) // 32
    weight = (integers - (0 if zero_point is None else zero_point[:, columns])) * scale[:, columns]
    torch.testing.assert_close(
        int4_linear(x, pack_int4(integers), scale, zero_point, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4
    )


def test_expand_int4_by_hand() -> None:
    """In groups of 2: (3 - 1) * 9, (-8 - 1) * 9, 7 * 15."""
    weight = pack_int4(torch.tensor([[3, -8, 7]], dtype=torch.int8))
    steps, points = torch.tensor([[9, 15]], dtype=torch.int8), torch.tensor([[1, 0]], dtype=torch.int8)
    found = expand_int4(weight, steps, points, 3)
    assert found.dtype is torch.int8 and found.tolist() == [[18, -81, 105]]


@pytest.mark.parametrize("dtype", HALF)
def test_int4_linear_of_half_precision(dtype: torch.dtype) -> None:
    integers = int8(6, 32) >> 4
    x = normal(2, 32, dtype=dtype)
    found = int4_linear(x, pack_int4(integers), torch.full((6, 1), 0.5), None, None)
    assert torch.equal(found, F.linear(x, (integers * 0.5).to(dtype)))


def test_int8_weight_linear_by_hand() -> None:
    """The weights are (100 - 1) * 2 = 198 and (-128 - 1) * 2 = -258, or with groups of one 198 and -129."""
    weight, point = torch.tensor([[100, -128]], dtype=torch.int8), torch.ones(1, 1, dtype=torch.int8)
    x = torch.tensor([[1.0, 0.5]])
    assert int8_weight_linear(x, weight, torch.tensor([[2.0]]), point, numbers(10)).tolist() == [[198 - 129 + 10]]
    scales, points = torch.tensor([[2.0, 1.0]]), point.expand(1, 2)
    assert int8_weight_linear(x, weight, scales, points, None).tolist() == [[198 - 64.5]]


def test_int4_embedding_by_hand() -> None:
    """Of row 1, in groups of 2: (3 - 1) * 2, (-8 - 1) * 2, 5 * 10."""
    weight = pack_int4(torch.tensor([[0, 0, 0], [3, -8, 5]], dtype=torch.int8))
    points = torch.tensor([[0, 0], [1, 0]], dtype=torch.int8)
    found = int4_embedding(weight, torch.tensor([[1.0, 1.0], [2.0, 10.0]]), points, torch.tensor([[1], [0]]), 3)
    assert found.tolist() == [[[4, -18, 50]], [[0, 0, 0]]]


@pytest.mark.parametrize("width", [64, 70, 33])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_embedding_is_the_lookup_in_the_dequantized_table(width: int, symmetric: bool) -> None:
    """Groups of 32, the last of them shorter, and odd widths."""
    integers, groups = int8(6, width) >> 4, -(-width // 32)
    scale = normal(6, groups).abs()
    zero_point = None if symmetric else int8(6, groups, seed=1) >> 4
    columns, indices = torch.arange(width) // 32, torch.tensor([[5, 0, 5], [2, 1, 4]])
    table = (integers - (0 if zero_point is None else zero_point[:, columns])) * scale[:, columns]
    assert torch.equal(int4_embedding(pack_int4(integers), scale, zero_point, indices, width), table[indices])


def test_int4_embedding_of_no_index() -> None:
    found = int4_embedding(pack_int4(int8(6, 32) >> 4), torch.ones(6, 1), None, torch.zeros(0, 3, dtype=torch.long), 32)
    assert found.shape == (0, 3, 32)
