"""Integer-only inference: whole encoder layers in integer arithmetic (I-BERT, Kim et al., 2021). Lossy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.calibration.lockstep import Lockstep
from ..ir.errors import InputError
from ..ir.graph import Program, arguments, shape
from ..ir.layers import check_finite
from ..ir.ops.attention import attention
from ..ir.ops.integer import (
    EPS_FRACTION,
    FRACTION,
    INT32,
    PROBABILITY,
    integer_add,
    integer_gelu,
    integer_layer_norm,
    integer_linear,
    integer_matmul,
    integer_softmax,
    requantize,
)
from ..ir.ops.quantize import dequantize, quantize
from ..ir.quantization.integers import Codes, choose_codes, dyadic, integer_weight
from ..ir.quantization.regions import RULE, VIEWS, Region, find_regions, operands
from ..ir.rewrite import Applied, Context, Pass, PassResult

aten = torch.ops.aten
_BITS = 16  # of the residual stream
_INT16 = (-(2 ** (_BITS - 1)), 2 ** (_BITS - 1) - 1)
_INT8 = (-128, 127)
_HEADROOM = 1.25  # the least of the stream's range over that of the calibration data; its scale is a power of two
_SMALLEST = 1e-6  # of a stream's scale: an eps of 1e-3 then has fewer than 61 bits in its units
_ROWS = 256  # tokens that ways to round an activation are compared on
_UNIT = torch.tensor(2.0**-FRACTION, dtype=torch.float64)  # the scale of fixed point


@dataclass(frozen=True)
class IntegerOnly(Pass):
    """Rewrite encoder layers so that between a quantize and a dequantize there are integers alone. Takes calibration.

    before:  %y = aten.gelu(aten.linear(%x, @weight, @bias))
    after:   %q = fxpress.requantize(%x8_or_sum, @multiplier, @shift, @zero_point, -128, 127)
             %sum = fxpress.integer_linear(%q, @weight_int8, @bias_int32)
             %y = fxpress.integer_gelu(fxpress.requantize(%sum, @multiplier_1, @shift_1, None, -2147483648, 2147483647))

    Taken: linear, attention with any mask that is no bias of floats, GELU, ReLU, LayerNorm, additions and views, where
    they are connected and an attention is among them. Linear layers and attention multiply int8, the residual stream
    has 16 bits, GELU, softmax and LayerNorm are in fixed point. All scales are fixed from the calibration data.
    """

    exact: ClassVar[bool] = False

    @property
    def needs_calibration(self) -> str | None:
        """What calibration data is needed for."""
        return "a range for each activation"

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place.

        Raises:
            InputError: there is something to rewrite but no calibration data, or it leads to NaN or infinity.
        """
        result = PassResult()
        regions, result.refusals = find_regions(program)
        if not regions:
            return result
        batches = list(context.calibration)
        if not batches:
            raise InputError(
                "integer_only takes the ranges of activations from data: give calibration=[inputs, ...], "
                "some dozens of typical inputs, or leave the pass out"
            )
        inside = [node for region in regions for node in region]
        check_finite(program, [node for node in inside if node.target is aten.linear.default])
        ranges = _observe(regions, Lockstep(program, batches, context.track, "integer_only: ranges"))
        for region in regions:
            if not context.take():
                break
            first, last = region[0], region[-1]
            detail = f"{len(region)} operators from {first.name} to {last.name}"
            _Writer(program, region, ranges).write()
            result.rewrites[RULE] += 1
            result.matches.append(Applied(RULE, first.name, detail))
        program.clean()
        return result


# --- calibration -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    """What an activation [..., K] was seen to be: [K] and [K], and some of its rows [R, K]."""

    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def largest(self) -> float:
        return float(torch.maximum(self.low.abs(), self.high.abs()).amax())


def _observe(regions: Sequence[Region], lockstep: Lockstep) -> dict[fx.Node, _Range]:
    """The range of everything that operators of the regions read, without the tokens that attention masks."""
    inside = {node for region in regions for node in region}
    found: dict[fx.Node, _Range] = {}

    def visit(node: fx.Node) -> None:
        for used in operands(node) if node in inside else ():
            if used not in found:
                found[used] = _range(used, torch.cat(lockstep.rows(used)))

    lockstep.run(visit)
    return found


