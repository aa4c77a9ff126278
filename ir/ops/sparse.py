"""Linear layers whose weight is 2:4 sparse, stored as the two numbers of each four and where they stand.

Of four neighbours in a row of the weight at most two are not zero (Mishra et al., 2021): stored are half of the
numbers, and 4 bits for each four say which half. In float16 that is 9/16 of the bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import operator


def pack_sparse24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 2:4 weight [N, K] as its numbers [N, K / 2] and their positions, uint8 [N, ceil(K / 8)].

    Of each four neighbours come two numbers, in order, zeros too where fewer are left. Their positions among the four,
    of 2 bits each, the first one's lower, are half a byte; a byte holds those of eight neighbours, lower half first.

    Raises:
        ValueError: K is no multiple of 4, or more than two of four neighbours are not zero.
    """
    reason = sparse24_misfit(weight)
    if reason is not None:
        raise ValueError(reason)
    fours = weight.reshape(weight.shape[0], weight.shape[1] // 4, 4)
    places = (fours == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(-1).values
    values = fours.gather(-1, places).flatten(1)
    halves = (places[..., 0] + 4 * places[..., 1]).to(torch.uint8)
    halves = F.pad(halves, (0, halves.shape[1] % 2))
    return values.contiguous(), halves[:, 0::2] + halves[:, 1::2] * 16


def unpack_sparse24(values: Tensor, positions: Tensor) -> Tensor:
    """The weight [N, K] that `pack_sparse24` was given."""
    rows, fours = values.shape[0], values.shape[1] // 2
    halves = torch.stack((positions & 15, positions >> 4), -1).flatten(1)[:, :fours]
    places = torch.stack((halves & 3, halves >> 2), -1).to(torch.int64)
    dense = torch.zeros(rows, fours, 4, dtype=values.dtype, device=values.device)
    return dense.scatter(-1, places, values.reshape(rows, fours, 2)).flatten(1)


def sparse24_misfit(weight: Tensor) -> str | None:
    """Why a weight [N, K] is not 2:4 sparse along K; None: it is."""
    if weight.shape[1] % 4:
        return f"its rows have {weight.shape[1]} numbers, no multiple of 4"
    most = int((weight.reshape(-1, 4) != 0).sum(-1).amax()) if weight.numel() else 0
    return f"{most} of 4 neighbours are not zero" if most > 2 else None


@operator(
    "sparse24_linear(Tensor input, Tensor values, Tensor positions, Tensor? bias, Tensor? dense=None) -> Tensor",
    meaning="input weight^T + bias, of each four numbers of the weight two, and where they stand",
)
def sparse24_linear(
    input: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, dense: Tensor | None = None
) -> Tensor:
    """Linear layer with a 2:4 sparse weight as `pack_sparse24` gives it.

    Shapes: input [..., K]; values [N, K / 2] of its dtype; positions uint8 [N, ceil(K / 8)]; bias [N]; dense [N, K],
    the same weight as it was, for inputs of so many rows that reading it takes less time than expanding `values`, or
    None; result [..., N].
    """
    return F.linear(input, unpack_sparse24(values, positions), bias)
