"""Attention whose weights are products of features, phi(q) . phi(k): linear in the length, with or without a window of
exact attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import band, cast, like_attention, wide
from .table import operator

_SMALLEST_FEATURE = 1e-4  # as in the reference code of Performer
_SMALLEST_SUM = 1e-20


@operator(
    "random_features(Tensor input, Tensor projection, Tensor? key_mask=None, str shift='fixed', float? scale=None) "
    "-> Tensor",
    meaning="exp(x projection^T - |x|^2 / 2 - shift) + 1e-4, x the input times the root of the scale",
)
def random_features(
    input: Tensor,
    projection: Tensor,
    key_mask: Tensor | None = None,
    shift: str = "fixed",
    scale: float | None = None,
) -> Tensor:
    """Positive orthogonal random features of queries or keys (FAVOR+, Performer: Choromanski et al., 2021): on average
    over projections, phi(q) . phi(k) = exp(q . k scale).

    Shapes: input [B, H, N, D]; projection [M, D]; key_mask [B, N]; result [B, H, N, M]. A shift keeps numbers in range:
    "row" (of queries, where it cancels): each row has its own, its largest exponent; "all" (of keys): all rows of a
    head have one, the largest exponent among those that `key_mask` allows; "fixed": the largest that there can be,
    |projection|^2 / 2, as far as it is beyond 60, so that nothing that comes later has a part in it (causal).

    Raises:
        ValueError: there is no such shift.
    """
    if shift not in ("row", "all", "fixed"):
        raise ValueError(f"shift must be 'row', 'all' or 'fixed', found {shift!r}")
    floats = wide(input.dtype)
    factor = math.sqrt(1 / math.sqrt(input.shape[-1]) if scale is None else scale)
    rows, directions = cast(input, floats) * factor, cast(projection, floats)
    exponents = rows @ directions.t()
    half = (rows * rows).sum(-1, keepdim=True) * 0.5
    # The shift and |x|^2 / 2 are one number a row: taken off together, the features are passed over once.
    if shift == "row":
        off = exponents.amax(-1, keepdim=True)
    elif shift == "all":
        largest = exponents.amax(-1, keepdim=True) - half
        if key_mask is not None:
            largest = largest.masked_fill(~key_mask[:, None, :, None], -1e30)
        off = half + largest.amax(-2, keepdim=True)
    else:
        off = half + ((directions * directions).sum(-1).amax(0) * 0.5 - 60).clamp(min=0)
    exponents = exponents - off
    if key_mask is not None:
        exponents = exponents.clamp(max=0)  # of keys that may not be seen
    return cast(torch.exp(exponents) + _SMALLEST_FEATURE, input.dtype)


@operator(
    "softmax_features(Tensor input, Tensor weight) -> Tensor",
    meaning="[softmax(input weight), softmax(-input weight)]",
)
def softmax_features(input: Tensor, weight: Tensor) -> Tensor:
    """Learned features of queries or keys (Hedgehog: Zhang et al., 2024).

    Shapes: input [B, H, N, D]; weight [H, D, F]; result [B, H, N, 2 F], each half a probability.
    """
    logits = input @ weight
    return torch.cat((torch.softmax(logits, -1), torch.softmax(-logits, -1)), -1)


@operator(
    "linear_attention(Tensor query, Tensor key, Tensor value, Tensor query_features, Tensor key_features, "
    "Tensor? gain=None, Tensor? key_mask=None, int window=0, bool causal=False, float? scale=None) -> Tensor",
    meaning="sum of query_features . key_features value, over its sum; exact attention within a window",
    shape=lambda query, key, value, *args, **kwargs: like_attention(query, value),
)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gain: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int = 0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Linear attention (Katharopoulos et al., 2020) beyond a terraced window of exact attention (LoLCATs: Zhang et al.,
    2025).

    Shapes: query, key and value as of `attention`, with as many keys as queries; query_features [B, H, N, M],
    key_features [B, G, N, M], not negative; gain [H].

    Without a window, row i is sum_j w_ij v_j / sum_j w_ij with w_ij = phi(q_i) . phi(k_j), over the keys that
    `key_mask` and, if `causal`, j <= i allow. With one, tokens are cut into blocks of `window`, the last of which may
    be short, and the allowed keys of a query's own block and of the blocks beside it are near. They have their exact
    probabilities p_ij among each other, and row i is (sum_near p_ij v_j + g sum_far w_ij v_j) / (1 + g sum_far w_ij)
    with g = exp(gain[h]): the features say how much more than the window there is to see, and where. No key beyond the
    window: exact attention. A row without any key allowed gives zeros.
    """
    dtype = query.dtype
    floats = wide(dtype)
    query, key, value, query_features, key_features = (
        cast(item, floats) for item in (query, key, value, query_features, key_features)
    )
    groups = query.shape[1] // key.shape[1]
    if groups != 1:
        key, value, key_features = (item.repeat_interleave(groups, 1) for item in (key, value, key_features))
    products = query_features @ key_features.transpose(-1, -2)
    length = query.shape[2]
    allowed = band(length, length, None, 0 if causal else None, query.device)[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    near = torch.zeros_like(allowed)
    if window:
        block = torch.arange(length, device=query.device) // window
        near = allowed & ((block[:, None] - block).abs() <= 1)
    far = products * (allowed & ~near).to(floats)
    if not window:
        sums = far.sum(-1, keepdim=True)
        return ((far @ value) / sums.clamp(min=_SMALLEST_SUM)).to(dtype)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    some = near.any(-1, keepdim=True)
    exact = torch.softmax(scores.masked_fill(~near, -1e30), -1) * near.to(floats)
    if gain is not None:
        far = far * torch.exp(gain.to(floats))[None, :, None, None]
    sums = some.to(floats) + far.sum(-1, keepdim=True)
    return (((exact + far) @ value) / sums.clamp(min=_SMALLEST_SUM)).to(dtype)
