"""Attentions in place of exact attention that are made of the kernels that there are, where their references are not.

The references materialise scores, and rows that are gathered; through the functions here, which compute the same, they
are exact attention to few keys, attention to gathered places, and the inverse of a small matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ....ir.ops.attention import attention
from ....ir.ops.low_rank_attention import (
    inverse_by_iteration,
    linformer_attention,
    nystrom_attention,
    pseudo_inverse,
)
from ....ir.ops.lsh_attention import gathered_attention, lsh_attention
from ....ir.ops.table import OPERATORS
from ....kernels.pseudo_inverse import LARGEST


def _attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = attention(query, key, value, bias, key_mask, scale=1.0)
    return found


def _inverse(matrix: Tensor, iterations: int) -> Tensor:
    found: Tensor = (pseudo_inverse if matrix.shape[-1] <= LARGEST else inverse_by_iteration)(matrix, iterations)
    return found


# What is traced in the place of an operator's reference: the reference, through these.
WRITTEN: dict[Any, Callable[..., Any]] = {
    target: functools.partial(OPERATORS[target].reference, **through)
    for target, through in (
        (nystrom_attention, {"attend": _attend, "inverse": _inverse}),
        (linformer_attention, {"attend": _attend}),
        (lsh_attention, {"attend": gathered_attention}),
    )
}
