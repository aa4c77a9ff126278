"""worth_without: what a value is where a mask does not hold, read from its graph and found there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import normal, program, rewritten
from torch import Tensor

from fxpress.ir.masks import expression as e
from fxpress.ir.masks.reader import Reader
from fxpress.ir.masks.without import Number, worth_without
from fxpress.passes import Canonicalize

Value = Callable[[Tensor, Tensor], Tensor]  # of an integer mask and x, both [B, N]


def found(value: Value, condition: Value) -> Number | None:
    def function(self: Any, mask: Tensor, x: Tensor) -> list[Tensor]:
        return [value(mask, x), condition(mask, x)]

    raw = program(function, torch.ones(2, 5, dtype=torch.int64), normal(2, 5), dynamic=None)
    traced, _ = rewritten(raw, Canonicalize())
    outputs: Any = next(iter(reversed(traced.graph.nodes))).args[0]
    reader, indices = Reader(traced, [2, 1, 1, 5]), (e.index(0), e.index(3))
    return worth_without(*(reader.read(item, indices) for item in outputs))


KNOWN: dict[str, tuple[Value, Number]] = {
    "itself": (lambda mask, x: mask, 0),
    "a multiple": (lambda mask, x: 3 * mask - 2, -2),
    "cast": (lambda mask, x: mask.float(), 0),
    "a product": (lambda mask, x: x * mask, 0),
    "a product with a cast": (lambda mask, x: mask.to(x.dtype) * (x + 1), 0),
    "the condition": (lambda mask, x: mask != 0, False),
    "its opposite": (lambda mask, x: mask == 0, True),
    "both": (lambda mask, x: (mask != 0) & (x > 0), False),
    "either": (lambda mask, x: (mask == 0) | (x > 0), True),
    "at most": (lambda mask, x: mask <= 0, True),
    "filled": (lambda mask, x: x.masked_fill(mask == 0, -1e9), -1e9),
    "chosen": (lambda mask, x: torch.where(mask.bool(), x, 4.0), 4.0),
    "a number": (lambda mask, x: torch.full((2, 5), 7.0), 7.0),
}
OPEN: dict[str, Value] = {
    "another": lambda mask, x: x,
    "a sum": lambda mask, x: x + mask,
    "by another mask": lambda mask, x: x.masked_fill(x > 0, 0.0),
    "filled where it holds": lambda mask, x: x.masked_fill(mask != 0, 0.0),
    "of another place": lambda mask, x: x * mask.flip(1),
    "either of two": lambda mask, x: (mask != 0) | (x > 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_one_number(name: str) -> None:
    value, expected = KNOWN[name]
    assert found(value, lambda mask, x: mask != 0) == expected
    mask = torch.tensor([[0, 1, 2, 0, -3]])
    assert (value(mask.expand(2, 5), normal(2, 5))[:, mask[0] == 0] == expected).all()


@pytest.mark.parametrize("name", OPEN)
def test_none(name: str) -> None:
    assert found(OPEN[name], lambda mask, x: mask != 0) is None


def test_where_a_boolean_mask_does_not_hold() -> None:
    assert found(lambda mask, x: x * (x > 0), lambda mask, x: x > 0) == 0
    assert found(lambda mask, x: mask, lambda mask, x: mask > 0) is None  # it may be -1
