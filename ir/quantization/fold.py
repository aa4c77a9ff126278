"""Folding quantize and dequantize into operators on integers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph import Program, arguments, shape
from ..ops.quantize import dequantize, dynamic_quantize, int4_linear, int8_linear, pack_int4, quantize
from .insert import items

aten = torch.ops.aten


def fold(program: Program) -> int:
    """Store weights as integers, and let linears whose two operands are dequantized multiply integers. How many.

    An activation that is read as floats too is quantized for its linears alone.

    before:  %y = aten.linear(fxpress.dequantize(%q, %s, %z), fxpress.dequantize(fxpress.quantize(@w, @scale), @scale))
    after:   %y = fxpress.int8_linear(%q, %s, %z, @integers, @scale, None)
    """
    folding, count = _Folding(program), 0
    for node in program.calls(aten.linear.default, aten.embedding.default):
        new = folding.lookup(node) if node.target is aten.embedding.default else folding.linear(node)
        if new is not None:
            program.replace(node, new)
            count += 1
    program.clean()
    return count


class _Folding:
    def __init__(self, program: Program) -> None:
        self.program = program
        self._weights: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._activations: dict[fx.Node, list[Any]] = {}

    def linear(self, node: fx.Node) -> fx.Node | None:
        given = arguments(node)
        weight = _weight(given["weight"])
        if weight is None:
            return None
        call, bits = self.program.call, arguments(weight)["bits"]
        scale, zero_point = arguments(weight)["scale"], arguments(weight)["zero_point"]
        activation = _activation(given["input"])
        if activation is not None and bits == 8 and zero_point is None and shape(scale)[-1] == 1:
            parts = self._stored_activation(activation)
            return call(int8_linear, *parts, self._stored(weight), scale, given["bias"], before=node)
        if bits == 4:
            integers = self._stored(weight, packed=True)
            return call(int4_linear, given["input"], integers, scale, zero_point, given["bias"], before=node)
        floats = call(dequantize, self._stored(weight), *_some(scale, zero_point), before=node)
        return call(aten.linear.default, given["input"], floats, given["bias"], before=node)

    def lookup(self, node: fx.Node) -> fx.Node | None:
        weight = _weight(node.args[0])
        if weight is None:
            return None
        tables = _some(self._stored(weight), arguments(weight)["scale"], arguments(weight)["zero_point"])
        rows = [self.program.call(aten.embedding.default, table, node.args[1], before=node) for table in tables]
        return self.program.call(dequantize, *rows, before=node)

    def _stored(self, weight: fx.Node, packed: bool = False) -> fx.Node:
        """The integers of a weight as a constant: int8, or two of 4 bits a byte."""
        if (weight, packed) not in self._weights:
            given = arguments(weight)
            constants = {key: value for key, value in given.items() if isinstance(value, fx.Node)}
            tensors = {key: self.program.tensor(value).detach() for key, value in constants.items()}
            with torch.no_grad():
                integers = quantize(**{**given, **tensors, "stored": True})
            name = f"{given['input'].target}_{'packed' if packed else 'integers'}"
            value = pack_int4(integers) if packed else integers
            self._weights[weight, packed] = self.program.add_weight(name, value, trainable=False)
        return self._weights[weight, packed]

    def _stored_activation(self, activation: fx.Node) -> list[Any]:
        """Integers, stored as int8, scale and zero point of a dequantized activation."""
        if activation not in self._activations:
            integers: Any = activation.args[0]
            if integers.target is quantize:
                given = arguments(activation)
                stored = self.program.call_again(integers, stored=True)
                self._activations[activation] = [stored, given["scale"], given["zero_point"]]
            else:
                parts = self.program.call_again(integers.args[0], stored=True)
                self._activations[activation] = items(self.program, parts, integers)
        return self._activations[activation]


def _some(*nodes: fx.Node | None) -> list[fx.Node]:
    return [node for node in nodes if node is not None]


def _weight(node: Any) -> fx.Node | None:
    """The quantize of a weight behind its dequantize."""
    if not isinstance(node, fx.Node) or node.target is not dequantize:
        return None
    inner: Any = node.args[0]
    if inner.target is not quantize or arguments(inner)["stored"] or inner.args[0].op != "get_attr":
        return None
    same = all(arguments(inner)[name] is arguments(node)[name] for name in ("scale", "zero_point"))
    return inner if same else None


def _activation(node: Any) -> fx.Node | None:
    """The dequantize of an activation, if integer kernels take its scale: one for all of it, or one a token."""
    if not isinstance(node, fx.Node) or node.target is not dequantize:
        return None
    inner: Any = node.args[0]
    if inner.target is quantize:
        given = arguments(inner)
        return node if given["bits"] == 8 and not shape(given["scale"]) and given["input"].op != "get_attr" else None
    is_item = inner.target is operator.getitem and inner.args[1] == 0
    return node if is_item and inner.args[0].target is dynamic_quantize else None
