"""Attention within a window, with global tokens: a band whose first tokens see all and are seen by all."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention, like_attention
from .table import OPERATORS, operator


@operator(
    "window_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask=None, int left=0, int right=0, "
    "int globals=0, int dilation=1, bool causal=False, float? scale=None, float softcap=0.0) -> Tensor",
    meaning="attention to every dilation-th key of a band, and to the first tokens, which see all",
    shape=lambda query, key, value, *args, **kwargs: like_attention(query, value),
)
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    globals: int = 0,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Sliding windows with global attention and dilation (Longformer: Beltagy et al., 2020), or with sinks, as global
    tokens of causal attention are called (StreamingLLM: Xiao et al., 2024).

    Shapes as of `attention`, with as many keys as queries. Query i sees the keys i + t dilation, -left <= t <= right;
    and, each once, `globals` tokens from the first one on that `key_mask` allows. These see all keys. `causal`: nothing
    sees a later key, global tokens neither. Keys that the mask forbids are seen by none; a row without any gives zeros.
    """
    allowed = window(query.shape[2], key_mask, left, right, globals, dilation, causal, query.device)
    given = {"bias": allowed, "key_mask": key_mask, "scale": scale, "softcap": softcap}
    result: Tensor = OPERATORS[attention].reference(query, key, value, **given)
    return result


def window(
    length: int,
    key_mask: Tensor | None,
    left: int,
    right: int,
    globals: int,
    dilation: int,
    causal: bool,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query sees, those that the key mask hides too: boolean [B or 1, 1, N, N]."""
    place = torch.arange(length, device=device)
    distance = place[None, :] - place[:, None]
    steps = torch.div(distance, dilation, rounding_mode="floor")
    allowed = ((distance % dilation == 0) & (steps >= -left) & (steps <= right))[None]
    if globals:
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if key_mask is not None:
            first = key_mask.to(torch.int64).argmax(1, keepdim=True)
        is_global = (place >= first) & (place < first + globals)  # [B or 1, N]
        allowed = allowed | is_global[:, None, :] | is_global[:, :, None]
    if causal:
        allowed = allowed & (distance <= 0)
    return allowed[:, None]
