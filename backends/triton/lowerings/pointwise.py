"""Elementwise operators as Triton's text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion
from torch._prims_common import elementwise_dtypes

from ....ir.graph import arguments
from ....ir.ops.float8 import float8_quantize
from ..emitter import CannotFuse, Emitter, Index, Value, computed, literal
from ..sizes import Size
from .table import POINTWISE, pointwise

aten = torch.ops.aten
FLOAT = Promotion.INT_TO_FLOAT
HALVES = (torch.float16, torch.bfloat16)
BOOL = Promotion.ALWAYS_BOOL


def lower_pointwise(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    """What a node of `POINTWISE` is at an index."""
    rule = POINTWISE[node.target]
    given = arguments(node)
    elements = {name: item for name, item in given.items() if name not in rule.numbers and _is_element(item)}
    facts = [item.meta["val"] if isinstance(item, fx.Node) else item for item in elements.values()]
    facts = [int(fact) if isinstance(fact, Size) else fact for fact in facts]
    dtype, result = elementwise_dtypes(*facts, type_promotion_kind=rule.promotion)
    if result.is_complex or dtype.is_complex:
        raise CannotFuse(f"{node.name} is of complex numbers")
    wide = computed(dtype)
    values = {name: emitter.operand(item, index, wide) for name, item in elements.items()}
    numbers = {name: given[name] for name in rule.numbers if name in given}
    if rule.narrow:
        numbers["narrow"] = result in HALVES
    code = rule.code(*values.values(), **numbers)
    kept = torch.bool if result is torch.bool else wide
    return emitter.let(_name(node), code, kept, *values.values())


def _is_element(item: Any) -> bool:
    return isinstance(item, fx.Node | bool | int | float | torch.SymInt | torch.SymFloat)


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1].strip("_")


def _number(value: Any, like: Value) -> str:
    return literal(value, like.dtype)


def _scaled(value: Value, alpha: Any) -> str:
    return f"{value}" if alpha == 1 else f"{value} * {_number(alpha, value)}"


# --- arithmetic --------------------------------------------------------------------------------------------------


@pointwise(aten.add.Tensor, aten.add.Scalar, numbers=("alpha",))
def _add(x: Value, y: Value, alpha: Any = 1) -> str:
    return f"{x} | {y}" if x.dtype is torch.bool else f"{x} + {_scaled(y, alpha)}"


@pointwise(aten.sub.Tensor, aten.sub.Scalar, numbers=("alpha",))
def _sub(x: Value, y: Value, alpha: Any = 1) -> str:
    return f"{x} - {_scaled(y, alpha)}"


@pointwise(aten.rsub.Tensor, aten.rsub.Scalar, numbers=("alpha",))
def _rsub(x: Value, y: Value, alpha: Any = 1) -> str:
    return f"{y} - {_scaled(x, alpha)}"


@pointwise(aten.mul.Tensor, aten.mul.Scalar)
def _mul(x: Value, y: Value) -> str:
    return f"{x} & {y}" if x.dtype is torch.bool else f"{x} * {y}"


@pointwise(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, promotion=FLOAT)
def _div(x: Value, y: Value) -> str:
    return f"{x} / {y}"


@pointwise(aten.div.Tensor_mode, aten.div.Scalar_mode, numbers=("rounding_mode",))
def _div_mode(x: Value, y: Value, rounding_mode: str | None) -> str:
    if rounding_mode is None:
        return f"{x} / {y}"
    if rounding_mode == "floor":
        return _floor_divide(x, y)
    return f"truncate(tl.div_rn({x}, {y}))" if x.dtype.is_floating_point else f"truncate_divide({x}, {y})"


@pointwise(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(x: Value, y: Value) -> str:
    return f"floor_{'quotient' if _has_rest(x) else 'divide'}({x}, {y})"


@pointwise(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def _remainder(x: Value, y: Value) -> str:
    return f"floor_mod({x}, {y})" if _has_rest(x) else f"{x} - floor_divide({x}, {y}) * {y}"


@pointwise(aten.fmod.Tensor, aten.fmod.Scalar)
def _fmod(x: Value, y: Value) -> str:
    return f"fmod({x}, {y})" if _has_rest(x) else f"{x} - truncate_divide({x}, {y}) * {y}"


def _has_rest(x: Value) -> bool:
    """Whether the rest of a division is that of floats; fp64 has no wider numbers in which it would be exact.

    Raises:
        CannotFuse: of fp64.
    """
    if x.dtype is torch.float64:
        raise CannotFuse("the rest of a division of float64 is not exact in generated kernels")
    return x.dtype.is_floating_point


@pointwise(aten.addcmul.default, numbers=("value",))
def _addcmul(x: Value, y: Value, z: Value, value: Any = 1) -> str:
    return f"{x} + {_number(value, x)} * {y} * {z}"


@pointwise(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(x: Value, y: Value, weight: Value) -> str:
    return f"tl.where({weight} < 0.5, {x} + {weight} * ({y} - {x}), {y} - ({y} - {x}) * (1.0 - {weight}))"


@pointwise(aten.maximum.default)
def _maximum(x: Value, y: Value) -> str:
    return f"greater({x}, {y})"


@pointwise(aten.minimum.default)
def _minimum(x: Value, y: Value) -> str:
    return f"smaller({x}, {y})"


@pointwise(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(x: Value, low: Value) -> str:
    return f"greater({x}, {low})"


@pointwise(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(x: Value, high: Value) -> str:
    return f"smaller({x}, {high})"


# --- functions of one number --------------------------------------------------------------------------------------


@pointwise(aten.neg.default)
def _neg(x: Value) -> str:
    return f"{x} * -1.0" if x.dtype.is_floating_point else f"-{x}"  # Triton's -x is 0 - x, which has no -0.0


@pointwise(aten.abs.default)
def _abs(x: Value) -> str:
    return f"tl.abs({x})"


@pointwise(aten.square.default)
def _square(x: Value) -> str:
    return f"{x} * {x}"


@pointwise(aten.sign.default)
def _sign(x: Value) -> str:
    one = _number(1, x)
    return f"tl.where({x} > 0, {one}, tl.where({x} < 0, -{one}, {_number(0, x)}))"


@pointwise(aten.relu.default)
def _relu(x: Value) -> str:
    return f"tl.where({x} < 0, {_number(0, x)}, {x})"


@pointwise(aten.leaky_relu.default, numbers=("negative_slope",))
def _leaky_relu(x: Value, negative_slope: float) -> str:
    return f"tl.where({x} > 0, {x}, {x} * {_number(negative_slope, x)})"


@pointwise(aten.elu.default, numbers=("alpha", "scale", "input_scale"))
def _elu(x: Value, alpha: float, scale: float, input_scale: float) -> str:
    low = f"expm1({x} * {_number(input_scale, x)}) * {_number(alpha * scale, x)}"
    return f"tl.where({x} > 0, {x} * {_number(scale, x)}, {low})"


@pointwise(aten.relu6.default)
def _relu6(x: Value) -> str:
    return f"tl.where({x} < 0, {_number(0, x)}, tl.where({x} > 6, {_number(6, x)}, {x}))"


@pointwise(aten.hardtanh.default, numbers=("min_val", "max_val"))
def _hardtanh(x: Value, min_val: float, max_val: float) -> str:
    low, high = _number(min_val, x), _number(max_val, x)
    return f"tl.where({x} < {low}, {low}, tl.where({x} > {high}, {high}, {x}))"


@pointwise(aten.hardsigmoid.default)
def _hardsigmoid(x: Value) -> str:
    return f"tl.where({x} < -3.0, 0.0, tl.where({x} > 3.0, 1.0, {x} / 6.0 + 0.5))"


@pointwise(aten.hardswish.default)
def _hardswish(x: Value) -> str:
    return f"{x} * smaller(greater({x} + 3.0, 0.0), 6.0) / 6.0"


@pointwise(aten.silu.default)
def _silu(x: Value) -> str:
    return f"{x} * sigmoid({x})"


@pointwise(aten.mish.default)
def _mish(x: Value) -> str:
    return f"{x} * tanh(tl.where({x} > 20.0, {x}, log1p(tl.exp({x}))))"


@pointwise(aten.softplus.default, numbers=("beta", "threshold"))
def _softplus(x: Value, beta: float, threshold: float) -> str:
    by, most = _number(beta, x), _number(threshold, x)
    return f"tl.where({x} * {by} > {most}, {x}, log1p(tl.exp({x} * {by})) / {by})"


@pointwise(aten.gelu.default, numbers=("approximate",), narrow=True)
def _gelu(x: Value, approximate: str = "none", narrow: bool = False) -> str:
    if approximate == "tanh":  # (1 + tanh u) / 2 is the sigmoid of 2 u
        twice = 2 * math.sqrt(2 / math.pi)
        return f"{x} * sigmoid({x} * ({twice!r} + {0.044715 * twice!r} * ({x} * {x})))"
    if narrow:
        return f"gelu_to_half({x})"
    return f"0.5 * {x} * (1.0 + tl.erf({x} * {math.sqrt(0.5)!r}))"


for _target, _text in {
    aten.exp.default: "tl.exp({x})",
    aten.exp2.default: "tl.exp2({x})",
    aten.expm1.default: "expm1({x})",
    aten.log.default: "tl.log({x})",
    aten.log2.default: "tl.log2({x})",
    aten.log10.default: "tl.log({x}) * 0.43429448190325176",
    aten.log1p.default: "log1p({x})",
    aten.sqrt.default: "tl.sqrt({x})",
    aten.rsqrt.default: "1.0 / tl.sqrt({x})",
    aten.reciprocal.default: "1.0 / {x}",
    aten.sin.default: "tl.sin({x})",
    aten.cos.default: "tl.cos({x})",
    aten.tanh.default: "tanh({x})",
    aten.sigmoid.default: "sigmoid({x})",
    aten.erf.default: "tl.erf({x})",
}.items():
    pointwise(_target, promotion=FLOAT)(lambda x, _text=_text: _text.format(x=x))


for _target, _text in {
    aten.floor.default: "tl.floor({x})",
    aten.ceil.default: "tl.ceil({x})",
    aten.round.default: "round_even({x})",
    aten.trunc.default: "truncate({x})",
}.items():
    pointwise(_target)(lambda x, _text=_text: _text.format(x=x) if x.dtype.is_floating_point else str(x))


@pointwise(float8_quantize)
def _float8_quantize(x: Value, scale: Value) -> str:
    return f"float8_e4m3({x} / {scale})"


@pointwise(aten.frac.default)
def _frac(x: Value) -> str:
    return f"{x} - truncate({x})"


# --- comparisons and logic ----------------------------------------------------------------------------------------


for _name_, _sign_ in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    for _overload in ("Tensor", "Scalar"):
        pointwise(getattr(getattr(aten, _name_), _overload), promotion=BOOL)(
            lambda x, y, _sign=_sign_: f"{x} {_sign} {y}"
        )


for _name_, _sign_ in {"and": "&", "or": "|", "xor": "^"}.items():
    for _overload in ("Tensor", "Scalar"):
        pointwise(getattr(getattr(aten, f"bitwise_{_name_}"), _overload))(lambda x, y, _sign=_sign_: f"{x} {_sign} {y}")
        pointwise(getattr(getattr(aten, f"__{_name_}__"), _overload))(lambda x, y, _sign=_sign_: f"{x} {_sign} {y}")
    pointwise(getattr(aten, f"logical_{_name_}").default, promotion=BOOL)(
        lambda x, y, _sign=_sign_: f"{_true(x)} {_sign} {_true(y)}"
    )


def _true(x: Value) -> str:
    return str(x) if x.dtype is torch.bool else f"({x} != 0)"


@pointwise(aten.bitwise_not.default)
def _bitwise_not(x: Value) -> str:
    return f"{x} == 0" if x.dtype is torch.bool else f"{x} ^ {_number(-1, x)}"


@pointwise(aten.logical_not.default, promotion=BOOL)
def _logical_not(x: Value) -> str:
    return f"{x} == 0"


@pointwise(
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.__lshift__.Scalar,
    aten.__lshift__.Tensor,
)
def _left(x: Value, bits: Value) -> str:
    return f"{x} << {bits}"


@pointwise(
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.__rshift__.Scalar,
    aten.__rshift__.Tensor,
)
def _right(x: Value, bits: Value) -> str:
    return f"{x} >> {bits}"


@pointwise(aten.isnan.default, promotion=BOOL)
def _isnan(x: Value) -> str:
    return f"{x} != {x}"


@pointwise(aten.isinf.default, promotion=BOOL)
def _isinf(x: Value) -> str:
    return f'tl.abs({x}) == float("inf")' if x.dtype.is_floating_point else f"{x} != {x}"


@pointwise(aten.isfinite.default, promotion=BOOL)
def _isfinite(x: Value) -> str:
    return f'tl.abs({x}) < float("inf")' if x.dtype.is_floating_point else f"{x} == {x}"
