"""Folding quantize and dequantize into operators on integers, or on float8_e4m3."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph import Program, arguments, dtype, shape
from ..ops.float8 import FLOAT8, float8_linear, float8_quantize, float8_scale
from ..ops.quantize import (
    dequantize,
    dynamic_quantize,
    expand_int4,
    int4_embedding,
    int4_linear,
    int8_linear,
    pack_int4,
    quantize,
)
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
        self._made: dict[fx.Node, fx.Node] = {}
        self._activations: dict[fx.Node, list[Any]] = {}

    def linear(self, node: fx.Node) -> fx.Node | None:
        given = arguments(node)
        weight = _weight(given["weight"])
        if weight is None:
            return None
        if weight.target is float8_quantize:
            return self._float8_linear(node, weight)
        call, bits = self.program.call, arguments(weight)["bits"]
        scale, zero_point = arguments(weight)["scale"], arguments(weight)["zero_point"]
        activation = _activation(given["input"])
        if activation is not None and bits == 8 and zero_point is None and shape(scale)[-1] == 1:
            parts = self._stored_activation(activation)
            return call(int8_linear, *parts, self._stored(weight), scale, given["bias"], before=node)
        if activation is not None and bits == 4 and scale.target is dequantize:
            parts = self._stored_activation(activation)
            return call(int8_linear, *parts, self._expanded(weight), scale.args[1], given["bias"], before=node)
        scale = self._scale(scale)
        if bits == 4:
            integers = self._stored(weight, packed=True)
            return call(int4_linear, given["input"], integers, scale, zero_point, given["bias"], before=node)
        floats = call(dequantize, self._stored(weight), *_some(scale, zero_point), before=node)
        return call(aten.linear.default, given["input"], floats, given["bias"], before=node)

    def lookup(self, node: fx.Node) -> fx.Node | None:
        weight = _weight(node.args[0])
        if weight is None or weight.target is not quantize:
            return None
        given = arguments(weight)
        if given["bits"] == 4:
            parts = (self._stored(weight, packed=True), self._scale(given["scale"]), given["zero_point"], node.args[1])
            return self.program.call(int4_embedding, *parts, shape(weight)[-1], before=node)
        tables = _some(self._stored(weight), given["scale"], given["zero_point"])
        rows = [self.program.call(aten.embedding.default, table, node.args[1], before=node) for table in tables]
        return self.program.call(dequantize, *rows, before=node)

    def _float8_linear(self, node: fx.Node, weight: fx.Node) -> fx.Node:
        """Casts from half precision and back go, too: the operator computes in float32 by itself.

        before:  %x' = _to_copy(%x, float32);  %y' = aten.linear(%x', dequantize(float8_quantize(@w, @s), @s))
                 %y = _to_copy(%y', float16)
        after:   %y = float8_linear(%x, @numbers, @scale)
        """
        call, given = self.program.call, arguments(node)
        scale: Any = arguments(weight)["scale"]
        if (scale, False) not in self._weights:
            rows = self.program.tensor(scale).detach().squeeze(-1)
            self._weights[scale, False] = self.program.add_weight(f"{scale.target}_rows", rows, trainable=False)
        source, quantized = _float8_activation(given["input"])
        bias = given["bias"]
        if bias is not None and bias.target is aten._to_copy.default:
            bias = bias.args[0]
        parts = (self._stored(weight), self._weights[scale, False], bias, *([True] if quantized else []))
        if not _is_cast_around(source, node):
            return call(float8_linear, source, *parts, before=node)
        new = call(float8_linear, source.args[0], *parts, before=node)
        for cast in list(node.users):
            self.program.replace(cast, new)
        return call(aten._to_copy.default, new, dtype=dtype(node), before=node)  # nothing reads it

    def _stored(self, weight: fx.Node, packed: bool = False) -> fx.Node:
        """The integers of a weight as a constant: int8, or two of 4 bits a byte; or float8_e4m3."""
        if (weight, packed) not in self._weights:
            given = arguments(weight)
            constants = {key: value for key, value in given.items() if isinstance(value, fx.Node)}
            tensors = {key: self.program.computed(value) for key, value in constants.items()}
            name = f"{given['input'].target}_{'packed' if packed else 'integers'}"
            with torch.no_grad():
                if weight.target is float8_quantize:
                    integers, name = float8_quantize(**tensors).to(FLOAT8), f"{given['input'].target}_float8"
                else:
                    integers = quantize(**{**given, **tensors, "stored": True})
            value = pack_int4(integers) if packed else integers
            self._weights[weight, packed] = self.program.add_weight(name, value, trainable=False)
        return self._weights[weight, packed]

    def _expanded(self, weight: fx.Node) -> fx.Node:
        """A weight of 4 bits with nested scales as integers of 8, before all that may read it."""
        if weight not in self._made:
            given = arguments(weight)
            parts = (self._stored(weight, packed=True), given["scale"].args[0], given["zero_point"], shape(weight)[-1])
            self._made[weight] = self.program.call(expand_int4, *parts, before=weight)
        return self._made[weight]

    def _scale(self, node: fx.Node) -> fx.Node:
        """A scale as a constant: one that is nested, where its groups are multiplied as floats."""
        if node.op == "get_attr":
            return node
        if node not in self._made:
            name = f"{node.args[1].target}s"  # type: ignore[union-attr]
            self._made[node] = self.program.add_weight(name, self.program.computed(node), trainable=False)
        return self._made[node]

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
    if inner.target is float8_quantize and inner.args[0].op == "get_attr":
        return inner if inner.args[1] is node.args[1] and shape(inner.args[1]) == (shape(inner)[0], 1) else None
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


def _float8_activation(node: fx.Node) -> tuple[Any, bool]:
    """What was rounded to float8_e4m3 with a scale for each token, and True; else the node itself, and False."""
    if node.target is dequantize:
        inner, scale = node.args[:2]
        is_rounded = inner.target is float8_quantize and inner.args[1] is scale  # type: ignore[union-attr]
        if is_rounded and scale.target is float8_scale and scale.args[0] is inner.args[0]:  # type: ignore[union-attr]
            return inner.args[0], True  # type: ignore[union-attr]
    return node, False


def _is_cast_around(source: fx.Node, node: fx.Node) -> bool:
    """Whether a linear reads a cast of half precision, and all that reads it is casts back."""
    if source.target is not aten._to_copy.default or dtype(node) is not torch.float32:
        return False
    before = dtype(source.args[0])
    return before in (torch.float16, torch.bfloat16) and all(
        user.target is aten._to_copy.default and dtype(user) is before for user in node.users
    )
