"""What there is to quantize in a program: linear layers, by the activation that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import Program, arguments, dtype, shape
from ..layers import is_named, name_of
from ..ops.float8 import float8_linear
from ..ops.int8_attention import int8_attention
from ..ops.integer import integer_softmax
from ..ops.quantize import dequantize, dynamic_quantize, int4_embedding, int4_linear, int8_linear, quantize
from ..pattern import Refusal

aten = torch.ops.aten

# The least value of an activation function, rounded down: where it is known, a token's integers need no sign.
LEAST: dict[Any, float] = {
    aten.relu.default: 0.0,
    aten.sigmoid.default: 0.0,
    aten.gelu.default: -0.17005,
    aten.silu.default: -0.27847,
}
QUANTIZED = (
    quantize, dequantize, dynamic_quantize, int8_linear, int4_linear, int4_embedding, float8_linear, int8_attention,
)  # fmt: skip
_VIEWS = (aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.clone.default)


@dataclass(frozen=True)
class Site:
    """Linear layers that read one activation [..., K]: it is quantized once for all of them.

    `name` is made of the linears' names, which a node has no longer when it is replaced.
    """

    source: fx.Node
    linears: tuple[fx.Node, ...]
    name: str

    @property
    def multiplications(self) -> int:
        """Numbers in the weights: multiplications for each token."""
        return sum(shape(linear.args[1])[0] * shape(linear.args[1])[1] for linear in self.linears)


def quantized_by(program: Program) -> str | None:
    """The pass that has quantized a program; None: none has."""
    if program.calls(integer_softmax):  # there is an attention in whatever it rewrites
        return "integer_only"
    return "quantize" if program.calls(*QUANTIZED) else None


def linear_sites(program: Program, skip: Sequence[str]) -> tuple[list[Site], list[Refusal]]:
    """The linear layers with a weight of floats, by the activation that they read, in graph order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    refusals = []
    for node in program.calls(aten.linear.default):
        reason = _refuses(node, skip)
        if reason is None:
            found.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
        else:
            refusals.append(Refusal(reason, "quantize", node.name))
    sites = [Site(source, tuple(linears), " + ".join(map(name_of, linears))) for source, linears in found.items()]
    return sites, refusals


def _refuses(node: fx.Node, skip: Sequence[str]) -> str | None:
    given = arguments(node)
    weight, bias = given["weight"], given["bias"]
    if weight.op != "get_attr":
        return f"{weight.name} is no weight"
    if bias is not None and bias.op != "get_attr":
        return f"{bias.name} is no weight"
    if dtype(weight) not in (torch.float32, torch.float16, torch.bfloat16):
        return f"weight {weight.target} is {dtype(weight)}"
    if len(shape(weight)) != 2:
        return f"weight {weight.target} is no matrix"
    return f"{name_of(node)} is to be skipped" if is_named(node, skip) else None


def least(node: fx.Node) -> float | None:
    """A number that an activation is never below, whatever the input; None: there is none."""
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return LEAST.get(node.target)
