"""How large the numbers of a tensor can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import module, normal, program, rewritten
from torch import Tensor

from fxpress.ir.spellings.magnitude import INTEGER, LONGEST, PRODUCT, magnitude
from fxpress.passes import Canonicalize

WEIGHTS = {"table": torch.tensor([[1.0, -3.0], [2.0, 0.5]]), "steps": torch.tensor([[0.0, -math.inf], [0.0, -7.0]])}

BOUNDS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], tuple[float, float]]] = {
    "input": (lambda m, x, ids: x, (math.inf, math.inf)),
    "made_of_an_input": (lambda m, x, ids: (1.0 - x) * -1e4, (math.inf, math.inf)),
    "integers": (lambda m, x, ids: ids.float(), (INTEGER, INTEGER)),
    "booleans": (lambda m, x, ids: (ids > 0).float(), (1.0, 1.0)),
    "product_with_a_weight": (lambda m, x, ids: F.linear(x, m.table), (PRODUCT, PRODUCT)),
    "weight": (lambda m, x, ids: m.table, (3.0, 3.0)),
    "rows_of_a_weight": (lambda m, x, ids: F.embedding(ids, m.table).transpose(0, 1), (3.0, 3.0)),
    "scaled_and_shifted": (lambda m, x, ids: m.table / -2.0 * 4.0 + 0.5, (6.5, 6.5)),
    "alpha": (lambda m, x, ids: torch.sub(m.table, m.table, alpha=2), (9.0, 9.0)),
    "joined": (lambda m, x, ids: torch.cat([m.table, -m.table]), (3.0, 3.0)),
    "positions": (lambda m, x, ids: torch.arange(x.shape[0]) * 0.5, (LONGEST / 2, LONGEST / 2)),
    "slopes": (lambda m, x, ids: torch.pow(0.5, torch.arange(1, 5)), (0.5, 0.5)),
    "choice": (lambda m, x, ids: torch.where(ids > 0, m.table[0, 0], -9.0), (9.0, 9.0)),
    "hidden_by_a_weight": (lambda m, x, ids: m.steps + 1.0, (math.inf, 8.0)),
    "hidden_by_a_choice": (lambda m, x, ids: m.table[0].masked_fill(ids > 0, -math.inf), (math.inf, 3.0)),
    "hidden_turned_round": (lambda m, x, ids: 0.0 - m.steps, (math.inf, math.inf)),
    "quotient_of_tensors": (lambda m, x, ids: m.table / m.steps, (math.inf, math.inf)),
    "overflow": (lambda m, x, ids: ids.to(torch.float16), (math.inf, math.inf)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name: str) -> None:
    value, expected = BOUNDS[name]
    ids = torch.tensor([0, 1])
    traced, _ = rewritten(program(module(value, **WEIGHTS), normal(3, 2), ids), Canonicalize())
    (result,) = next(iter(reversed(traced.graph.nodes))).args[0]
    assert (magnitude(result), magnitude(result, hiding=True)) == expected


def test_a_long_chain_is_not_followed() -> None:
    """Nor is one whose parts are all read twice, which has a power of two of ways through it."""

    def doubled(self: Any, x: Tensor) -> Tensor:
        value = F.linear(x, self.table)
        for _ in range(200):
            value = value + value
        return value

    traced = program(module(doubled, **WEIGHTS), normal(2, 2), dynamic=None)
    (result,) = next(iter(reversed(traced.graph.nodes))).args[0]
    assert magnitude(result) == math.inf
