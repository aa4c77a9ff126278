"""Writing quantize and dequantize into the graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, arguments, dtype
from ..ops.float8 import FLOAT8, float8_quantize, float8_scale
from ..ops.quantize import dequantize, dynamic_quantize, quantize
from .choice import Activation, Choice
from .grid import Quantized, multiples
from .sites import Site

aten = torch.ops.aten


class Insertion:
    """Writes quantize and dequantize into a program; a weight that several nodes read is quantized once.

    But where it has other numbers of bits for one than for another there are both, and of a table that a linear reads
    as float8 there are integers, too: no backend looks up float8.

    Linears of half precision take and give it, with float32 in between: scales need its digits.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._weights: dict[tuple[fx.Node, torch.dtype, int], fx.Node] = {}

    def linears(self, site: Site, choice: Choice) -> None:
        """Let the linears of a site read the quantized activation and their quantized weights.

        before:  %y = aten.linear(%x, @w, @b)
        after:   %q, %s, %z = fxpress.dynamic_quantize(%x, 'token');  %x' = fxpress.dequantize(%q, %s, %z)
                 %w' = fxpress.dequantize(fxpress.quantize(@w, @scale), @scale);  %y = aten.linear(%x', %w', @b)
        """
        source = arguments(site.linears[0])["input"]  # site.source may have been a linear that is replaced by now
        inputs = self._activation(source, choice, site.linears[0])
        for index, linear in enumerate(site.linears):
            given = arguments(linear)
            stored, bias = given["weight"], given["bias"]
            old = None if bias is None else self.program.tensor(bias)
            new = choice.bias(index, old)
            if new is not None and new is not old:
                name = f"{stored.target}_bias" if bias is None else f"{bias.target}_corrected"
                bias = self.program.add_weight(name, new, trainable=self.program.tensor(stored).requires_grad)
            if choice.weights is not None:
                stored = self.weight(stored, choice.weights[index], choice.bits, choice.nested)
            parts = [None if item is None else self._cast(item, torch.float32, linear) for item in (stored, bias)]
            call = self.program.call(aten.linear.default, inputs, *parts, before=linear)
            self.program.replace(linear, self._cast(call, dtype(linear), linear))

    def table(self, lookup: fx.Node, own: Choice) -> None:
        """Let an embedding look up in a quantized table: its own, or the finest that linears read, see `looked_up`."""
        stored: Any = lookup.args[0]
        assert own.weights is not None
        found = {bits: node for (of, kind, bits), node in self._weights.items() if of is stored and kind is not FLOAT8}
        weight = found[max(found)] if found else self.weight(stored, own.weights[0], own.bits)
        new = self.program.call_again(lookup, weight=weight)
        self.program.replace(lookup, self._cast(new, dtype(lookup), lookup))

    def weight(self, stored: fx.Node, weight: Quantized, bits: int, nested: bool = False) -> fx.Node:
        """The dequantized integers of a weight, whose floats become what the integers stand for.

        Where its scales are `nested`, they are dequantized multiples themselves, by which `fold` knows them.
        """
        key = stored, weight.integers.dtype, bits
        if key in self._weights:
            return self._weights[key]
        program, name = self.program, str(stored.target)
        first = next(node for node in program.graph.nodes if node.op == "call_function")
        values = program.add_weight(name, weight.dequantize(), trainable=program.tensor(stored).requires_grad)
        if nested:
            steps, rows = multiples(weight.scale)
            parts = program.add_weight(f"{name}_multiples", steps), program.add_weight(f"{name}_scale", rows)
            constants = [program.call(dequantize, *parts, before=first)]
        else:
            constants = [program.add_weight(f"{name}_scale", weight.scale)]
        if weight.zero_point is not None:
            constants.append(program.add_weight(f"{name}_zero_point", weight.zero_point))
        options: dict[str, Any] = {} if bits == 8 else {"bits": bits}
        to = float8_quantize if weight.integers.dtype is FLOAT8 else quantize
        integers = program.call(to, values, *constants, before=first, **options)
        self._weights[key] = program.call(dequantize, integers, *constants, before=first)
        return self._weights[key]

    def _activation(self, source: fx.Node, choice: Choice, before: fx.Node) -> fx.Node:
        program, activation, x = self.program, choice.activation, self._cast(source, torch.float32, before)
        if activation.low:
            x = program.call(aten.sub.Tensor, x, activation.low, before=before)
        if choice.smooth is not None:
            inverse = program.add_weight(f"{source.name}_smooth", 1 / choice.smooth)
            x = program.call(aten.mul.Tensor, x, inverse, before=before)
        return x if activation.level == "float" else self._rounded(source.name, x, activation, before)

    def _cast(self, node: fx.Node, to: torch.dtype, before: fx.Node) -> fx.Node:
        return node if dtype(node) is to else self.program.call(aten._to_copy.default, node, dtype=to, before=before)

    def _rounded(self, name: str, x: fx.Node, activation: Activation, before: fx.Node) -> fx.Node:
        program = self.program
        if activation.level == "static":
            known: list[Tensor] = [item for item in (activation.scale, activation.zero_point) if item is not None]
            names = (f"{name}_scale", f"{name}_zero_point")
            constants = [program.add_weight(label, value) for label, value in zip(names, known, strict=False)]
            integers = program.call(quantize, x, *constants, before=before)
            return program.call(dequantize, integers, *constants, before=before)
        if activation.level == "float8":
            scale = program.call(float8_scale, x, before=before)
            numbers = program.call(float8_quantize, x, scale, before=before)
            return program.call(dequantize, numbers, scale, before=before)
        unsigned: dict[str, Any] = {"unsigned": True} if activation.low is not None else {}
        parts: Any = program.call(dynamic_quantize, x, activation.level, before=before, **unsigned)
        return program.call(dequantize, *items(program, parts, before), before=before)


def items(program: Program, parts: fx.Node, before: fx.Node) -> list[fx.Node]:
    """The integers, scale and zero point that a `dynamic_quantize` gives."""
    return [program.call(operator.getitem, parts, index, before=before) for index in range(3)]
