"""Results of operators whose references take many steps on symbolic sizes, known from the arguments' sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .attention import EMPTY, like_attention, wide


def attention_result(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    left: Any = None,
    right: Any = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty: str = "zeros",
) -> Tensor | None:
    """What attention gives, as an empty tensor; None where its arguments are not seen to fit: its reference tells."""
    if not (query.dim() == key.dim() == value.dim() == 4) or not (query.dtype == key.dtype == value.dtype):
        return None
    batch, heads, rows, size = query.shape
    groups, columns = key.shape[1], key.shape[2]
    computed = wide(query.dtype)
    fit = (
        computed.is_floating_point
        and empty in EMPTY
        and _divides(groups, heads)
        and _equal(key.shape, (batch, groups, columns, size))
        and _equal(value.shape[:3], (batch, groups, columns))
        and (bias is None or _broadcasts(bias.shape, (batch, heads, rows, columns)))
        and (bias is None or bias.dtype == torch.bool or torch.promote_types(bias.dtype, computed) == computed)
        and (key_mask is None or (key_mask.dtype == torch.bool and _equal(key_mask.shape, (batch, columns))))
        and (sinks is None or _equal(sinks.shape, (heads,)))
    )
    return like_attention(query, value) if fit else None


def _equal(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether sizes are known to be the expected ones; no guard is added."""
    return len(found) == len(expected) and all(
        statically_known_true(a == b) for a, b in zip(found, expected, strict=True)
    )


def _divides(groups: Any, heads: Any) -> bool:
    if isinstance(groups, int) and isinstance(heads, int):
        return groups > 0 and heads % groups == 0
    return statically_known_true(groups == heads)


def _broadcasts(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether a tensor of these sizes is known to broadcast to others."""
    return len(found) <= len(expected) and all(
        (isinstance(a, int) and a == 1) or statically_known_true(a == b)
        for a, b in zip(reversed(found), reversed(expected), strict=False)
    )
