"""Patterns: what matches, and the reason that a near miss gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, fx

from fxpress.ir import pattern as p
from fxpress.ir.graph import Program

aten = torch.ops.aten
X = (2, 5, 8)


def traced(function: Callable[..., Any], count: int = 1, **weights: Tensor) -> Program:
    return program(function, *(normal(*X, seed=index) for index in range(count)), **weights)


def result(made: Program, index: int = 0) -> fx.Node:
    node = next(node for node in made.graph.nodes if node.op == "output").args[0][index]
    assert isinstance(node, fx.Node)
    return node


def reason(pattern: Any, node: fx.Node) -> str:
    found = p.match(pattern, node)
    assert isinstance(found, p.Refusal)
    return found.reason


EXP_OF_TANH = p.Call(aten.exp.default, self=p.Call(aten.tanh.default, name="tanh", self=p.Any("x")))


def test_match_covers_its_nodes() -> None:
    made = traced(lambda m, x: x.tanh().exp())
    found = p.match(EXP_OF_TANH, result(made))
    assert isinstance(found, p.Match)
    assert {node.name for node in found.nodes} == {"tanh", "exp"}
    assert (found["tanh"].name, found["x"].name, found.get("y", 3)) == ("tanh", "x", 3)


def test_another_root_is_no_match_at_all() -> None:
    assert p.match(EXP_OF_TANH, result(traced(lambda m, x: x.tanh()))) is None


def test_near_miss_names_what_was_found() -> None:
    made = traced(lambda m, x: x.sin().exp())
    assert reason(EXP_OF_TANH, result(made)) == "expected aten.tanh.default, found sin (aten.sin.default)"


@pytest.mark.parametrize("function", [lambda m, x: x.tanh(), lambda m, x: x.sigmoid()])
def test_interchangeable_targets(function: Callable[..., Any]) -> None:
    pattern = p.Call((aten.tanh.default, aten.sigmoid.default), self=p.Any("x"))
    assert isinstance(p.match(pattern, result(traced(function))), p.Match)


@pytest.mark.parametrize("function", [lambda m, x: x.tanh().exp(), lambda m, x: x.exp()])
def test_optional_node(function: Callable[..., Any]) -> None:
    inner = p.optional(lambda value: p.Call(aten.tanh.default, self=value), p.Any("x"))
    found = p.match(p.Call(aten.exp.default, self=inner), result(traced(function)))
    assert isinstance(found, p.Match)
    assert found["x"].name == "x"


def test_first_alternative_wins() -> None:
    pattern = p.Call(aten.exp.default, self=p.OneOf(p.Any("first"), p.Any("second")))
    found = p.match(pattern, result(traced(lambda m, x: x.exp())))
    assert isinstance(found, p.Match)
    assert list(found.captures) == ["first"]


@pytest.mark.parametrize("function", [lambda m, x, y: x.exp() + y, lambda m, x, y: y + x.exp()])
def test_commutative(function: Callable[..., Any]) -> None:
    exp = p.Call(aten.exp.default, self=p.Any("x"))
    pattern = p.Call(aten.add.Tensor, commutative=True, self=exp, other=p.Any("y"))
    found = p.match(pattern, result(traced(function, 2)))
    assert isinstance(found, p.Match)
    assert (found["x"].name, found["y"].name) == ("x", "y")


def test_order_counts_otherwise() -> None:
    pattern = p.Call(aten.sub.Tensor, self=p.Call(aten.exp.default, self=p.Any("x")), other=p.Any("y"))
    assert "expected aten.exp.default" in reason(pattern, result(traced(lambda m, x, y: y - x.exp(), 2)))


def test_literal_is_captured() -> None:
    pattern = p.Call(aten.pow.Tensor_Scalar, self=p.Any("x"), exponent=p.Literal("power"))
    found = p.match(pattern, result(traced(lambda m, x: x.pow(3))))
    assert isinstance(found, p.Match)
    assert found["power"] == 3


def test_literal_is_no_node() -> None:
    pattern = p.Call(aten.mul.Tensor, self=p.Any("x"), other=p.Literal("factor"))
    assert (
        reason(pattern, result(traced(lambda m, x, y: x * y, 2))) == "factor must be a literal, found y (placeholder)"
    )


def test_weight_is_captured() -> None:
    made = traced(lambda m, x: x * m.w, w=normal(8))
    found = p.match(p.Call(aten.mul.Tensor, self=p.Any("x"), other=p.Weight("w")), result(made))
    assert isinstance(found, p.Match)
    assert found["w"].target == "w"


def test_weight_is_no_input() -> None:
    pattern = p.Call(aten.mul.Tensor, self=p.Any("x"), other=p.Weight("w"))
    assert reason(pattern, result(traced(lambda m, x, y: x * y, 2))) == "w must be a weight, found y (placeholder)"


def test_constant_in_the_pattern() -> None:
    pattern = p.Call(aten.pow.Tensor_Scalar, self=p.Any("x"), exponent=2)
    assert isinstance(p.match(pattern, result(traced(lambda m, x: x.pow(2)))), p.Match)


@pytest.mark.parametrize("power", [3, 2.0])
def test_another_constant(power: float) -> None:
    pattern = p.Call(aten.pow.Tensor_Scalar, self=p.Any("x"), exponent=2)
    assert reason(pattern, result(traced(lambda m, x: x.pow(power)))) == f"expected 2, found {power}"


SQUARE = p.Call(aten.mul.Tensor, self=p.Any("x"), other=p.Any("x"))


def test_same_name_is_the_same_node() -> None:
    assert isinstance(p.match(SQUARE, result(traced(lambda m, x: x * x))), p.Match)


def test_same_name_for_two_nodes() -> None:
    found = reason(SQUARE, result(traced(lambda m, x, y: x * y, 2)))
    assert found == "x must be x (placeholder), found y (placeholder)"


def test_one_named_call_for_two_nodes() -> None:
    exp = p.Call(aten.exp.default, name="exp", self=p.Any("x"))
    pattern = p.Call(aten.mul.Tensor, self=exp, other=p.Call(aten.exp.default, name="exp", self=p.Any("y")))
    made = traced(lambda m, x, y: x.exp() * y.exp(), 2)
    assert reason(pattern, result(made)) == "exp must be one node, found another: exp_1 (aten.exp.default)"


@pytest.mark.parametrize(
    "function, reader",
    [
        (lambda m, x: (x.tanh().exp(), x.tanh()), None),
        (lambda m, x: _twice(x.tanh()), "tanh is returned by the model"),
        (lambda m, x: _read(x.tanh()), "tanh is also read by sin"),
    ],
)
def test_nodes_inside_are_read_once(function: Callable[..., Any], reader: str | None) -> None:
    found = p.match(EXP_OF_TANH, result(traced(function)))
    if reader is None:
        assert isinstance(found, p.Match)
    else:
        assert isinstance(found, p.Refusal)
        assert found.reason.startswith(reader)


def _twice(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), x


def _read(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), x.sin()


def test_shared_node_may_be_read_elsewhere() -> None:
    pattern = p.Call(aten.exp.default, self=p.Call(aten.tanh.default, shared=True, self=p.Any("x")))
    assert isinstance(p.match(pattern, result(traced(lambda m, x: _twice(x.tanh())))), p.Match)


def test_an_option_that_the_pattern_leaves_out_must_be_the_default() -> None:
    pattern = p.Call(aten.add.Tensor, self=p.Any("x"), other=p.Any("y"))
    made = traced(lambda m, x, y: torch.add(x, y, alpha=2), 2)
    assert reason(pattern, result(made)) == "add has alpha=2, expected 1"


def test_default_spelled_out_is_the_default() -> None:
    made = traced(lambda m, x: F.gelu(x))
    node = result(made)
    node.kwargs = {"approximate": "none"}
    assert isinstance(p.match(p.Call(aten.gelu.default, self=p.Any("x")), node), p.Match)


def test_the_nearest_of_several_misses_is_told() -> None:
    far = p.Call(aten.exp.default, self=p.Call(aten.sin.default, self=p.Any("x")))
    near = p.Call(aten.exp.default, self=p.Call(aten.tanh.default, self=p.Call(aten.cos.default, self=p.Any("x"))))
    made = traced(lambda m, x: x.tanh().exp())
    assert reason(p.OneOf(far, near), result(made)) == "expected aten.cos.default, found x (placeholder)"


def test_functions_on_sizes_match_by_place() -> None:
    import operator

    made = program(lambda m, x: x.new_zeros(x.shape[0] + 1), normal(*X))
    node = made.calls(operator.add)[0]
    found = p.match(p.Call(operator.add, **{"0": p.Any("size"), "1": 1}), node)
    assert isinstance(found, p.Match)
