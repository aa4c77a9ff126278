"""Activations written out."""

from __future__ import annotations

from typing import Any

import torch

from .. import pattern as p
from ..graph import Program
from ..pattern import Match, Refusal, Rule

aten = torch.ops.aten


def _gelu_tanh_pattern() -> p.Call:
    x = p.Any("x")
    cube = p.Call(aten.pow.Tensor_Scalar, self=x, exponent=p.Literal("three"))
    inner = p.Call(aten.add.Tensor, commutative=True, self=x,
                   other=p.Call(aten.mul.Tensor, self=cube, other=p.Literal("cubic")))  # fmt: skip
    tanh = p.Call(aten.tanh.default, self=p.Call(aten.mul.Tensor, self=inner, other=p.Literal("slope")))
    half = p.Call(aten.mul.Tensor, self=x, other=p.Literal("half"))
    one_plus = p.Call(aten.add.Tensor, self=tanh, other=p.Literal("one"))
    return p.Call(aten.mul.Tensor, commutative=True, self=half, other=one_plus)


def _gelu_tanh_condition(found: Match) -> Any:
    expected = {"three": 3.0, "cubic": 0.044715, "slope": (2 / torch.pi) ** 0.5, "half": 0.5, "one": 1.0}
    for name, value in expected.items():
        if abs(float(found[name]) - value) > 1e-7 * value:
            return Refusal(f"the constant {found[name]} stands where tanh-GELU has {value}")
    return True


def _gelu_tanh_replace(program: Program, found: Match, _: Any) -> None:
    program.replace(found.root, program.call(aten.gelu.default, found["x"], approximate="tanh", before=found.root))


RULES = (Rule("gelu_tanh", _gelu_tanh_pattern(), _gelu_tanh_condition, _gelu_tanh_replace),)
