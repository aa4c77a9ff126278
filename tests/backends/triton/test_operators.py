"""Every operator of the graph language as Triton kernels beside its reference, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
from kernels_agree import agree, calling
from operator_cases import BY_NAME, CASES
from torch import Tensor

from fxpress.ir.ops.table import OPERATORS

FLOATS = [case for case in CASES if any(isinstance(item, Tensor) and item.is_floating_point() for item in case[1])]


def in_half(item: Any) -> Any:
    return item.half() if isinstance(item, Tensor) and item.is_floating_point() else item


def named(cases: list[Any]) -> list[str]:
    return [f"{number}-{case[0]}" for number, case in enumerate(cases)]


@pytest.mark.parametrize(("name", "args", "options"), CASES, ids=named(CASES))
def test_equals_its_reference(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    agree(*calling(BY_NAME[name], *args, **options))


# float16 orders and rounds what these choose by otherwise than an fp32 computation of the same.
CHOOSES = ("dynamic_blocks", "lsh_attention", "dynamic_quantize", "quantize")


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [case for case in FLOATS if case[0] not in CHOOSES],
    ids=named([case for case in FLOATS if case[0] not in CHOOSES]),
)
def test_equals_its_reference_in_half_precision(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    halves = {key: in_half(item) for key, item in options.items()}
    agree(*calling(BY_NAME[name], *map(in_half, args), **halves))


def test_every_operator_is_tried() -> None:
    assert {entry.name for entry in OPERATORS.values()} == {case[0] for case in CASES}
