"""torch's own attention without any pass: what the exporter makes of it does not always run, or not export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal
from torch import Tensor, nn
from torch.export import Dim

import fxpress
from fxpress.compiler.families import EXAMPLE, SIZES, families


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (item.unflatten(-1, (-1, 8)).transpose(1, 2) for item in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, **self.options).transpose(1, 2).flatten(2)


def mask_of(kind: str, batch: int, length: int) -> Tensor | None:
    allowed = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    allowed[-1, ..., length // 2 :] = False
    if kind == "one row":
        return allowed
    if kind == "a row without keys":
        square = allowed.expand(batch, 1, length, length).clone()
        square[0, :, 0] = False
        return square
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf) if kind == "added" else None


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("mask", "key_heads", "options"),
    [
        ("none", 4, {}),
        ("none", 4, {"is_causal": True}),
        ("none", 4, {"scale": 0.5}),
        ("one row", 4, {}),
        ("added", 4, {}),
        ("a row without keys", 4, {}),
        ("one row", 2, {"enable_gqa": True}),
        ("none", 1, {}),
    ],
)
def test_equals_torch(backend: str, mask: str, key_heads: int, options: dict[str, Any]) -> None:
    def given(batch: int, length: int) -> tuple[Tensor, ...]:
        query = normal(batch, length, 4 * 8, seed=1)
        key, value = (normal(batch, length, key_heads * 8, seed=seed) for seed in (2, 3))
        made = mask_of(mask, batch, length)
        return (query, key, value) if made is None else (query, key, value, made)

    shapes = [{0: Dim.AUTO, 1: Dim.AUTO}] * 3 + [{0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}]
    example = given(2, 6)
    compiled = fxpress.compile(
        Attend(**options).eval(), [], example, tuple(shapes[: len(example)]), backend=backend, threads=1
    )
    for size in ((2, 6), (3, 9), (1, 1), (4, 2)):
        verdict = compiled.verify(given(*size))
        assert verdict.equal, (size, verdict.reasons)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [family.name for family in families()])
def test_families_without_a_pass(name: str) -> None:
    family = next(item for item in families() if item.name == name)
    torch.manual_seed(0)
    compiled = fxpress.compile(family.model().eval(), [], family.inputs(*EXAMPLE), backend="onnx", threads=1)
    for batch, length in SIZES:
        verdict = compiled.verify(family.inputs(batch, max(length, family.shortest)))
        assert verdict.equal, verdict.reasons
