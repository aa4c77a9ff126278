"""Fused linear layers written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import assert_equal, inputs, normal, program
from torch import Tensor

from fxpress.ir.expand import expand
from fxpress.ir.graph import Program
from fxpress.ir.ops.linear import ACTIVATIONS, gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.table import OPERATORS
from fxpress.ir.verify import verify

FUSED = (linear_act, gated_linear, mlp, split_linear)
WEIGHTS = {
    "w": normal(6, 8),
    "u": normal(6, 8, seed=1),
    "d": normal(4, 6, seed=2),
    "b": normal(6, seed=3),
    "c": normal(6, seed=4),
    "e": normal(4, seed=5),
}


def expanded(function: Callable[..., Any]) -> Program:
    """Expanded, verified, with no fused layer left, and equal at two sizes."""
    before = program(function, normal(2, 5, 8), **WEIGHTS)
    after = before.copy()
    assert expand(after) == len(before.calls(*FUSED)) > 0
    after.clean()
    verify(after)
    assert not after.calls(*FUSED)
    for base in (3, 6):
        assert_equal(before, after, inputs(before, base))
    return after


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_act(name: str, bias: bool) -> None:
    expanded(lambda m, x: linear_act(x, m.w, m.b if bias else None, name))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_linear(name: str, bias: bool) -> None:
    after = expanded(lambda m, x: gated_linear(x, m.w, m.u, m.b if bias else None, m.c if bias else None, name))
    assert len(after.calls(torch.ops.aten.linear.default)) == 2


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_mlp(name: str, gated: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate = (m.u, m.c) if gated else ()
        result: Tensor = mlp(x, m.w, m.b, m.d, m.e, name, *gate)
        return result

    assert len(expanded(forward).calls(torch.ops.aten.linear.default)) == 2 + gated


@pytest.mark.parametrize("bias", [True, False])
def test_split_linear(bias: bool) -> None:
    expanded(lambda m, x: tuple(split_linear(x, m.w, m.b if bias else None, [1, 2, 3])))


def test_each_of_two_fused_layers() -> None:
    expanded(lambda m, x: linear_act(linear_act(x, m.w, m.b, "gelu"), m.d, m.e, "relu"))


def test_every_operator_of_fused_linear_layers_is_expanded() -> None:
    """One that `expand` does not know would silently stay in floats."""
    fused = {entry.overload for entry in OPERATORS.values() if entry.reference.__module__ == "fxpress.ir.ops.linear"}
    assert fused == set(FUSED)


def test_a_program_without_fused_layers_stays() -> None:
    traced = program(lambda m, x: torch.nn.functional.linear(x, m.w), normal(2, 8), w=normal(6, 8))
    assert expand(traced) == 0
