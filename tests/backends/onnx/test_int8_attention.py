"""int8_attention in ONNX Runtime beside its reference, under every mask, and that its matmuls are of integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from build import normal
from kernels_agree import calling
from sampled import sampled
from torch import Tensor, nn

import fxpress
from fxpress.backends.onnx.export import check
from fxpress.ir.equality import sqnr_db
from fxpress.ir.ops.int8_attention import int8_attention

RANGES = torch.full((3,), 4 / 127)


def case(batch: int, length: int, groups: int = 4) -> list[Tensor]:
    return [normal(batch, count, length, 16, seed=seed) for seed, count in enumerate((4, groups, groups))]


def key_mask(batch: int, length: int, empty: bool = False) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    mask[0] &= not empty
    return mask


CASES: dict[str, Any] = {
    "plain": lambda b, n: (case(b, n), {}),
    "static": lambda b, n: (case(b, n), {"ranges": RANGES}),
    "grouped": lambda b, n: (case(b, n, 2), {}),
    "grouped, static": lambda b, n: (case(b, n, 2), {"ranges": RANGES, "scale": 0.3}),
    "causal": lambda b, n: (case(b, n), {"right": 0}),
    "window": lambda b, n: (case(b, n), {"left": 2, "right": 1}),
    "key mask": lambda b, n: (case(b, n), {"key_mask": key_mask(b, n)}),
    "no key": lambda b, n: (case(b, n), {"key_mask": key_mask(b, n, True)}),
    "no key, mean": lambda b, n: (case(b, n), {"key_mask": key_mask(b, n, True), "empty": "mean"}),
    "no key, nan": lambda b, n: (case(b, n), {"key_mask": key_mask(b, n, True), "empty": "nan"}),
    "bias": lambda b, n: (case(b, n), {"bias": normal(b, 1, n, n, seed=5), "softcap": 3.0}),
}


class Attends(nn.Module):
    """A call with tensors by the names of the arguments, and with other options."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = int8_attention(**inputs, **self.options)
        return found


def split(name: str, batch: int, length: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a case by their names, and its other options."""
    args, given = CASES[name](batch, length)
    named = {**dict(zip(("query", "key", "value"), args, strict=True)), **given}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in named.items() if key not in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(CASES, many=("grouped", "no key, mean", "no key, nan")))
def test_equals_its_reference(name: str, tmp_path: Path) -> None:
    example, options = split(name, 3, 6)
    model = Attends(options).eval()
    compiled = fxpress.compile(model, [], (example,), backend="onnx", verify=False, threads=1)
    for size in ((3, 6), (2, 11)):
        given, _ = split(name, *size)
        found, expected = compiled(given), model(given)
        assert torch.equal(found.isnan(), expected.isnan())
        assert sqnr_db(found.nan_to_num(), expected.nan_to_num()) > 45  # a tie may be rounded to the other side
    compiled.to_onnx(tmp_path / "m.onnx")
    operators = Counter(item.op_type for item in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.node)
    assert operators["MatMulInteger"] == 2 and not operators["MatMul"]


def test_half_precision_is_refused_with_the_reason() -> None:
    made, _ = calling(int8_attention, *(item.half() for item in case(2, 5)))
    (problem,) = check(made)
    assert "the kernels give float32, not torch.float16" in problem
