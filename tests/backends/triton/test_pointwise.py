"""Every elementwise operator of the table beside PyTorch's own, in the interpreter."""

import math
from typing import Any

import pytest
import torch
from build import normal
from kernels_agree import agree, calling, made_of, ran
from torch import Tensor

from fxpress.backends.triton.lowerings.table import POINTWISE
from fxpress.ir.ops.float8 import FLOAT8, float8_quantize

aten = torch.ops.aten
INTEGER = ("bitwise", "shift", "__and__", "__or__", "__xor__")
FLOAT_ONLY = (
    "relu6", "hardtanh", "hardsigmoid", "hardswish", "silu", "mish", "softplus", "gelu", "elu", "leaky_relu", "frac",
    "lerp", "log", "exp", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf", "reciprocal", "floor", "ceil", "round",
    "trunc", "float8", "addcmul", "isinf", "isnan", "isfinite", "true_divide",
)  # fmt: skip
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -3.5, math.inf, -math.inf, math.nan, 1e-4, -1e-4, 30.0, -30.0]
BOOLEAN = ("logical", "bitwise_and", "bitwise_not")


def values(dtype: torch.dtype, seed: int, special: bool) -> Tensor:
    """An odd-sized, non-contiguous matrix; its first row special values if asked for."""
    if dtype is torch.bool:
        return (normal(5, 37, seed=seed) > 0).t()
    if not dtype.is_floating_point:
        return torch.randint(-9, 9, (5, 37), generator=torch.Generator().manual_seed(seed)).to(dtype).t()
    found = normal(5, 37, seed=seed)
    if special:
        found[0, : len(SPECIAL)] = torch.tensor(SPECIAL)
    return found.to(dtype).t()


def arguments(target: Any, dtype: torch.dtype, special: bool) -> list[Any]:
    """Arguments for each parameter without a default; the second tensor broadcasts, shifts and divisors are > 0."""
    found: list[Any] = []
    for number, parameter in enumerate(target._schema.arguments):
        if parameter.kwarg_only or (parameter.has_default_value() and parameter.name != "rounding_mode"):
            continue
        kind = str(parameter.type)
        if kind == "Tensor":
            item = values(dtype, number, special and number == 0)
            if number:
                item = item[:1]
            if "shift" in str(target) and number:
                item = item.abs() % 5
            if any(name in str(target) for name in ("div", "remainder", "fmod")) and number:
                item = torch.where(item == 0, torch.ones_like(item), item)
            found.append(item)
        else:
            found.append(3 if not dtype.is_floating_point else 0.75)
    return found


CASES = [
    pytest.param(target, dtype, id=f"{target}-{str(dtype).removeprefix('torch.')}")
    for target in POINTWISE
    for dtype in (torch.float32, torch.float16, torch.int64, torch.bool)
    if (dtype.is_floating_point and not any(name in str(target) for name in INTEGER))
    or (dtype is torch.int64 and not any(name in str(target) for name in FLOAT_ONLY))
    or (dtype is torch.bool and any(name in str(target) for name in BOOLEAN))
]


@pytest.mark.parametrize(("target", "dtype"), CASES)
def test_equals_eager(target: Any, dtype: torch.dtype) -> None:
    given = arguments(target, dtype, special=True)
    options = {"rounding_mode": "floor"} if str(target).endswith("_mode") else {}
    made, tensors = calling(target, *given, **options)
    agree(made, tensors)


def test_float8_is_rounded_as_pytorch_rounds_it() -> None:
    """Numbers with every exponent and every first seven bits of the fraction, which holds all ties, and their
    neighbours."""
    bits = torch.arange(0x7F80, dtype=torch.int32) << 16
    x = torch.cat([bits, bits[1:] - 1, bits + 1]).view(torch.float32)
    x = torch.cat([x, -x, torch.tensor([math.inf, -math.inf])])
    made, tensors = calling(float8_quantize, x, torch.ones(()))
    assert torch.equal(ran(agree(made, tensors), tensors)[0], x.clamp(-448, 448).to(FLOAT8).float())


def test_the_negative_of_zero_has_a_sign() -> None:
    made, tensors = calling(aten.neg.default, torch.tensor([0.0, -0.0]))
    assert ran(made_of(made), tensors)[0].signbit().tolist() == [True, False]


@pytest.mark.parametrize("rounding_mode", ["trunc", "floor"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_division_rounds_as_it_is_told(rounding_mode: str, dtype: torch.dtype) -> None:
    x, y = (torch.tensor(item).to(dtype) for item in ([7, -7, 7, -7, 6, -6, 0], [2, 2, -2, -2, 3, 3, 5]))
    agree(*calling(aten.div.Tensor_mode, x, y, rounding_mode=rounding_mode))


def all_kinds(seed: int) -> Tensor:
    """Numbers of every exponent, NaN and infinities, small whole ones and the ends of what a float can be."""
    made = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=made).to(torch.int32).view(torch.float32)
    whole = torch.randint(-50, 50, (4000,), generator=made).float()
    ends = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 3.4e38, -1e-45, math.nan])
    return torch.cat([bits, whole, ends.repeat(len(ends)) if seed else ends.repeat_interleave(len(ends))])


