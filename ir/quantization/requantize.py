"""From integers of one fixed scale to those of another without floats between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import RewriteError
from ..graph import Program, arguments, dtype, shape
from ..ops import integer
from ..ops.quantize import dequantize, expand_int4, int8_linear, quantize
from ..pattern import Refusal
from .integers import dyadic

aten = torch.ops.aten
RULE = "requantize"
_INT32 = 2**31
_STEPS = 2**20  # of a bias alone: larger integers would show the error of their multiplier


def requantize(program: Program) -> tuple[int, list[Refusal]]:
    """Let integers with a fixed scale become those of the next fixed scale by a dyadic number. How many; what stays.

    Between the two may stand ReLU and multiplications by a weight of positive numbers, as smoothing makes them. What is
    read as floats, too, stays. A number half way between two integers may go to the other one.

    before:  %y = fxpress.int8_linear(%q, @s, @z, @w, @c, @b)
             %r = fxpress.quantize(aten.relu(%y), @scale, @zero_point, stored=True)
    after:   %sum = fxpress.integer_linear(%q, @w, @bias_int32)
             %r = fxpress.requantize(%sum, @multiplier, @shift, @zero_point, 0 at least, 127)
    """
    count, refusals = 0, []
    for node in program.calls(quantize):
        if not _is_fixed(program, node, "scale", "zero_point") or not arguments(node)["stored"]:
            continue
        found = _chain(program, node)
        if found is None:
            continue
        reason = found if isinstance(found, str) else _write(program, node, found)
        if reason is None:
            count += 1
        else:
            refusals.append(Refusal(reason, RULE, node.name))
    program.clean()
    return count, refusals


@dataclass(frozen=True)
class _Chain:
    """What leads from integers to others: their source, a factor of positive numbers, and whether ReLU is among it."""

    source: fx.Node
    factor: Tensor  # float64, [] or [K]
    is_relu: bool


def _chain(program: Program, node: fx.Node) -> _Chain | str | None:
    """The way from integers to a quantize; None: it reads floats; or why the floats have to stay."""
    here: Any = node.args[0]
    factor, is_relu = torch.ones((), dtype=torch.float64), False
    path = [node]
    while here.target in (aten.relu.default, aten.mul.Tensor):
        if here.target is aten.mul.Tensor:
            other = here.args[1]
            if not isinstance(other, fx.Node) or other.op != "get_attr" or shape(other) != shape(here)[-1:]:
                return None
            values = program.tensor(other).detach().double()
            if not bool((values > 0).all()):
                return None
            factor = factor * values
        is_relu |= here.target is aten.relu.default
        path.append(here)
        here = here.args[0]
    fixed = here.target is int8_linear and _is_fixed(program, here, "scale", "zero_point", "weight_scale")
    if fixed:
        weight = arguments(here)["weight"]
        fixed = weight.op == "get_attr" or weight.target is expand_int4
    fixed |= here.target is dequantize and _is_fixed(program, here, "scale", "zero_point") and _holds_integers(here)
    if not fixed:
        return None
    for reader, value in zip(path, [*path[1:], here], strict=True):
        others = [user for user in value.users if user is not reader and user.target is not aten.sym_size.int]
        if others:
            return f"{value.name} is read as floats by {others[0].name}"
    return _Chain(here, factor, is_relu)


def _is_fixed(program: Program, node: fx.Node, *names: str) -> bool:
    """Whether arguments are weights, and the scale a single number."""
    given = arguments(node)
    constant = all(given[name] is None or given[name].op == "get_attr" for name in names)
    return constant and not shape(given["scale"])


def _holds_integers(node: fx.Node) -> bool:
    return dtype(node.args[0]) in (torch.int8, torch.int32)


def _write(program: Program, node: fx.Node, chain: _Chain) -> str | None:
    """Write the integer road; why it cannot be, if so."""
    given, source = arguments(node), arguments(chain.source)
    scale = _number(program, given["scale"])
    zero = _number(program, given["zero_point"])
    sums, units = source["input"], _number(program, source["scale"])
    shift_of = _number(program, source["zero_point"])
    bias = None
    if chain.source.target is int8_linear:
        weight = program.computed(source["weight"])
        columns = program.tensor(source["weight_scale"]).double().squeeze(-1)
        units = units * columns
        rows = weight.double().sum(1)
        given_bias = source["bias"]
        if given_bias is not None and given_bias.op != "get_attr":
            return f"its bias {given_bias.name} is no weight"
        offset = torch.zeros_like(rows) if given_bias is None else program.tensor(given_bias).detach().double()
        # What a row of zeros gives is its bias alone, in units as small as that wants: its scale says nothing.
        own = (offset.abs() / _STEPS).clamp(min=torch.finfo(torch.float64).tiny)
        units = torch.where((weight == 0).all(1), own, units)
        bias = (offset / units).round() - shift_of * rows
        if not bool((128 * weight.double().abs().sum(1) + bias.abs() < _INT32).all()):
            return "its sums do not fit in 32 bits"
    try:
        (multiplier,), shift = dyadic(units * chain.factor / scale)
    except RewriteError as error:
        return str(error)

    def stored(name: str, value: Tensor) -> fx.Node:
        return program.add_weight(f"{node.name}_{name}", value, trainable=False)

    if bias is not None:
        sums = program.call(
            integer.integer_linear, sums, source["weight"], stored("bias", bias.to(torch.int32)), before=node
        )
    elif bool(shift_of):
        sums = program.call(aten._to_copy.default, sums, dtype=torch.int32, before=node)
        sums = program.call(aten.sub.Tensor, sums, stored("shift", shift_of.to(torch.int32)), before=node)
    offset_node = stored("zero_point", zero.to(torch.int64)) if bool(zero) else None
    low = max(-128, int(zero)) if chain.is_relu else -128
    multiplier_node = stored("multiplier", multiplier)
    new = program.call(integer.requantize, sums, multiplier_node, shift, offset_node, low, 127, before=node)
    program.replace(node, new)
    return None


def _number(program: Program, node: fx.Node | None) -> Tensor:
    """A number that is a weight, in float64; 0 for none."""
    return torch.zeros((), dtype=torch.float64) if node is None else program.tensor(node).detach().double()
