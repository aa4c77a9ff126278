"""Factors of an attention's channels go into the integer layer behind its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import normal, program
from torch import Tensor

from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program, arguments
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.quantize import int8_linear
from fxpress.ir.quantization.absorb import absorb
from fxpress.ir.verify import verify

aten = torch.ops.aten
HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE
WEIGHTS = {"query": normal(WIDTH, 6, seed=1), "key": normal(WIDTH, 6, seed=2), "bias": normal(WIDTH, seed=3)}
WEIGHTS["factors"] = normal(WIDTH, seed=4).abs() + 0.1
WEIGHTS["scale"] = normal(WIDTH, 1, seed=5).abs()
INTEGERS = (normal(WIDTH, 6, seed=6) * 40).round().clamp(-127, 127).to(torch.int8)


def by_heads(x: Tensor, number: int = HEADS) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], number, SIZE).transpose(1, 2)


def values(self: Any, x: Tensor) -> Tensor:
    """An integer layer with a fixed scale of its input."""
    stored = (x * 20).round().clamp(-128, 127).to(torch.int8)
    found: Tensor = int8_linear(stored, torch.tensor(0.05), None, self.integers, self.scale, self.bias)
    return found


def attended(self: Any, x: Tensor, value: Tensor) -> Tensor:
    query, key = (by_heads(x @ weight.t()) for weight in (self.query, self.key))
    return attention(query, key, value).transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH)


def usual(self: Any, x: Tensor) -> Tensor:
    return attended(self, x, by_heads(values(self, x))) * self.factors


def traced(function: Callable[..., Any]) -> tuple[Program, Tensor]:
    x = normal(2, 5, 6, seed=9)
    given: dict[str, Any] = {**WEIGHTS, "integers": torch.nn.Parameter(INTEGERS, requires_grad=False)}
    return program(function, x, **given), x


def test_factors_go_into_the_values() -> None:
    made, x = traced(usual)
    before = made.copy()
    assert absorb(made) == 1
    verify(made)
    assert [node.target for node in before.graph.nodes if node.op == "get_attr"].count("factors") == 1
    assert "factors" not in [node.target for node in made.graph.nodes if node.op == "get_attr"]
    (linear,) = made.calls(int8_linear)
    given = arguments(linear)
    torch.testing.assert_close(
        made.tensor(given["weight_scale"]), WEIGHTS["scale"] * WEIGHTS["factors"][:, None], rtol=0, atol=0
    )
    torch.testing.assert_close(made.tensor(given["bias"]), WEIGHTS["bias"] * WEIGHTS["factors"], rtol=0, atol=0)
    for length in (5, 1):
        batch = [x[:, :length]]
        comparison = compare(list(made.run(batch)), list(before.run(batch)), run_float64(before, batch))
        assert comparison.equal, comparison.reasons


def test_twice_is_once() -> None:
    made, _ = traced(usual)
    assert [absorb(made), absorb(made)] == [1, 0]


def attention_read_twice(self: Any, x: Tensor) -> list[Tensor]:
    found = attended(self, x, by_heads(values(self, x)))
    return [found * self.factors, found + 1]


def values_read_twice(self: Any, x: Tensor) -> list[Tensor]:
    value = values(self, x)
    return [attended(self, x, by_heads(value)) * self.factors, value]


def values_that_are_keys(self: Any, x: Tensor) -> Tensor:
    value = by_heads(values(self, x))
    found = attention(by_heads(x @ self.query.t()), value, value)
    return found.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH) * self.factors


def shared_values(self: Any, x: Tensor) -> Tensor:
    """Two query heads read one head of values, with factors of their own."""
    value = by_heads(values(self, x)[..., :SIZE], 1)
    query, key = by_heads(x @ self.query.t()), by_heads((x @ self.key.t())[..., :SIZE], 1)
    return attention(query, key, value).transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH) * self.factors


def a_factor_of_the_input(self: Any, x: Tensor) -> Tensor:
    return attended(self, x, by_heads(values(self, x))) * x.amax(-1, keepdim=True)


def float_values(self: Any, x: Tensor) -> Tensor:
    return attended(self, x, by_heads(x @ self.key.t())) * self.factors


def heads_in_another_order(self: Any, x: Tensor) -> Tensor:
    found = attention(*(by_heads(x @ self.query.t()) for _ in range(2)), by_heads(values(self, x)))
    return found.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[1], WIDTH) * self.factors


@pytest.mark.parametrize(
    "function",
    [
        attention_read_twice, values_read_twice, values_that_are_keys, shared_values, a_factor_of_the_input,
        float_values, heads_in_another_order,
    ],
)  # fmt: skip
def test_what_stays(function: Callable[..., Any]) -> None:
    made, _ = traced(function)
    text = str(made.graph)
    assert absorb(made) == 0
    assert str(made.graph) == text