@pytest.mark.parametrize("target", [aten.remainder.Tensor, aten.fmod.Tensor])
def test_the_rest_of_a_division_is_exact(target: Any) -> None:
    """However often y is in x; on a CPU PyTorch's own is NaN where x / y is too large, but not in fp64."""
    made, tensors = calling(target, all_kinds(0), all_kinds(1))
    (found,), expected = ran(made_of(made), tensors), target(*(item.double() for item in tensors)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & (found == 0), expected.signbit() & (found == 0))


def test_whole_quotients_are_those_of_pytorch() -> None:
    made, tensors = calling(aten.floor_divide.default, all_kinds(0), all_kinds(1))
    (found,), expected = ran(made_of(made), tensors), torch.floor_divide(*tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & (found == 0), expected.signbit() & (found == 0))


@pytest.mark.parametrize("target", [aten.remainder.Tensor, aten.div.Tensor_mode])
def test_the_rest_of_float64_is_left_to_pytorch(target: Any) -> None:
    x, y = torch.tensor([1e6, -5.0]).double(), torch.tensor([0.1, math.inf]).double()
    options = {"rounding_mode": "floor"} if target is aten.div.Tensor_mode else {}
    runner = agree(*calling(target, x, y, **options))
    assert [reason for _, reason, _ in runner.generated.externs]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (normal(3, 4), torch.tensor(2.5)),  # a tensor without axes promotes as a number does
        (torch.arange(6), torch.tensor(0.5)),
        (torch.arange(6, dtype=torch.int32), torch.arange(6)),
        (normal(6, dtype=torch.float16), normal(6)),
        (torch.arange(6) > 2, torch.arange(6)),
        (normal(1, 3, 1), normal(4, 1, 5)),
        (normal(0, 3), normal(3)),
        (normal(1), normal(1)),
        (torch.tensor(2.0), torch.tensor(3.0)),
    ],
)
def test_dtypes_promote_and_shapes_broadcast(x: Tensor, y: Tensor) -> None:
    agree(*calling(aten.mul.Tensor, x, y))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize(
    "target", [aten.add.Tensor, aten.remainder.Scalar, aten.bitwise_xor.Scalar, aten.gt.Scalar, aten.eq.Scalar]
)
def test_a_number_that_a_dtype_has_no_room_for_loses_its_upper_bits(target: Any, dtype: torch.dtype) -> None:
    x = torch.tensor([1, -1, 3, 127, -128]).to(dtype)
    agree(*calling(target, x, 2**40 + 300))
    agree(*calling(target, x, -(2**40) - 1))


def test_bits_of_unsigned_integers_are_turned_over() -> None:
    agree(*calling(aten.bitwise_not.default, torch.tensor([0, 1, 200], dtype=torch.uint8)))


def test_alpha_and_a_number_count() -> None:
    agree(*calling(aten.add.Tensor, normal(5), normal(5, seed=1), alpha=2.5))
    agree(*calling(aten.sub.Tensor, torch.arange(5), 3, alpha=2))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_both_ways(approximate: str) -> None:
    agree(*calling(aten.gelu.default, normal(65), approximate=approximate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gelu_of_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Of all numbers of float16: what is computed in fewer steps is as near as one rounding, or 1e-6."""
    x = torch.arange(2**16).to(torch.int16).view(torch.float16).to(dtype)
    x = x[x.isfinite()]
    runner = agree(*calling(aten.gelu.default, x))
    assert ("gelu_to_half(" in runner.source) == (dtype is torch.float16)
    (found,) = ran(runner, [x])
    exact = torch.nn.functional.gelu(x.double())
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    x[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    (found,) = ran(runner, [x])
    assert found[0] == math.inf and found[1:3].isnan().all()


def test_small_numbers_keep_their_digits() -> None:
    """tanh, expm1 and log1p by exp and log alone would lose them."""
    small = normal(64) * 1e-3
    for target in (aten.tanh.default, aten.expm1.default, aten.log1p.default):
        agree(*calling(target, small))


def test_strides_of_any_kind() -> None:
    whole = normal(6, 8, 10)
    for item in (whole[::2, 1:, ::3], whole.permute(2, 0, 1), whole[0].expand(4, 8, 10), whole.flatten()[5:]):
        agree(*calling(aten.add.Tensor, item, item))
