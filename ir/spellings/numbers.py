"""What is known of a value without running the program: numbers, and masks of zeros and ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import fx

from ..graph import arguments, attribute, dtype

aten = torch.ops.aten


def number(value: Any) -> float | None:
    """The number that a literal, or a tensor of one element that is no trained weight, always is; else None."""
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
        return number(given["fill_value"])
    if value.target is aten.scalar_tensor.default:
        return number(given["s"])
    if value.target in (aten._to_copy.default, aten.sqrt.default):
        inner = number(given["self"])
        root = inner is not None and value.target is aten.sqrt.default
        return math.sqrt(inner) if root and inner is not None and inner >= 0 else inner
    return None


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


_VIEWS = {
    aten.slice.Tensor, aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.select.int,
    aten.permute.default, aten.transpose.int, aten._to_copy.default,
}  # fmt: skip
_FULL = {aten.zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.ones.default: 1.0, aten.ones_like.default: 1.0}
_CHOICES = {
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.minimum.default, aten.maximum.default,
}  # fmt: skip
_ARITHMETIC: dict[Any, Callable[[float, float, Any], float]] = {
    aten.add.Tensor: lambda first, second, alpha: first + alpha * second,
    aten.sub.Tensor: lambda first, second, alpha: first - alpha * second,
    aten.mul.Tensor: lambda first, second, _: first * second,
}


def bounds(value: Any) -> tuple[float, float]:
    """Numbers between which the elements of a floating or boolean tensor lie; infinite where none are known."""
    unknown, found = (-math.inf, math.inf), number(value)
    if found is not None:
        return found, found
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return unknown
    if dtype(value) is torch.bool:
        return 0.0, 1.0
    if not dtype(value).is_floating_point:
        return unknown
    given = arguments(value) if value.op == "call_function" else {}
    ends: Iterable[float] = unknown
    if value.op == "get_attr":
        weight: Any = attribute(value.graph.owning_module, str(value.target))  # type: ignore[arg-type]
        ends = map(float, weight.detach().double().aminmax()) if weight.numel() else unknown
    elif value.target in _FULL:
        ends = (_FULL[value.target],)
    elif value.target in _VIEWS:
        ends = bounds(given["self"])
    elif value.target in _CHOICES:
        ends = (end for name in ("self", "other", "value") if name in given for end in bounds(given[name]))
    elif value.target in _ARITHMETIC:
        pairs = product(bounds(given["self"]), bounds(given["other"]))
        ends = (_ARITHMETIC[value.target](*pair, given.get("alpha")) for pair in pairs)
    held = [rounded(end, dtype(value)) for end in ends]
    return unknown if any(map(math.isnan, held)) else (min(held), max(held))


def rounded(value: float, kind: torch.dtype) -> float:
    """A number as a floating dtype holds it: infinity beyond the largest; the lowest less one is the lowest."""
    return float(torch.tensor(value, dtype=kind))


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
