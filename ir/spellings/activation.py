"""Activations written out: polynomials in x and in one function of a polynomial in x.

tanh-GELU, however its factors are ordered, is 0.5 x + 0.5 x t where t = tanh(0.79788 x + 0.035677 x^3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import pattern as p
from ..graph import Program, dtype
from ..pattern import Match, Refusal, Rule

aten = torch.ops.aten

Polynomial = Mapping[tuple[int, int], float]
"""The coefficient of x^i t^j under (i, j)."""
_SCALE = math.sqrt(2 / math.pi)
_HALF_GATE: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}


@dataclass(frozen=True)
class Activation:
    """`outer`(x, t) where t = function(`inner`(x)) is `target`(x, **options); target None: torch has no operator."""

    name: str
    function: Any
    inner: Polynomial
    outer: Polynomial
    target: Any = None
    options: tuple[tuple[str, Any], ...] = ()


GELU = Activation("gelu", aten.erf.default, {(1, 0): math.sqrt(0.5)}, _HALF_GATE, aten.gelu.default)
GELU_TANH = Activation(
    "gelu_tanh", aten.tanh.default, {(1, 0): _SCALE, (3, 0): 0.044715 * _SCALE}, _HALF_GATE, aten.gelu.default,
    (("approximate", "tanh"),),
)  # fmt: skip
SILU = Activation("silu", aten.sigmoid.default, {(1, 0): 1.0}, {(1, 1): 1.0}, aten.silu.default)
QUICK_GELU = Activation("quick_gelu", aten.sigmoid.default, {(1, 0): 1.702}, {(1, 1): 1.0})
_EXACT = 1e-7  # relative error of a constant that fp32 cannot tell from the right one
_LONGEST = 4  # calls from the function to the result
_DEEPEST = 8  # calls of a polynomial, one in another
_ARITHMETIC = (aten.neg.default, aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar)


def _polynomial(
    value: Any, x: fx.Node, t: fx.Node | None, nodes: set[fx.Node], depth: int = _DEEPEST
) -> Polynomial | None:
    """`value` as a polynomial in x and t, and the calls that make it; None if it is none, or deeper."""
    if value is x:
        return {(1, 0): 1.0}
    if value is t:
        return {(0, 1): 1.0}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {(0, 0): float(value)}
    if not isinstance(value, fx.Node) or value.target not in _ARITHMETIC or value.kwargs or not _is_like(value, x):
        return None
    if not depth:  # a stack of residual additions would take twice as long for each
        return None
    nodes.add(value)
    target, parts = value.target, [_polynomial(item, x, t, nodes, depth - 1) for item in value.args]
    if any(part is None for part in parts):
        return None
    first: Any = parts[0]
    if target is aten.neg.default:
        return _product(first, {(0, 0): -1.0})
    if len(parts) != 2:
        return None
    second: Any = parts[1]
    if target is aten.mul.Tensor:
        return _product(first, second)
    if target is aten.add.Tensor:
        return {power: first.get(power, 0.0) + second.get(power, 0.0) for power in {**first, **second}}
    constant = second.get((0, 0), 0.0) if set(second) == {(0, 0)} else 0.0
    if target is aten.div.Tensor and constant:
        return _product(first, {(0, 0): 1 / constant})
    if target is aten.pow.Tensor_Scalar and constant in (1.0, 2.0, 3.0):
        result: Polynomial = {(0, 0): 1.0}
        for _ in range(int(constant)):
            result = _product(result, first)
        return result
    return None


def _is_like(value: fx.Node, x: fx.Node) -> bool:
    """Whether both are tensors of one dtype."""
    tensors = isinstance(value.meta["val"], torch.Tensor) and isinstance(x.meta["val"], torch.Tensor)
    return tensors and dtype(value) == dtype(x)


def _product(first: Polynomial, second: Polynomial) -> Polynomial:
    result: dict[tuple[int, int], float] = {}
    for (i, j), a in first.items():
        for (k, m), b in second.items():
            result[i + k, j + m] = result.get((i + k, j + m), 0.0) + a * b
    return result


def _same(found: Polynomial | None, wanted: Polynomial) -> bool:
    return (
        found is not None
        and set(found) == set(wanted)
        and all(math.isclose(found[power], wanted[power], rel_tol=_EXACT) for power in wanted)
    )


def _below(value: Any, depth: int = _LONGEST + 2) -> Iterator[fx.Node]:
    """The nodes that a value is made of, nearest first: what x may be."""
    waiting = [value]
    for _ in range(depth):
        yield from waiting
        waiting = [used for node in waiting if node.op == "call_function" for used in node.all_input_nodes]


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    """The calls that the value of a node goes through, as long as one reads it."""
    for _ in range(_LONGEST):
        readers = [user for user in node.users if user.op == "call_function"]
        if len(node.users) != 1 or not readers:
            return
        node = readers[0]
        yield node


def find(activation: Activation, node: fx.Node) -> Match | Refusal | None:
    """An activation at the node of its function: its input as "x", its result as the root.

    A Refusal where the polynomials have the same powers but other constants, or something else reads a part.
    """
    if node.target is not activation.function:
        return None
    argument: Any = node.args[0]
    missed: Refusal | None = None
    for x in dict.fromkeys(_below(argument)):
        inner_nodes: set[fx.Node] = set()
        inner = _polynomial(argument, x, None, inner_nodes)
        if inner is None or set(inner) != set(activation.inner):
            continue
        for root in _chain(node):
            outer_nodes: set[fx.Node] = set()
            outer = _polynomial(root, x, node, outer_nodes)
            if outer is None or set(outer) != set(activation.outer):
                continue
            if _same(inner, activation.inner) and _same(outer, activation.outer):
                nodes = frozenset({node, *inner_nodes, *outer_nodes})
                leaked = p.leak(nodes, root)
                return Refusal(leaked) if leaked else Match(root, {"x": x}, nodes)
            missed = missed or Refusal(
                f"{_text(outer)} with t = {_function(node)}({_text(inner)}), where {activation.name} is "
                f"{_text(activation.outer)} with {_text(activation.inner)}"
            )
    return missed


def _function(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def _text(polynomial: Polynomial) -> str:
    """`0.5 x + 0.5 x t`"""

    def term(power: tuple[int, int], factor: float) -> str:
        x = "" if power[0] == 0 else "x" if power[0] == 1 else f"x^{power[0]}"
        return " ".join(filter(None, (f"{factor:.9g}", x, "t" * power[1])))

    return " + ".join(term(power, polynomial[power]) for power in sorted(polynomial))


def _rule(activation: Activation) -> Rule:
    def replace(program: Program, found: Match, _: Any) -> None:
        new = program.call(activation.target, found["x"], **dict(activation.options), before=found.root)
        program.replace(found.root, new)

    return Rule(activation.name, lambda node: find(activation, node), lambda _: True, replace)


RULES = tuple(map(_rule, (GELU, GELU_TANH, SILU)))
