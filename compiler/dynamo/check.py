"""Whether a traced graph gives what dynamo's gives, and shares memory as it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def agree(value: Any, usual: Any, inner: torch.dtype | None = None) -> bool:
    """Whether two outputs are the same but for rounding.

    Args:
        inner: the dtype in which they were computed; None: their own.
    """
    if not isinstance(usual, Tensor):
        return type(value) is type(usual) and value == usual
    if not isinstance(value, Tensor) or value.shape != usual.shape or value.dtype != usual.dtype:
        return False
    if usual.dtype.is_floating_point or usual.dtype.is_complex:
        share = _SHARE.get(inner or usual.dtype, 1e-5)
        return torch.allclose(value, usual, rtol=share, atol=share * _peak(usual), equal_nan=True)
    return torch.equal(value, usual)


_SHARE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # a step of the dtype, of the largest number


def _peak(value: Tensor) -> float:
    finite = value[torch.isfinite(value)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def sharing(outputs: Sequence[Any], args: Sequence[Any]) -> list[set[int]]:
    """Of each output, the arguments and outputs that it shares memory with."""
    everything = [value if isinstance(value, Tensor) and value.numel() else None for value in [*args, *outputs]]
    homes = [None if value is None else value.untyped_storage().data_ptr() for value in everything]
    count = len(args)
    return [
        {place for place, home in enumerate(homes) if home is not None and home == homes[count + index]}
        for index in range(len(outputs))
    ]
