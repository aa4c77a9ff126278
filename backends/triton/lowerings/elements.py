"""Operators that choose, make, gather or join elements, and elementwise ones whose arguments are no plain elements."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ....ir.graph import arguments
from ....ir.ops.quantize import dequantize, quantize
from ....ir.ops.rotary import rotary
from ..emitter import NARROW, CannotFuse, Emitter, Index, Value, computed, literal
from ..sizes import divided, remainder
from .table import value

aten = torch.ops.aten


def result_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def _wide(node: fx.Node) -> torch.dtype:
    return computed(result_dtype(node))


# --- numbers made from nothing ------------------------------------------------------------------------------------


@value(aten.arange.default, aten.arange.start, aten.arange.start_step, generator=True)
def _arange(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), result_dtype(node)
    start, step = given.get("start", 0), given.get("step", 1)
    if not dtype.is_floating_point and all(isinstance(item, int | fx.Node) for item in (start, step)):
        return emitter.position(emitter.sizes.of(start) + index[0] * emitter.sizes.of(step), dtype)
    place = emitter.position(index[0], _wide(node))
    first, by = emitter.operand(start, (), _wide(node)), emitter.operand(step, (), _wide(node))
    return emitter.let("arange", f"{first} + {place} * {by}", _wide(node), place)


@value(
    aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default,
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
    aten.ones.default, aten.ones_like.default, aten.new_ones.default, generator=True,
)  # fmt: skip
def _full(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, name, dtype = arguments(node), str(node.target), result_dtype(node)
    number = given.get("fill_value", given.get("s", 1 if "ones" in name else 0))
    if dtype in NARROW and isinstance(number, float):
        number = torch.tensor(number, dtype=dtype).item()
    return emitter.operand(number, (), _wide(node))


@value(aten.fill.Scalar, aten.fill.Tensor)
def _fill(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    number = emitter.operand(arguments(node)["value"], index, _wide(node))
    return emitter.rounded(number, result_dtype(node))


@value(aten.tril.default, aten.triu.default)
def _triangle(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    x = emitter.value(given["self"], index)
    row, column = (emitter.position(place, torch.int64) for place in index[-2:])
    sign = "<=" if node.target is aten.tril.default else ">="
    zero = emitter.number(0, x.dtype)
    diagonal = emitter.text(emitter.sizes.of(given["diagonal"]))
    code = f"tl.where({column} - {row} {sign} {diagonal}, {x}, {zero})"
    return emitter.let("triangle", code, x.dtype, x, row, column)


# --- choices ------------------------------------------------------------------------------------------------------


@value(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), _wide(node)
    condition = emitter.operand(given["condition"], index, torch.bool)
    x, y = emitter.operand(given["self"], index, dtype), emitter.operand(given["other"], index, dtype)
    return emitter.let("where", f"tl.where({condition}, {x}, {y})", dtype, condition, x, y)


@value(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), _wide(node)
    mask = emitter.operand(given["mask"], index, torch.bool)
    x = emitter.operand(given["self"], index, dtype)
    filled = emitter.rounded(emitter.operand(given["value"], index, dtype), result_dtype(node))
    return emitter.let("masked_fill", f"tl.where({mask}, {filled}, {x})", dtype, mask, x, filled)


@value(aten.clamp.default, aten.clamp.Tensor)
def _clamp(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), _wide(node)
    found = emitter.operand(given["self"], index, dtype)
    for name, function in (("min", "greater"), ("max", "smaller")):
        if given[name] is not None:
            bound = emitter.operand(given[name], index, dtype)
            found = emitter.let("clamp", f"{function}({found}, {bound})", dtype, found, bound)
    return found


@value(aten.nan_to_num.default)
def _nan_to_num(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), result_dtype(node)
    x = emitter.value(given["self"], index)
    if not dtype.is_floating_point:
        return x
    limits = torch.finfo(dtype)
    nan, high, low = (
        literal(usual if given[name] is None else given[name], x.dtype)
        for name, usual in (("nan", 0.0), ("posinf", limits.max), ("neginf", limits.min))
    )
    finite = f'tl.where({x} == float("inf"), {high}, tl.where({x} == float("-inf"), {low}, {x}))'
    code = f"tl.where({x} != {x}, {nan}, {finite})"
    return emitter.let("nan_to_num", code, x.dtype, x)


@value(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), _wide(node)
    x, exponent = emitter.operand(given["self"], index, dtype), given["exponent"]
    if isinstance(exponent, int | float) and float(exponent).is_integer() and 0 <= exponent <= 8:
        code = " * ".join([str(x)] * int(exponent)) if exponent else f"tl.where({x} == {x}, 1, 1)"
        return emitter.let("pow", code, dtype, x)
    if not dtype.is_floating_point:
        raise CannotFuse(f"{node.name} is a power of integers")
    if exponent == 0.5:
        return emitter.let("pow", f"tl.sqrt({x})", dtype, x)
    if exponent in (-1, -0.5):
        return emitter.let("pow", f"1.0 / {x}" if exponent == -1 else f"1.0 / tl.sqrt({x})", dtype, x)
    y = emitter.operand(exponent, index, dtype)
    return emitter.let("pow", f"power({x}, {y})", dtype, x, y)


@value(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout)
def _cast(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    return emitter.rounded(emitter.value(arguments(node)["self"], index), result_dtype(node))


# --- elements from elsewhere --------------------------------------------------------------------------------------


def _inside(emitter: Emitter, place: Value, size: Any) -> Value:
    """Whether an index that was read is one: what is outside reads as 0 rather than from elsewhere in memory."""
    code = f"({place} >= 0) & ({place} < {emitter.text(size)})"
    return emitter.let("found", code, torch.bool, place)


def _gathered(emitter: Emitter, source: fx.Node, axis: int, place: Value, index: Index) -> Value:
    """`source` at `index` with a position that was read along one axis; negative ones count from the end."""
    size = emitter.sizes.shape(source)[axis]
    wrapped = emitter.let(
        "place", f"tl.where({place} < 0, {place} + {emitter.text(size)}, {place})", torch.int64, place
    )
    with emitter.only_where(_inside(emitter, wrapped, size)):
        return emitter.value(source, (*index[:axis], emitter.at(wrapped), *index[axis + 1 :]))


@value(aten.embedding.default)
def _embedding(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    place = emitter.value(given["indices"], index[:-1])
    return _gathered(emitter, given["weight"], 0, place, (place, index[-1]))


@value(aten.index_select.default)
def _index_select(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    axis = given["dim"] % len(index)
    return _gathered(emitter, given["self"], axis, emitter.value(given["index"], (index[axis],)), index)


@value(aten.gather.default)
def _gather(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    return _gathered(emitter, given["self"], given["dim"] % len(index), emitter.value(given["index"], index), index)


@value(aten.index.Tensor)
def _index(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    source, places = given["self"], list(given["indices"])
    named = [axis for axis, item in enumerate(places) if item is not None]
    if any(result_dtype(places[axis]) in (torch.bool, torch.uint8) for axis in named):
        raise CannotFuse(f"{node.name} is indexed by a mask, so its size depends on values")
    rank = max(len(emitter.sizes.shape(places[axis])) for axis in named)
    first = named[0] if named == list(range(named[0], named[-1] + 1)) else 0
    shared = index[first : first + rank]
    others = iter([*index[:first], *index[first + rank :]])
    found: list[Any] = []
    conditions: list[Value] = []
    for axis, size in enumerate(emitter.sizes.shape(source)):
        if axis not in named:
            found.append(next(others))
            continue
        place = emitter.operand(places[axis], shared, torch.int64)
        code = f"tl.where({place} < 0, {place} + {emitter.text(size)}, {place})"
        wrapped = emitter.let("place", code, torch.int64, place)
        conditions.append(_inside(emitter, wrapped, size))
        found.append(emitter.at(wrapped))
    every = emitter.let("found", " & ".join(map(str, conditions)), torch.bool, *conditions)
    with emitter.only_where(every):
        return emitter.value(source, tuple(found))


@value(aten.cat.default)
def _cat(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    parts = [part for part in given["tensors"] if tuple(emitter.sizes.shape(part)) != (0,) or len(index) == 1]
    axis = given["dim"] % len(index)
    place = emitter.position(index[axis], torch.int64)
    start: Any = sympy.Integer(0)
    found: Value | None = None
    for part in parts:
        end = start + emitter.sizes.shape(part)[axis]
        code = f"({place} >= {emitter.text(start)}) & ({place} < {emitter.text(end)})"
        here = emitter.let("here", code, torch.bool, place)
        with emitter.only_where(here):
            x = emitter.cast(emitter.value(part, (*index[:axis], index[axis] - start, *index[axis + 1 :])), _wide(node))
        found = x if found is None else emitter.let("cat", f"tl.where({here}, {x}, {found})", x.dtype, here, x, found)
        start = end
    if found is None:
        raise CannotFuse(f"{node.name} joins nothing")
    return found


@value(aten.stack.default)
def _stack(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    axis = given["dim"] % len(index)
    place = emitter.position(index[axis], torch.int64)
    rest = (*index[:axis], *index[axis + 1 :])
    values = [emitter.cast(emitter.value(part, rest), _wide(node)) for part in given["tensors"]]
    found = values[0]
    for number, x in enumerate(values[1:], start=1):
        found = emitter.let("stack", f"tl.where({place} == {number}, {x}, {found})", x.dtype, place, x, found)
    return found


@value(aten.constant_pad_nd.default, aten.pad.default)
def _pad(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    if given.get("mode", "constant") != "constant":
        raise CannotFuse(f"{node.name} pads by {given['mode']!r}")
    source, pads = given["self"], given["pad"]
    where = list(index)
    conditions: list[Value] = []
    for number in range(len(pads) // 2):
        axis = len(index) - 1 - number
        before, after = emitter.sizes.of(pads[2 * number]), emitter.sizes.of(pads[2 * number + 1])
        if before == 0 and after == 0:
            continue
        place = emitter.position(index[axis], torch.int64)
        size = emitter.sizes.shape(source)[axis]
        code = f"({place} >= {emitter.text(before)}) & ({place} < {emitter.text(before + size)})"
        conditions.append(emitter.let("here", code, torch.bool, place))
        where[axis] = index[axis] - before
    fill = emitter.operand(given["value"] or 0, (), _wide(node))
    if not conditions:
        return emitter.value(source, tuple(where))
    here = emitter.let("here", " & ".join(map(str, conditions)), torch.bool, *conditions)
    with emitter.only_where(here):
        x = emitter.value(source, tuple(where))
    return emitter.let("pad", f"tl.where({here}, {x}, {fill})", x.dtype, here, x)


# --- operators of ours --------------------------------------------------------------------------------------------


@value(rotary)
def _rotary(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), _wide(node)
    source, columns = given["input"], emitter.sizes.shape(given["cos"])[-1]
    column = index[-1]
    x = emitter.value(source, index)
    place = emitter.position(column, torch.int32)
    if given["interleaved"]:
        partner, first = column + 1 - 2 * remainder(column, 2), f"{place} % 2 == 0"
    else:
        half = divided(columns, 2)
        partner, first = remainder(column + half, columns), f"{place} < {emitter.text(half)}"
    turns = emitter.let("turns", f"{place} < {emitter.text(columns)}", torch.bool, place)
    with emitter.only_where(turns):
        cos, sin = emitter.operand(given["cos"], index, dtype), emitter.operand(given["sin"], index, dtype)
        other = emitter.value(source, (*index[:-1], partner))
    code = f"{x} * {cos} + tl.where({first}, -{other}, {other}) * {sin}"
    turned = emitter.let("turned", code, dtype, x, cos, sin, other, place)
    return emitter.let("rotary", f"tl.where({turns}, {turned}, {x})", dtype, turns, turned, x)


def _of_group(emitter: Emitter, scale: fx.Node, index: Index, width: Any) -> Index:
    """The index of a scale, or zero point, whose last axis has a number for each group of neighbours."""
    shape = emitter.sizes.shape(scale)
    if not shape or shape[-1] in (1, width):
        return emitter.broadcast(scale, index)
    if not (shape[-1].is_number and width.is_number):
        raise CannotFuse(f"{scale.name} is of groups of a size that varies")
    size = 1 << (-(-int(width) // int(shape[-1])) - 1).bit_length()
    outer = tuple(
        sympy.Integer(0) if axis == 1 else place
        for axis, place in zip(shape[:-1], index[len(index) - len(shape) : -1], strict=True)
    )
    return (*outer, divided(index[-1], size))


def _at_scale(emitter: Emitter, node: Any, index: Index, width: Any, dtype: torch.dtype) -> Value:
    return emitter.cast(emitter.value(node, _of_group(emitter, node, index, width)), dtype)


@value(quantize)
def _quantize(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), computed(result_dtype(arguments(node)["input"]))
    width = emitter.sizes.shape(given["input"])[-1]
    x = emitter.operand(given["input"], index, dtype)
    scale = _at_scale(emitter, given["scale"], index, width, dtype)
    found = emitter.let("quantize", f"round_even({x} / {scale})", dtype, x, scale)
    if given["zero_point"] is not None:
        zero = _at_scale(emitter, given["zero_point"], index, width, dtype)
        found = emitter.let("quantize", f"{found} + {zero}", dtype, found, zero)
    high = 2 ** (given["bits"] - 1)
    low, top = literal(-high, dtype), literal(high - 1, dtype)
    found = emitter.let("quantize", f"smaller(greater({found}, {low}), {top})", dtype, found)
    return emitter.cast(found, torch.int8) if given["stored"] else found


@value(dequantize)
def _dequantize(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given, dtype = arguments(node), _wide(node)
    width = emitter.sizes.shape(given["input"])[-1]
    x = emitter.operand(given["input"], index, dtype)
    scale = _at_scale(emitter, given["scale"], index, width, dtype)
    if given["zero_point"] is not None:
        zero = _at_scale(emitter, given["zero_point"], index, width, dtype)
        x = emitter.let("centred", f"{x} - {zero}", dtype, x, zero)
    return emitter.let("dequantize", f"{x} * {scale}", dtype, x, scale)
