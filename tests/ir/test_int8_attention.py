"""int8_attention: by hand, close to attention under every mask, causal, without influence of padding, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.equality import sqnr_db
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.int8_attention import int8_attention

LENGTH = 13
MASK = torch.ones(2, LENGTH, dtype=torch.bool)
MASK[1, 9:] = False
RANGES = torch.full((3,), 4 / 127)  # none of the numbers below reaches 4


def heads(seed: int, groups: int = 4, length: int = LENGTH, size: int = 16) -> Tensor:
    return normal(2, groups, length, size, seed=seed).clamp(-3.9, 3.9)


def three(groups: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return heads(0), heads(1, groups), heads(2, groups)


def test_by_hand() -> None:
    """Scores ln 5 and 0 give 1 and 1/5, with the values' scales 1 and 4 the weights 1 and 4/5: 255 and 204 steps of
    1/255. Both values are 127 of their scales, so (255 * 127 - 204 * 127) / 255 / (1 + 1/5)."""
    query = torch.tensor([[[[127.0, 0.0]]]])
    key = torch.tensor([[[[127.0, 0.0], [0.0, 127.0]]]])
    value = torch.tensor([[[[127.0], [-4 * 127.0]]]])
    found = int8_attention(query, key, value, scale=math.log(5) / 127**2)
    assert found.item() == pytest.approx((255 * 127 - 204 * 127) / 255 / 1.2, rel=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "soft cap": {"softcap": 5.0},
    "causal": {"right": 0},
    "window": {"left": 3, "right": 2},
    "key mask": {"key_mask": MASK},
    "bias": {"bias": normal(4, LENGTH, LENGTH, seed=5)},
    "boolean": {"bias": (normal(2, 1, LENGTH, LENGTH, seed=5) > 0) | torch.eye(LENGTH, dtype=torch.bool)},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("ranges", [None, RANGES], ids=["dynamic", "static"])
@pytest.mark.parametrize("groups", [4, 2])
def test_is_close_to_attention(case: str, ranges: Tensor | None, groups: int) -> None:
    given = three(groups)
    found = int8_attention(*given, **OPTIONS[case], ranges=ranges)
    assert sqnr_db(found, attention(*given, **OPTIONS[case])) > (36 if ranges is None else 28)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    given = [item.to(dtype) for item in three()]
    found = int8_attention(*given)
    assert found.dtype is dtype
    assert torch.equal(found, int8_attention(*(item.float() for item in given)).to(dtype))


@pytest.mark.parametrize("empty", ["zeros", "nan", "mean"])
def test_a_row_without_a_key_gives_what_attention_gives(empty: str) -> None:
    mask = MASK.clone()
    mask[0] = False
    found, expected = (op(*three(), key_mask=mask, empty=empty) for op in (int8_attention, attention))
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03, equal_nan=True)


def test_causal_attention_sees_nothing_of_later_tokens() -> None:
    query, key, value = three()
    later = [item.clone() for item in (query, key, value)]
    for item in later:
        item[:, :, 7:] *= 100
    found, other = (int8_attention(*given, right=0)[:, :, :7] for given in ((query, key, value), later))
    assert torch.equal(found, other)


def test_padding_has_no_influence() -> None:
    query, key, value = three()
    others = [torch.where(MASK[:, None, :, None], item, 1e4) for item in (key, value)]
    assert torch.equal(int8_attention(query, key, value, None, MASK), int8_attention(query, *others, None, MASK))


@pytest.mark.parametrize("ranges", [None, RANGES], ids=["dynamic", "static"])
def test_gradients_are_close_to_those_of_attention(ranges: Tensor | None) -> None:
    grads = []
    for op, options in ((int8_attention, {"ranges": ranges}), (attention, {})):
        given = [item.clone().requires_grad_() for item in three()]
        (op(*given, right=0, **options) * heads(7)).sum().backward()
        grads.append([item.grad for item in given])
    for found, expected in zip(*grads, strict=True):
        assert sqnr_db(found, expected) > 20


def test_zeros_give_zeros() -> None:
    zero = torch.zeros(1, 2, 3, 8)
    assert not int8_attention(zero, zero, zero).any()


def test_other_rules_for_empty_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="empty must be one of zeros, nan, mean, found 'ones'"):
        int8_attention(*three(), empty="ones")
