"""Attention through a fixed number of summaries of the keys: Nystromformer's landmarks, Linformer's projections.

Summaries are means over segments of the tokens that may be seen: of n such tokens, the r-th belongs to segment
floor(r m / n) of m. So padding, on either side, changes nothing, and n <= m tokens have a segment each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .attention import cast, like_attention, wide
from .table import operator

_HIDDEN = -1e30  # finite: where nothing is seen the softmax is of no consequence, and no NaN


def segments(key_mask: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Which of `number` segments each token belongs to, 0 or 1: [B, number, N]; and their sizes, [B, number].

    `key_mask` is [B, N]; a token that may not be seen belongs to none.
    """
    real = cast(key_mask, torch.int64)
    rank = real.cumsum(1) - 1
    count = real.sum(1, keepdim=True)
    place = torch.div(rank * number, count.clamp(min=1), rounding_mode="floor")
    here = torch.arange(number, device=key_mask.device)[None, :, None] == place[:, None, :]
    members = cast(torch.logical_and(here, key_mask[:, None, :]), torch.float32)
    return members, members.sum(-1)


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 at least, with a key head for each query head."""
    query, key, value = (cast(item, wide(item.dtype)) for item in (query, key, value))
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return query, key, value


def _mask(key: Tensor, key_mask: Tensor | None) -> Tensor:
    if key_mask is not None:
        return key_mask
    return torch.ones((key.shape[0], key.shape[2]), dtype=torch.bool, device=key.device)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
Inverse = Callable[[Tensor, int], Tensor]


def attend_all(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(query key^T + bias) value over the keys that `key_mask` [B, M] allows; finite where it allows none."""
    scores = query @ key.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    return torch.softmax(scores.masked_fill(~key_mask[:, None, None, :], _HIDDEN), -1) @ value


def inverse_by_iteration(matrix: Tensor, iterations: int = 6) -> Tensor:
    """What `pseudo_inverse` computes."""
    number = torch.arange(matrix.shape[-1], device=matrix.device)
    identity = cast(number[:, None] == number, matrix.dtype)
    columns = matrix.sum(-2, keepdim=True).amax(-1, keepdim=True)
    found = matrix.transpose(-1, -2) / columns
    for _ in range(iterations):
        product = matrix @ found
        found = 0.25 * found @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return found


@operator(
    "nystrom_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask=None, int landmarks=64, "
    "int iterations=6, float? scale=None) -> Tensor",
    meaning="softmax(query landmarks^T) pinv(softmax(landmarks landmarks^T)) softmax(landmarks key^T) value",
    shape=lambda query, key, value, *args, **kwargs: like_attention(query, value),
)
def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    landmarks: int = 64,
    iterations: int = 6,
    scale: float | None = None,
    attend: Attend = attend_all,
    inverse: Inverse = inverse_by_iteration,
) -> Tensor:
    """The Nystrom method on the softmax matrix (Nystromformer: Xiong et al., 2021).

    Shapes as of `attention`, with as many keys as queries. Landmarks are means of queries and keys over segments of
    the tokens that `key_mask` allows. The pseudo-inverse is approached by `iterations` steps of an iteration of third
    order (Razavi et al., 2014); more are not better: few of them leave small singular values small, which regularises.

    Where no more tokens may be seen than there are landmarks, the result is exact attention.

    `attend` and `inverse` are no arguments of the operator: a backend that has kernels for them traces through those.
    """
    dtype = query.dtype
    query, key, value = _inputs(query, key, value)
    mask = _mask(key, key_mask)
    factor = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    query, key = query * factor, key * factor
    members, sizes = segments(mask, landmarks)
    members = cast(members, query.dtype)[:, None]  # [B, 1, m, N]
    means = members / cast(sizes, query.dtype).clamp(min=1)[:, None, :, None]
    query_marks, key_marks = means @ query, means @ key  # [B, H, m, D]
    marked = sizes > 0
    seen = attend(query_marks, key, value, mask, None)  # exact attention of the landmarks, [B, H, m, E]
    scores = query_marks @ key_marks.transpose(-1, -2)
    middle = torch.softmax(scores.masked_fill(~marked[:, None, None, :], _HIDDEN), -1)
    approximate = attend(query, key_marks, inverse(middle, iterations) @ seen, marked, None)
    own = members.transpose(-1, -2) @ seen  # each token's own landmark
    count = sizes.sum(-1)[:, None, None, None]
    result = torch.where(count <= landmarks, own, approximate) * cast(count > 0, query.dtype)
    return cast(result, dtype)


@operator(
    "pseudo_inverse(Tensor matrix, int iterations=6) -> Tensor",
    meaning="the pseudo-inverse of matrices of probabilities, by an iteration of third order",
    shape=lambda matrix, *args, **kwargs: matrix.new_empty(matrix.shape),
)
def pseudo_inverse(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Of matrices [..., m, m] whose rows are probabilities, the Moore-Penrose inverse (Razavi et al., 2014).

    It begins at the transpose over the largest sum of a column, which the iteration converges from; `iterations` steps
    are made, however near that is.
    """
    return inverse_by_iteration(matrix, iterations)


@operator(
    "linformer_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask=None, Tensor? pooling=None, "
    "int rank=64, float? scale=None) -> Tensor",
    meaning="softmax(query (E key)^T + log size) (F value), E and F means over segments of the keys",
    shape=lambda query, key, value, *args, **kwargs: like_attention(query, value),
)
def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    pooling: Tensor | None = None,
    rank: int = 64,
    scale: float | None = None,
    attend: Attend = attend_all,
) -> Tensor:
    """Keys and values projected to `rank` rows along the sequence (Linformer: Wang et al., 2020).

    Shapes as of `attention`; keys may be more or fewer than queries. The projections are means over segments of the
    tokens that `key_mask` allows, not matrices over positions, so that they suit any length; the score of a mean
    counts as often as it has members.

    `pooling` [H, 2, D] makes the means weighted ones: a key k counts exp(k . pooling[h, 0]) in the mean of the keys,
    and exp(k . pooling[h, 1]) in that of the values. Zeros are plain means.

    Where no more tokens may be seen than `rank`, the result is exact attention.

    `attend` is as of `nystrom_attention`.
    """
    dtype = query.dtype
    query, key, value = _inputs(query, key, value)
    mask = _mask(key, key_mask)
    members, sizes = segments(mask, rank)
    members = cast(members, query.dtype)[:, None]
    if pooling is None:
        means = members / cast(sizes, query.dtype).clamp(min=1)[:, None, :, None]
        keys, values = means @ key, means @ value
    else:
        keys, values = (_pooled(members, key, item, pooling[:, index]) for index, item in enumerate((key, value)))
    keys = keys * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    often = cast(sizes, query.dtype).clamp(min=1).log()[:, None, None, :]
    result = attend(query, keys, values, sizes > 0, often)
    return cast(result * cast(sizes.sum(-1) > 0, query.dtype)[:, None, None, None], dtype)


def _pooled(members: Tensor, key: Tensor, item: Tensor, vector: Tensor) -> Tensor:
    """Means of `item` over segments, weighted by exp(key . vector): [B, H, m, E]."""
    logits = (key * cast(vector, key.dtype)[None, :, None, :]).sum(-1, keepdim=True)  # [B, H, N, 1]
    weights = torch.exp(logits.clamp(-30, 30))
    return (members @ (weights * item)) / (members @ weights).clamp(min=1e-30)
