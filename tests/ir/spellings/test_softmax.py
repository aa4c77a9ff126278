"""Softmax written out: found where it is a softmax for all numbers, inside of attention and alone; else the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import assert_equal, check, normal, program, reasons, rewritten
from heads import SIZES, additive, examples, keep, merge, qkv, traced
from torch import Tensor

from fxpress.ir.graph import arguments
from fxpress.ir.ops.attention import attention
from fxpress.passes import Canonicalize

aten = torch.ops.aten


# --- attention without an operator of that name: f(m, x [B, N, WIDTH], pad [B, N] True: a token, y) --------------


def logarithm(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((q @ k.mT + additive(pad)).log_softmax(-1).exp() @ v)


def less_the_logsumexp(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT * 0.5
    return merge(torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v)


def divided_before_the_product(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -math.inf)
    powers = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return merge((powers / powers.sum(-1, keepdim=True)) @ v)


def divided_after_the_product(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -1e9)
    powers = torch.exp(scores - scores.amax(-1).unsqueeze(-1).detach())
    return merge((powers @ v) / powers.sum(-1).unsqueeze(-1))


def maximum_detached(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return merge((scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(-1) @ v)


def nan_set_to_zero(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -math.inf)
    return merge(torch.nan_to_num(scores.softmax(-1)) @ v)


def nan_set_to_zero_behind_the_maximum(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -math.inf)
    return merge(torch.nan_to_num((scores - scores.amax(-1, keepdim=True)).softmax(-1), 0.0) @ v)


def nan_set_to_zero_beside_shared_sinks(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -math.inf)
    share = (scores.logsumexp(-1) - m.sinks.view(1, -1, 1)).sigmoid()
    return merge((torch.nan_to_num(scores.softmax(-1)) @ v) * share.unsqueeze(-1))


FOUND = {
    logarithm: "nan",  # with what a row without keys gives
    less_the_logsumexp: "zeros",
    divided_before_the_product: "nan",
    divided_after_the_product: "mean",
    maximum_detached: "zeros",
    nan_set_to_zero: "zeros",
    nan_set_to_zero_behind_the_maximum: "zeros",
    nan_set_to_zero_beside_shared_sinks: "zeros",
}


@pytest.mark.parametrize("spelling", FOUND, ids=lambda spelling: spelling.__name__)
def test_attention_is_found(spelling: Callable[..., Any]) -> None:
    before = traced(spelling)
    after, result = rewritten(before, Canonicalize(masks=False))
    assert len(after.calls(attention)) == 1, reasons(result)
    assert arguments(after.calls(attention)[0])["empty"] == FOUND[spelling]
    for batch, length in SIZES:
        x, pad, y = examples(batch, length)
        for allowed in (pad, torch.zeros_like(pad)):
            assert_equal(before, after, [x, allowed, y])


def exponentials_alone(m, x, pad, y):
    q, k, v = qkv(m, x)
    powers = torch.exp(q @ k.mT)
    return (powers / powers.sum(-1, keepdim=True)) @ v


def exponentials_and_something(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (powers / (powers.sum(-1, keepdim=True) + 1e-6)) @ v


def nan_set_to_one(m, x, pad, y):
    q, k, v = qkv(m, x)
    return torch.nan_to_num((q @ k.mT).softmax(-1), 1.0) @ v


NEAR_MISSES = {
    exponentials_alone: "expected a softmax of the scores, found exp (aten.exp.default)",
    exponentials_and_something: "expected a softmax of the scores, found exp (aten.exp.default)",
    nan_set_to_one: "nan_to_num (aten.nan_to_num.default) changes the probabilities after the softmax",
}


@pytest.mark.parametrize("spelling", NEAR_MISSES, ids=lambda spelling: spelling.__name__)
def test_near_miss_of_attention(spelling: Callable[..., Any]) -> None:
    before = traced(spelling)
    after, result = rewritten(before, Canonicalize())
    assert not after.calls(attention)
    assert any(NEAR_MISSES[spelling] in found for found in reasons(result, "attention")), reasons(result, "attention")


# --- softmax alone ---------------------------------------------------------------------------------------------


def quotient(x: Tensor, axis: int, highest: Callable[[Tensor], Tensor]) -> Tensor:
    powers = torch.exp(x - highest(x))
    return powers / powers.sum(axis, keepdim=True)


ALONE: dict[str, Callable[..., Tensor]] = {
    "logarithm": lambda m, x: x.log_softmax(1).exp(),
    "logarithm_in_double_precision": lambda m, x: x.log_softmax(-1, dtype=torch.float64).exp(),
    "quotient": lambda m, x: quotient(x, 1, lambda x: x.amax(1, keepdim=True)),
    "quotient_of_another_maximum": lambda m, x: quotient(x, 0, lambda x: x.max(0).values.unsqueeze(0)),
}


@pytest.mark.parametrize("case", ALONE)
def test_softmax_is_found(case: str) -> None:
    before = program(ALONE[case], normal(3, 5, 8))
    after, _ = check(before, Canonicalize())
    assert len(after.calls(aten.softmax.int)) == 1
    assert not after.calls(aten.exp.default)
    extremes = normal(3, 5, 8) * 100
    extremes[0, 0], extremes[1, 1, 1], extremes[2, 2, 2] = -math.inf, math.inf, math.nan
    assert_equal(before, after, [extremes])


OTHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "no_maximum": (
        lambda m, x: x.exp() / x.exp().sum(-1, keepdim=True),
        "exp overflows where a softmax does not",
    ),
    "maximum_of_all": (
        lambda m, x: quotient(x, -1, lambda x: x.max()),
        "exp overflows where a softmax does not",
    ),
    "maximum_of_another_axis": (
        lambda m, x: quotient(x, -1, lambda x: x.amax(0, keepdim=True)),
        "exp overflows where a softmax does not",
    ),
    "powers_returned": (
        lambda m, x: (x.log_softmax(-1).exp(), x.log_softmax(-1)),
        "log_softmax is returned by the model",
    ),
    "infinity_beside_others": (
        lambda m, x: torch.exp(x - x.logsumexp(-1, keepdim=True)),
        "exp gives other elements beside infinity than a softmax, expected a matmul of it",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_no_softmax(case: str) -> None:
    function, reason = OTHERS[case]
    after, result = rewritten(program(function, normal(3, 5, 8)), Canonicalize())
    assert not after.calls(aten.softmax.int)
    assert any(reason in found for found in reasons(result, "softmax")), reasons(result)


def test_a_product_in_fp16_is_not_divided_before() -> None:
    """It may overflow, where a product of probabilities does not."""

    def divided(m: Any, x: Tensor) -> Tensor:
        powers = torch.exp(x - x.amax(-1, keepdim=True))
        return (powers @ x.mT) / powers.sum(-1, keepdim=True)

    after, result = rewritten(program(divided, normal(3, 5, 8, dtype=torch.float16)), Canonicalize())
    assert not after.calls(aten.softmax.int)
    assert any("overflows" in found for found in reasons(result, "softmax"))


@pytest.mark.parametrize(
    "divisor",
    [lambda x: x, lambda x: x.sum(1, keepdim=True), lambda x: x.exp().sum(-1), lambda x: x.exp().mean(-1, True)],
    ids=["no_sum", "other_sum", "axis_not_kept", "mean"],
)
def test_another_quotient_is_no_near_miss(divisor: Callable[[Tensor], Tensor]) -> None:
    after, result = rewritten(program(lambda m, x: x.exp() / divisor(x), normal(5, 5)), Canonicalize())
    assert not after.calls(aten.softmax.int)
    assert not reasons(result, "softmax")
