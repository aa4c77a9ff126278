"""Rotary position embedding: pairs of elements turned by angles that grow with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import operator


@operator(
    "rotary(Tensor input, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    meaning="input * cos + turn(input) * sin on the first columns, turn(a, b) = (-b, a) for each pair",
)
def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding (Su et al., 2021) of queries or keys.

    Shapes: input [B, H, N, D], or any [..., D]; cos and sin broadcast to [..., R], [B or 1, 1, N, R] for heads second;
    result as input. Only the first R <= D columns turn (partial rotation), the others pass through.

    A pair is the columns (i, i + R / 2), or (2 i, 2 i + 1) where `interleaved` (GPT-J). `cos` and `sin` state the angle
    of a pair twice, once for each of its columns.
    """
    columns = cos.shape[-1]
    turned = input[..., :columns]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    result = turned * cos + partner * sin
    return result if columns == input.shape[-1] else torch.cat((result, input[..., columns:]), -1)
