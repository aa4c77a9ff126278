"""Attention: one fused node where ONNX Runtime has a kernel for it, or matmuls around a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, same_sizes, shape
from ....ir.ops.attention import band
from .lowering import Lowering, Probe


@dataclass(frozen=True)
class Attention:
    """The arguments of one attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    left: int | None = None
    right: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    empty: str = "zeros"

    @property
    def factor(self) -> float:
        """The number that scores are multiplied by."""
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    @property
    def is_masked(self) -> bool:
        """Whether anything keeps a query from a key."""
        return any(item is not None for item in (self.bias, self.key_mask, self.left, self.right))

    @property
    def is_causal(self) -> bool:
        """Whether the band is causal from the top left, and the only mask."""
        only = self.bias is None and self.key_mask is None and self.left is None
        return only and isinstance(self.right, int) and self.right == 0

    def allowed(self) -> Tensor | None:
        """Boolean masks and the band as one boolean mask; None: there is none."""
        found = self.bias if self.bias is not None and self.bias.dtype == torch.bool else None
        if self.key_mask is not None:
            keys = self.key_mask[:, None, None, :]
            found = keys if found is None else found & keys
        if self.left is not None or self.right is not None:
            visible = band(self.query.shape[2], self.key.shape[2], self.left, self.right, self.query.device)
            found = visible if found is None else found & visible
        return found

    def additive(self) -> tuple[Tensor | None, Tensor | None]:
        """All masks as one finite additive bias, and which rows have a key at all ([B, 1 or H, N, 1], None: any).

        ONNX Runtime's kernels know no fully masked row; `finish` mends those with the second.
        """
        allowed, lowest = self.allowed(), torch.finfo(self.query.dtype).min
        added = self.bias if self.bias is not None and self.bias.dtype != torch.bool else None
        if added is None and allowed is None:
            return None, None
        if added is None:
            assert allowed is not None
            bias = torch.where(allowed, torch.zeros((), dtype=self.query.dtype), lowest)
            some = allowed.any(-1, keepdim=True)
        else:
            if allowed is not None:
                added = torch.where(allowed, added, -math.inf)
            bias, some = added.clamp(min=lowest), added.amax(-1, keepdim=True) > -math.inf
        return _rank4(bias), None if self.empty == "mean" or self.is_causal else _rank4(some)

    def finish(self, result: Tensor, some: Tensor | None) -> Tensor:
        """What rows without any key give; `some` as `additive` gives it, with the axes of `result`."""
        if some is None:
            return result
        if self.empty == "nan":
            return torch.where(some, result, torch.nan)
        return result * _cast(some, result.dtype)


def _lowering(function: Callable[[Attention], Tensor]) -> Callable[..., Tensor]:
    """A function with the operator's signature."""

    def lowered(*args: Any, **kwargs: Any) -> Tensor:
        return function(Attention(*args, **kwargs))

    return lowered


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    # Not value.to(dtype): the exporter would have to decompose that, see export.to_onnx.
    result: Tensor = torch.ops.aten._to_copy.default(value, dtype=dtype)
    return result


