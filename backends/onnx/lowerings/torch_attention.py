"""torch's own attention, in programs in which no pass has made `fxpress::attention` of it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ....ir.graph import arguments, shape
from .attention import portable


def torchs_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As matmuls and a softmax, for any runtime.

    The exporter makes an Attention of it, which takes no mask with one row for all queries (ONNX Runtime 1.32), or
    decomposes it, and then the result lies otherwise in memory than the views behind it were traced for.
    """
    batch = torch.broadcast_shapes(query.shape[:1], key.shape[:1], value.shape[:1])
    query, key, value = (item.expand(*batch, *item.shape[1:]) for item in (query, key, value))
    found: Tensor = portable(query, key, value, attn_mask, right=0 if is_causal else None, scale=scale)
    return found


def is_plain(node: fx.Node) -> bool:
    """Whether `torchs_attention` takes a node: four axes, a head of keys for each head or group of them, no dropout."""
    given = arguments(node)
    sizes = [shape(given[name]) for name in ("query", "key", "value")]
    if any(len(size) != 4 for size in sizes) or given["dropout_p"] != 0:
        return False
    heads, groups, same = (size[1] for size in sizes)
    return isinstance(heads, int) and isinstance(groups, int) and groups == same and heads % groups == 0