def _range(node: fx.Node, rows: Tensor) -> _Range:
    if not len(rows):
        raise InputError("integer_only: all tokens of the calibration data are masked as padding")
    if not bool(rows.isfinite().all()):
        raise InputError(f"integer_only: the calibration data leads to NaN or infinity at {node.name}")
    every = -(-len(rows) // _ROWS)
    return _Range(rows.amin(0).cpu(), rows.amax(0).cpu(), rows[::every].cpu())


# --- rewriting -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """Integers `node` that stand for `scale` times them: one number, or one for each of the last axis, float64.

    `bits`: how many they have at most, with the sign.
    """

    node: fx.Node
    scale: Tensor
    bits: int


class _Writer:
    """Writes one region in integers, each operator before the one that it replaces."""

    def __init__(self, program: Program, region: Region, ranges: dict[fx.Node, _Range]) -> None:
        self.program, self.region, self.ranges = program, region, ranges
        self.inside = set(region)
        self.values: dict[fx.Node, _Value] = {}
        self.streams: dict[fx.Node, _Value] = {}
        self.bytes: dict[fx.Node, _Value] = {}
        self.codes: dict[fx.Node, tuple[fx.Node, Codes]] = {}
        self.before = region[0]

    def write(self) -> None:
        """Replace every operator whose value is read outside."""
        for node in self.region:
            self.before = node
            self.values[node] = _WRITERS[node.target](self, node)
        for node in self.region:
            outside = [user for user in node.users if user not in self.inside]
            for user in outside:
                if user.target is aten.sym_size.int:
                    user.replace_input_with(node, self.values[node].node)
            if any(user.target is not aten.sym_size.int for user in outside):
                self.before, value = node, self.values[node]
                scale = self.weight("scale", value.scale.to(torch.float32))
                floats = self.call(aten._to_copy.default, value.node, dtype=torch.float32)
                self.program.replace(node, self.call(dequantize, floats, scale))

    # --- the graph

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.call(target, *args, before=self.before, **kwargs)

    def weight(self, name: str, tensor: Tensor) -> fx.Node:
        tensor = tensor.to(self.before.meta["val"].device)
        return self.program.add_weight(f"{self.before.name}_{name}", tensor, trainable=False)

    def requantized(self, value: _Value, scale: Tensor, limits: tuple[int, int], zero: Tensor | None = None) -> fx.Node:
        (multiplier,), shift = dyadic(value.scale / scale)
        name = self.weight("multiplier", multiplier)
        offset = None if zero is None or not bool(zero.any()) else self.weight("zero_point", zero)
        return self.call(requantize, value.node, name, shift, offset, *limits)

    # --- values in the forms that operators read

    def value(self, source: fx.Node) -> _Value:
        """An operand as it is; what comes from outside is quantized, a weight here and now."""
        if source not in self.values:
            scale = self.stream_scale(self.ranges[source].largest)
            if source.op == "get_attr":
                integers = (self.program.tensor(source).detach().double() / scale).round().clamp(*_INT16)
                node = self.program.add_weight(f"{source.target}_integers", integers.to(torch.int32), trainable=False)
            else:
                name = self.weight("scale", scale.to(torch.float32))
                floats = self.call(quantize, source, name, None, _BITS)
                node = self.call(aten._to_copy.default, floats, dtype=torch.int32)
            self.values[source] = _Value(node, scale, _BITS)
        return self.values[source]

    def stream_scale(self, largest: float) -> Tensor:
        exponent = math.ceil(math.log2(max(largest * _HEADROOM / _INT16[1], _SMALLEST)))
        return torch.tensor(2.0**exponent, dtype=torch.float64)

    def stream(self, source: fx.Node) -> _Value:
        """An operand of 16 bits with one scale."""
        value = self.value(source)
        if value.bits <= _BITS and value.scale.dim() == 0:
            return value
        if source not in self.streams:
            scale = self.stream_scale(self.ranges[source].largest)
            self.streams[source] = _Value(self.requantized(value, scale, _INT16), scale, _BITS)
        return self.streams[source]

    def small(self, source: fx.Node) -> _Value:
        """An operand of 8 bits with one scale: a query, key or value."""
        if source not in self.bytes:
            value = self.value(source)
            scale = torch.tensor(max(self.ranges[source].largest / 127, _SMALLEST), dtype=torch.float64)
            made = value if value.bits <= 8 else _Value(self.requantized(value, scale, _INT8), scale, 8)
            self.bytes[source] = made
        return self.bytes[source]

    # --- operators

    def linear(self, node: fx.Node) -> _Value:
        source = operands(node)[0]
        if source not in self.codes:
            readers = [user for user in source.users if user.target is aten.linear.default and user in self.inside]
            weights, biases = zip(*map(self.weights, readers), strict=True)
            seen = self.ranges[source]
            chosen = choose_codes(seen.low, seen.high, seen.rows, weights, biases)
            made = self.requantized(self.value(source), chosen.scale, _INT8, chosen.zero_point)
            self.codes[source] = made, chosen
        input, codes = self.codes[source]
        layer = integer_weight(*self.weights(node), codes)
        weight, bias = self.weight("weight", layer.weight), self.weight("bias", layer.bias.to(torch.int32))
        return _Value(self.call(integer_linear, input, weight, bias), layer.scale, 32)

    def weights(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of a linear layer."""
        given = arguments(node)
        bias = None if given["bias"] is None else self.program.tensor(given["bias"]).detach().cpu()
        return self.program.tensor(given["weight"]).detach().cpu(), bias

    def attention(self, node: fx.Node) -> _Value:
        given = arguments(node)
        query, key, value = (self.small(given[name]) for name in ("query", "key", "value"))
        factor = shape(given["query"])[-1] ** -0.5 if given["scale"] is None else given["scale"]
        product = self.call(integer_matmul, query.node, self.call(aten.transpose.int, key.node, 2, 3))
        scores = self.requantized(_Value(product, query.scale * key.scale * factor, 32), _UNIT, INT32)
        options = {"mask": given["bias"], **{name: given[name] for name in ("key_mask", "left", "right")}}
        options = {name: option for name, option in options.items() if option is not None}
        empty = {} if given["empty"] == "zeros" else {"empty": given["empty"]}
        weights = self.call(integer_softmax, scores, **options, **empty)
        return _Value(self.call(integer_matmul, weights, value.node), value.scale * 2.0**-PROBABILITY, 32)

    def gelu(self, node: fx.Node) -> _Value:
        input = self.requantized(self.value(operands(node)[0]), _UNIT, INT32)
        return _Value(self.call(integer_gelu, input), _UNIT, 32)

    def relu(self, node: fx.Node) -> _Value:
        value = self.value(operands(node)[0])
        return _Value(self.call(aten.relu.default, value.node), value.scale, value.bits)

    def layer_norm(self, node: fx.Node) -> _Value:
        given = arguments(node)
        value = self.stream(given["input"])
        weights: list[fx.Node | None] = []
        for name in ("weight", "bias"):
            if given[name] is not None:
                fixed = (self.program.tensor(given[name]).detach().double() / _UNIT).round().clamp(*INT32)
                weights.append(self.weight(name, fixed.to(torch.int32)))
            else:
                weights.append(None)
        eps = round(given["eps"] / float(value.scale) ** 2 * 2**EPS_FRACTION)
        return _Value(self.call(integer_layer_norm, value.node, *weights, eps), _UNIT, 32)

    def add(self, node: fx.Node) -> _Value:
        first, second = (self.value(source) for source in operands(node))
        largest = (
            self.ranges[node].largest
            if node in self.ranges
            else sum(self.ranges[source].largest for source in operands(node))
        )
        scale = self.stream_scale(largest)
        multipliers, shift = dyadic(first.scale / scale, second.scale / scale)
        names = [self.weight("multiplier", item) for item in multipliers]
        total = self.call(integer_add, first.node, second.node, *names, shift, *_INT16)
        return _Value(total, scale, _BITS)

    def view(self, node: fx.Node) -> _Value:
        """A view of integers with one scale: of 8 bits where attention alone reads it."""
        source = operands(node)[0]
        value = self.small(source) if _slots(source) == 1 else self.value(source)
        value = value if value.scale.dim() == 0 else self.stream(source)
        rest = node.args[1:]
        return _Value(self.call(node.target, value.node, *rest, **node.kwargs), value.scale, value.bits)  # type: ignore[arg-type]


def _slots(node: fx.Node) -> int:
    """How many operands of attentions a value is, through views; 2 if anything else reads it."""
    count = 0
    for user in node.users:
        if user.target is attention:
            count += sum(item is node for item in user.args[:3]) + sum(item is node for item in user.kwargs.values())
        elif user.target in VIEWS:
            count += _slots(user)
        elif user.target is not aten.sym_size.int:
            return 2
    return count


_WRITERS: dict[Any, Callable[[_Writer, fx.Node], _Value]] = {
    aten.linear.default: _Writer.linear,
    attention: _Writer.attention,
    aten.gelu.default: _Writer.gelu,
    aten.relu.default: _Writer.relu,
    aten.layer_norm.default: _Writer.layer_norm,
    aten.add.Tensor: _Writer.add,
    **dict.fromkeys(VIEWS, _Writer.view),
}