def _rank4(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask


def _full_rows(mask: Tensor | None, length: Any, keys: Any) -> Tensor | None:
    """A mask with every row and key written out: the fused kernels broadcast batch and heads only."""
    return None if mask is None else _rank4(mask).expand(*_rank4(mask).shape[:2], length, keys)


def _tokens_first(given: Attention) -> tuple[Tensor, ...]:
    """Query, key and value as [B, N, H * D]; torch's transpositions around them cancel."""
    return tuple(item.transpose(1, 2).flatten(2) for item in (given.query, given.key, given.value))


@_lowering
def _multi_head_attention(given: Attention) -> Tensor:
    """com.microsoft::MultiHeadAttention on [B, N, H * D]."""
    batch, heads, length, _ = given.query.shape
    keys, size = given.key.shape[2], given.value.shape[3]
    native = given.is_causal and same_sizes([length], [keys])
    added, some = (None, None) if native else given.additive()
    result = symbolic(
        "com.microsoft::MultiHeadAttention",
        (*_tokens_first(given), None, None, _full_rows(added, length, keys)),
        {"num_heads": heads, "scale": given.factor, "unidirectional": int(native)},
        dtype=given.query.dtype,
        shape=(batch, length, heads * size),
        version=1,
    ).reshape(batch, length, heads, size)
    return given.finish(result, None if some is None else some.transpose(1, 2)).transpose(1, 2)


@_lowering
def _attention_onnx(given: Attention) -> Tensor:
    """ai.onnx::Attention on [B, N, H * D]; with a boolean mask its fully masked rows are zeros, as torch's."""
    batch, heads, length, _ = given.query.shape
    keys, size = given.key.shape[2], given.value.shape[3]
    boolean = given.empty == "zeros" and (given.bias is None or given.bias.dtype == torch.bool)
    mask, some = (given.allowed(), None) if boolean else given.additive()
    if given.is_causal:
        mask, some = None, None
    mask = _full_rows(mask, length, keys)
    result = symbolic(
        "Attention",
        _tokens_first(given) + ((mask,) if mask is not None else ()),
        {
            "q_num_heads": heads,
            "kv_num_heads": given.key.shape[1],
            "scale": given.factor,
            "is_causal": int(given.is_causal),
            "softcap": given.softcap,
        },
        dtype=given.query.dtype,
        shape=(batch, length, heads * size),
        version=23,
    ).reshape(batch, length, heads, size)
    return given.finish(result, None if some is None else some.transpose(1, 2)).transpose(1, 2)


@_lowering
def _unfused(given: Attention) -> Tensor:
    """MatMul, Add, Softmax, MatMul; the heads of a group are rows of one matmul, so keys are not repeated."""
    batch, heads, length, size = given.query.shape
    groups, keys = given.key.shape[1], given.key.shape[2]
    added, some = given.additive()
    rows = given.query.reshape(batch, groups, heads // groups * length, size) if groups != heads else given.query
    scores = (rows * given.factor) @ given.key.transpose(-1, -2)
    if groups != heads:
        scores = scores.reshape(batch, heads, length, keys)
    if given.softcap:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    if added is not None:
        scores = scores + added
    if given.sinks is not None:
        extra = given.sinks.reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
        weights, some = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1], None
    else:
        weights = torch.softmax(scores, -1)
    if groups != heads:
        weights = weights.reshape(batch, groups, heads // groups * length, keys)
    return given.finish((weights @ given.value).reshape(batch, heads, length, given.value.shape[3]), some)


def _refuses_fused(node: fx.Node) -> str | None:
    given = arguments(node)
    heads = (shape(given["query"])[1], shape(given["key"])[1])
    if not all(isinstance(count, int) for count in heads):
        return "the number of heads is dynamic"
    return None if given["sinks"] is None else "the kernel has no sinks"


def _refuses_multi_head(node: fx.Node) -> str | None:
    given = arguments(node)
    if _refuses_fused(node):
        return _refuses_fused(node)
    if shape(given["query"])[1] != shape(given["key"])[1]:
        return "MultiHeadAttention has no grouped key heads"
    if given["softcap"]:
        return "MultiHeadAttention has no soft cap"
    if given["query"].meta["val"].dtype != torch.float32:
        return "MultiHeadAttention is float32 only on CPU"
    return None


def _rows_first(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if name in ("query", "key", "value") else tensor


def _as_in_models(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def probe(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        result = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
        return result.transpose(1, 2).flatten(2)

    return probe


ATTENTION = (
    Lowering("Attention", _attention_onnx, _refuses_fused),
    Lowering("MultiHeadAttention", _multi_head_attention, _refuses_multi_head),
    Lowering("MatMul+Softmax", _unfused),
)
# Projections give [B, N, H, D] and the output projection reads [B, N, H * D]: transpositions count.
PROBE = Probe(_rows_first, _as_in_models)
