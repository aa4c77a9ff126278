"""PyTorch's closed inference kernels of nn.TransformerEncoderLayer and nn.MultiheadAttention, written out.

Without gradients these modules call one operator for a whole layer, which hides from every pass what is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx


def _attended(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, mask_type: int | None
) -> Tensor:
    """Attention of projected [B, N, D] inputs; where a mask is true (or -inf) nothing is attended."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    if mask is not None:
        mask = ~(mask if mask.dtype == torch.bool else mask != 0)
        if mask_type == 1:  # of padding, [B, N]
            mask = mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _encoder_layer(
    source: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm2_weight, norm2_bias, eps)

    def attention(x: Tensor) -> Tensor:
        query, key, value = F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        return F.linear(_attended(query, key, value, heads, mask, mask_type), out_weight, out_bias)

    def forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, up_weight, up_bias)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), down_weight, down_bias)

    if norm_first:
        source = source + attention(norm1(source))
        return source + forward(norm2(source))
    source = norm1(source + attention(source))
    return norm2(source + forward(source))


def _multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    query, key, value = (
        F.linear(part, weight, bias) for part, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    return F.linear(_attended(query, key, value, heads, mask, mask_type), out_weight, out_bias), None


_PLAIN: dict[Any, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    torch._native_multi_head_attention: _multi_head,
}


class PlainInterpreter(fx.Interpreter):
    """Runs a graph of dynamo's with closed kernels written out."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        plain = _PLAIN.get(target)
        if plain is _multi_head and (len(args) < 11 or args[10]):
            plain = None  # the weights of attention are asked for
        return plain(*args, **kwargs) if plain is not None else super().call_function(target, args, kwargs)
