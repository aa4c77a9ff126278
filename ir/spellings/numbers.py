"""What is known of a value without running the program: numbers, and masks of zeros and ones."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import fx

from ..graph import arguments, attribute, dtype

aten = torch.ops.aten


def number(value: Any) -> float | None:
    """The number that a literal, or a tensor of one element that is no trained weight, always is; else None.

    As its dtype holds it: in float16 -1e9 is -inf.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | fx.Node):
        return None
    if not isinstance(value, fx.Node):
        return float(value)
    given = arguments(value) if value.op == "call_function" else {}
    if value.op == "get_attr":
        weight: Any = attribute(value.graph.owning_module, str(value.target))  # type: ignore[arg-type]
        constant = isinstance(weight, torch.Tensor) and weight.numel() == 1 and not weight.requires_grad
        return float(weight) if constant else None
    if value.target in (aten.full.default, aten.full_like.default):
        return held(number(given["fill_value"]), dtype(value))
    if value.target is aten.scalar_tensor.default:
        return held(number(given["s"]), dtype(value))
    if value.target is aten._to_copy.default:
        return held(number(given["self"]), dtype(value))
    if value.target is aten.sqrt.default:
        inner = number(given["self"])
        return math.sqrt(inner) if inner is not None and inner >= 0 else None
    return None


@overload
def held(value: float, kind: torch.dtype) -> float: ...
@overload
def held(value: float | None, kind: torch.dtype) -> float | None: ...
def held(value: float | None, kind: torch.dtype) -> float | None:
    """A number as a dtype holds it: infinity beyond the largest, after rounding; None: no number."""
    return None if value is None else float(torch.tensor(value, dtype=torch.float64).to(kind))


def is_zero_or_one(mask: Any) -> bool:
    """Whether a tensor is known to hold zeros and ones only: a part of such a buffer, or a cast of booleans."""
    while isinstance(mask, fx.Node) and mask.target in (
        aten.slice.Tensor, aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.select.int,
    ):  # fmt: skip
        mask = mask.args[0]
    if not isinstance(mask, fx.Node):
        return False
    if mask.target is aten._to_copy.default:
        return dtype(mask.args[0]) is torch.bool or is_zero_or_one(mask.args[0])
    if mask.op != "get_attr":
        return False
    value: Any = attribute(mask.graph.owning_module, str(mask.target))  # type: ignore[arg-type]
    return isinstance(value, torch.Tensor) and not value.requires_grad and bool(((value == 0) | (value == 1)).all())


def times_complement(tensor: fx.Node, mask: fx.Node) -> float | None:
    """The number c of c * (1 - mask), if a tensor is that."""
    if tensor.target is not aten.mul.Tensor:
        return None
    first, second = tensor.args[:2]
    difference, low = (first, number(second)) if number(first) is None else (second, number(first))
    if low is None or not isinstance(difference, fx.Node) or difference.target is not aten.sub.Tensor:
        return None
    given = arguments(difference)
    complement = number(given["self"]) == 1 and given["other"] is mask and number(given["alpha"]) == 1
    return low if complement else None
