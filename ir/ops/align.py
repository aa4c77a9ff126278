"""Letting each sample begin with its first real token, for attention whose blocks begin at the first place."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import cast
from .table import operator


@operator(
    "align_tokens(Tensor input, Tensor key_mask, bool back=False) -> Tensor",
    meaning="tokens moved up so that the first real one of each sample comes first; back: undone",
    shape=lambda input, key_mask, back=False: torch.empty_like(input),
)
def align_tokens(input: Tensor, key_mask: Tensor, back: bool = False) -> Tensor:
    """Each sample rolled along its tokens: padding at its beginning is then at its end.

    Shapes: input [B, N] or [B, H, N, D]; key_mask [B, N], True: a token; result as input. A sample without any real
    token stays as it is.
    """
    length = input.shape[1 if input.dim() == 2 else 2]
    first = cast(key_mask, torch.int64).argmax(1, keepdim=True)
    place = torch.arange(length, device=input.device) + (length - first if back else first)
    place = place % length  # [B, N]
    if input.dim() == 2:
        return input.gather(1, place)
    return input.gather(2, place[:, None, :, None].expand(input.shape))
