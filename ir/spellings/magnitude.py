"""How large the numbers of a tensor can be, seen without running the program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import arguments, attribute, dtype
from .numbers import held, is_zero_or_one, number

aten = torch.ops.aten

LONGEST = 2.0**24  # tokens: scores of more would fit no memory
INTEGER = 2.0**63
PRODUCT = 1e3  # products with weights, and norms, are taken to be of the size of scores
STEPS = 100  # beyond which a value is not followed any further


def magnitude(value: Any, hiding: bool = False) -> float:
    """How far from 0 the numbers of a tensor, or a number, are at most; inf: they may be any.

    An input of floats may be a mask, and hold any number. With `hiding` those that are -inf do not count.
    """
    return _Bounds().of(value, hiding)


class _Bounds:
    """Follows a value to what it is made of."""

    def __init__(self) -> None:
        self.known: dict[tuple[fx.Node, bool], float] = {}

    def of(self, value: Any, hiding: bool = False) -> float:
        constant = number(value)
        if constant is not None:
            return 0.0 if hiding and constant == -math.inf else abs(constant)
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            return LONGEST if isinstance(value, fx.Node) else math.inf  # a size, or none at all
        if (value, hiding) not in self.known:
            self.known[value, hiding] = math.inf
            self.known[value, hiding] = self._in_dtype(value, hiding)
        return self.known[value, hiding]

    def _in_dtype(self, node: fx.Node, hiding: bool) -> float:
        kind = dtype(node)
        if kind is torch.bool:
            return 1.0
        found = self._followed(node, hiding) if len(self.known) < STEPS else math.inf
        if kind.is_floating_point:
            return held(found, kind)  # rounded: the lowest number less a small one is the lowest
        return min(found, INTEGER)

    def _followed(self, node: fx.Node, hiding: bool) -> float:
        if node.op == "get_attr":
            return _largest(_weight(node), hiding)
        rule = _RULES.get(node.target)
        if rule:
            return rule(self, arguments(node), hiding)
        return _largest(_computed(node), hiding) if _is_constant(node) else math.inf


def _weight(node: fx.Node) -> Tensor:
    found: Tensor = attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
    return found.detach()


def _is_constant(node: fx.Node) -> bool:
    """Whether a value is computed from a few weights and numbers, as the slopes of ALiBi are."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        found = waiting.pop()
        if found in seen or found.op == "get_attr":
            continue
        random = torch.Tag.nondeterministic_seeded in getattr(found.target, "tags", ())
        if found.op != "call_function" or random or len(seen) > STEPS:
            return False
        seen.add(found)
        waiting += found.all_input_nodes
    return True


def _computed(node: fx.Node) -> Tensor:
    values: dict[fx.Node, Any] = {}

    def value(part: fx.Node) -> Any:
        if part not in values:
            call: Any = part.target
            values[part] = (
                _weight(part)
                if part.op == "get_attr"
                else call(*fx.map_arg(part.args, value), **fx.map_arg(part.kwargs, value))
            )
        return values[part]

    with torch.no_grad():
        found: Tensor = value(node)
    return found


def _largest(numbers: Tensor, hiding: bool) -> float:
    if hiding:
        numbers = numbers[numbers != -math.inf]
    found = float(numbers.abs().max()) if numbers.numel() else 0.0
    return math.inf if math.isnan(found) else found


# --- rules: the bound of a call from its arguments; only what adds and chooses keeps -inf apart from other numbers ---

_Rule = Callable[[_Bounds, dict[str, Any], bool], float]


def _part(name: str) -> _Rule:
    """No number that is not among those of an argument, but 0."""
    return lambda bounds, given, hiding: bounds.of(given[name], hiding)


def _absolute(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    return bounds.of(given["self"])


def _at_most(limit: float) -> _Rule:
    return lambda bounds, given, hiding: limit


def _choice(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    return max(bounds.of(given[name], hiding) for name in ("self", "other", "value") if name in given)


def _joined(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    return max(bounds.of(item, hiding) for item in given["tensors"])


def _sum(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    times = number(given["alpha"])
    if times is None:
        return math.inf
    return bounds.of(given["self"], hiding) + abs(times) * bounds.of(given["other"], hiding and times > 0)


def _difference(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    times = number(given["alpha"])
    if times == 1 and number(given["self"]) == 1 and is_zero_or_one(given["other"]):
        return 1.0  # the complement of a mask
    return math.inf if times is None else bounds.of(given["self"], hiding) + abs(times) * bounds.of(given["other"])


def _product(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    return bounds.of(given["self"]) * bounds.of(given["other"])


def _quotient(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    divisor = number(given["other"])
    return bounds.of(given["self"]) / abs(divisor) if divisor and not given.get("rounding_mode") else math.inf


def _range(bounds: _Bounds, given: dict[str, Any], hiding: bool) -> float:
    return max(bounds.of(given.get("start", 0)), bounds.of(given["end"]))


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys((aten.reshape.default, aten.transpose.int, aten.permute.default, aten.expand.default,
                     aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.index.Tensor,
                     aten.gather.default, aten.index_select.default, aten.repeat.default, aten.flip.default,
                     aten.repeat_interleave.self_int, aten._to_copy.default, aten.tril.default, aten.triu.default),
                    _part("self")),
    aten.embedding.default: _part("weight"),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar,
                     aten.masked_fill.Tensor), _choice),
    aten.cat.default: _joined,
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default), _at_most(0.0)),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default), _at_most(1.0)),
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _difference,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _quotient,
    **dict.fromkeys((aten.neg.default, aten.abs.default, aten.relu.default), _absolute),
    **dict.fromkeys((aten.tanh.default, aten.sigmoid.default, aten.softmax.int, aten.sin.default, aten.cos.default),
                    _at_most(1.0)),
    **dict.fromkeys((aten.arange.default, aten.arange.start), _range),
    **dict.fromkeys((aten.matmul.default, aten.linear.default, aten.layer_norm.default, aten.conv1d.default,
                     aten.conv2d.default), _at_most(PRODUCT)),
}  # fmt: skip
