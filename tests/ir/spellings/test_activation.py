"""Activations in every spelling: found, equal, and refused with a reason where they are something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, check, normal, program, reasons
from torch import Tensor

from fxpress.ir.pattern import Match
from fxpress.ir.spellings.activation import QUICK_GELU, find
from fxpress.passes import Canonicalize

aten = torch.ops.aten
X = (2, 5, 8)
SLOPE = math.sqrt(2.0 / math.pi)


def test_a_stack_of_sums_is_read_in_no_time() -> None:
    """An activation at its end is asked for at each of its sums; a reading that visits shared parts again and again
    would not end."""

    def stack(m: Any, x: Tensor) -> Tensor:
        for _ in range(60):
            x = x + (x * 0.5)
        return torch.tanh(x)

    _, result = check(program(stack, normal(*X)), Canonicalize())
    assert "gelu" not in result.rewrites


def gelu_new(x: Tensor, cubic: float = 0.044715, power: float = 3.0) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + cubic * torch.pow(x, power))))


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "tanh_new": (gelu_new, aten.gelu.default),
    "tanh_fast": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        aten.gelu.default,
    ),
    "tanh_bloom": (
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        aten.gelu.default,
    ),
    "tanh_half_last": (lambda x: x * (1 + torch.tanh(SLOPE * (x + 0.044715 * x**3))) / 2, aten.gelu.default),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), aten.gelu.default),
    "erf_product": (lambda x: x * (0.5 * (1.0 + torch.erf(x * 0.7071067811865476))), aten.gelu.default),
    "erf_sum": (lambda x: 0.5 * x + 0.5 * x * torch.erf(x / math.sqrt(2.0)), aten.gelu.default),
    "silu": (lambda x: x * torch.sigmoid(x), aten.silu.default),
    "silu_swapped": (lambda x: torch.sigmoid(x) * x, aten.silu.default),
    "silu_of_a_product": (lambda x: (2 * x) * torch.sigmoid(2 * x), aten.silu.default),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_found(case: str, golden: Callable[[str], None]) -> None:
    function, target = SPELLINGS[case]
    before = program(lambda m, x: function(x), normal(*X))
    after, result = check(before, Canonicalize())
    assert len(after.calls(target)) == 1
    assert not after.calls(aten.tanh.default, aten.erf.default, aten.sigmoid.default)
    golden(before_after(before, after, result))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", SPELLINGS)
def test_found_in_other_precisions(case: str, dtype: torch.dtype) -> None:
    function, target = SPELLINGS[case]
    after, _ = check(program(lambda m, x: function(x), normal(*X, dtype=dtype)), Canonicalize())
    assert len(after.calls(target)) == 1


@pytest.mark.parametrize("name", ["mish", "hardswish", "hardsigmoid", "gelu", "silu", "leaky_relu", "softplus"])
def test_torchs_own_stay(name: str) -> None:
    _, result = check(program(lambda m, x: getattr(F, name)(x), normal(*X)), Canonicalize())
    assert result.changes == 0 and result.refusals == []


def test_quick_gelu_is_found_at_its_sigmoid() -> None:
    made = program(lambda m, x: x * torch.sigmoid(1.702 * x), normal(*X))
    (node,) = made.calls(aten.sigmoid.default)
    found = find(QUICK_GELU, node)
    assert isinstance(found, Match)
    assert (found["x"].op, found.root.target, len(found.nodes)) == ("placeholder", aten.mul.Tensor, 3)


# --- refusals --------------------------------------------------------------------------------------------------


def gate_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    return x * gate * 1.0, gate


def inside_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x / math.sqrt(2.0)
    return 0.5 * x * (1.0 + torch.erf(scaled)), scaled


REFUSALS: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "cubic": (
        lambda x: gelu_new(x, cubic=0.0447),
        "gelu_tanh",
        "0.5 x + 0.5 x t with t = tanh(0.797884561 x + 0.0356654399 x^3), where gelu_tanh is "
        "0.5 x + 0.5 x t with 0.797884561 x + 0.0356774081 x^3",
    ),
    "short_constant": (
        lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142)),
        "gelu",
        "t = erf(0.707113562 x), where gelu is",
    ),
    "one_and_a_half": (lambda x: 0.5 * x * (1.5 + torch.erf(x * math.sqrt(0.5))), "gelu", "0.75 x + 0.5 x t with"),
    "sigmoid_slope": (lambda x: x * torch.sigmoid(1.5 * x), "silu", "1 x t with t = sigmoid(1.5 x), where silu is"),
    "inside_returned": (inside_returned, "gelu", "div is returned by the model"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    function, rule, reason = REFUSALS[case]
    _, result = check(program(lambda m, x: function(x), normal(*X)), Canonicalize())
    assert result.rewrites[rule] == 0
    assert any(reason in found for found in reasons(result, rule)), result.refusals


NOTHING: dict[str, Callable[[Tensor], Any]] = {
    "square_in_tanh": lambda x: gelu_new(x, power=2.0),
    "plain_tanh": lambda x: x.tanh() + 1,
    "gate_of_another": lambda x: x.exp() * torch.sigmoid(x),
    "gate_read_twice": gate_returned,
    "cube": lambda x: x.pow(3),
    "integers": lambda x: (x > 0).long() * (x > 0).long(),
}


@pytest.mark.parametrize("case", NOTHING)
def test_something_else_is_left_alone(case: str) -> None:
    after, result = check(program(lambda m, x: NOTHING[case](x), normal(*X)), Canonicalize())
    assert not after.calls(aten.gelu.default, aten.silu.default)
    assert not {"gelu", "gelu_tanh", "silu"} & set(result.rewrites)


def test_a_mixed_precision_gate_is_left_alone() -> None:
    after, _ = check(program(lambda m, x: x * torch.sigmoid(x.float()), normal(*X).half()), Canonicalize())
    assert not after.calls(aten.silu.default)
