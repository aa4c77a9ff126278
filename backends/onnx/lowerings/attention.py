"""Attention: one fused node where ONNX Runtime has a kernel for it, or matmuls around a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, same_sizes, shape
from ....ir.ops.attention import band
from . import banded, causal, samples
from .lowering import Lowering, Probe, always, scaled


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
        """The number that scores are multiplied by; in a lowering it is above zero."""
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    @property
    def is_banded(self) -> bool:
        """Whether a query sees only some keys by their places."""
        return self.left is not None or self.right is not None

    @property
    def is_causal(self) -> bool:
        """Whether the band is causal from the top left, and the only mask."""
        only = self.bias is None and self.key_mask is None and self.left is None
        return only and isinstance(self.right, int) and self.right == 0

    @property
    def is_step(self) -> bool:
        """Whether an upper bound of the band and a key mask are the only masks, heads have one size, and no row is
        special: behind an empty cache that is causal attention."""
        only = self.bias is None and self.left is None and self.right is not None and self.sinks is None
        return only and self.empty == "zeros" and same_sizes([self.query.shape[3]], [self.value.shape[3]])

    def allowed(self) -> Tensor | None:
        """Boolean masks and the band as one boolean mask; None: there is none."""
        found = self.bias if self.bias is not None and self.bias.dtype == torch.bool else None
        if self.key_mask is not None:
            keys = self.key_mask[:, None, None, :]
            found = keys if found is None else found & keys
        if self.is_banded:
            visible = band(self.query.shape[2], self.key.shape[2], self.left, self.right, self.query.device)
            found = visible if found is None else found & visible
        return found

    def additive(self) -> Tensor | None:
        """All masks as one finite additive bias (None: there is none); `finish` mends rows without any key.

        Not of the lowest number: where a row has no other, the kernel of ai.onnx::Attention gives zeros, a softmax the
        mean. Keys of -inf get less than those of a bias as low as can be, unless rows give the mean of both.
        """
        allowed, lowest = self.allowed(), torch.finfo(self.query.dtype).min / 2
        added = self.bias if self.bias is not None and self.bias.dtype != torch.bool else None
        if added is None:
            zero = torch.zeros((), dtype=self.query.dtype)
            return None if allowed is None else _rank4(torch.where(allowed, zero, lowest))
        if allowed is not None:
            added = torch.where(allowed, added, -math.inf)
        if self.empty != "mean":
            return _rank4(torch.where(added > -math.inf, added.clamp(min=lowest / 2), lowest))
        return _rank4(added.clamp(min=lowest))

    @property
    def has_empty_rows(self) -> bool:
        """Whether a row may have no key and no sink; a band that holds the query's own key leaves none empty."""
        if self.sinks is not None:
            return False
        if self.bias is not None or self.key_mask is not None:
            return True
        return self.is_banded and not (
            _at_least_zero(self.left)
            and _at_least_zero(self.right)
            and (self.left is None or same_sizes([self.query.shape[2]], [self.key.shape[2]]))
        )

    def some(self) -> Tensor | None:
        """Which rows have a key at all, [B or 1, H or 1, N or 1, 1]; None: all."""
        if not self.has_empty_rows:
            return None
        if self.bias is None:
            return self._some_of_band() if self.is_banded else self.keys().any(1)[:, None, None, None]
        allowed = self.allowed()
        if self.bias.dtype == torch.bool:
            assert allowed is not None
            return _rank4(allowed).any(-1, keepdim=True)
        bias = _rank4(self.bias if allowed is None else torch.where(allowed, self.bias, -math.inf))
        # Numbers as low as can be are as good as -inf to a softmax over finite numbers, see `ir.ops.attention`.
        lowest = torch.finfo(self.query.dtype).min if self.empty == "mean" else -math.inf
        return self._any_above(bias, lowest)

    def _any_above(self, bias: Tensor, lowest: float) -> Tensor:
        """Whether a row has a number above the lowest."""
        return bias.amax(-1, keepdim=True) > lowest

    def keys(self) -> Tensor:
        """The key mask, [B, M]; [1, M] of True where there is none."""
        return torch.ones((1, self.key.shape[2]), dtype=torch.bool) if self.key_mask is None else self.key_mask

    def _some_of_band(self) -> Tensor:
        """`some` of a band and a key mask, from counts of keys: no tensor of all rows and keys."""
        rows, keys = torch.arange(self.query.shape[2]), self.key.shape[2]
        counts = torch.nn.functional.pad(_cast(self.keys(), torch.int64).cumsum(1), (1, 0))  # before each key
        first = torch.zeros_like(rows) if self.left is None else (rows - self.left).clamp(0, keys)
        last = torch.full_like(rows, keys) if self.right is None else (rows + self.right + 1).clamp(0, keys)
        return (counts.index_select(1, last) > counts.index_select(1, first))[:, None, :, None]

    def finish(self, result: Tensor) -> Tensor:
        """What rows without any key give, where the kernel gave them any finite number; `result` is [B, N, H, E]."""
        some = self.some()
        if some is None:
            return result
        some = some.transpose(1, 2)
        if self.empty == "zeros":
            return result * _cast(some, result.dtype)  # several times faster than a choice
        if self.empty == "nan":
            return torch.where(some, result, torch.nan)
        groups = self.query.shape[1] // self.key.shape[1]
        return torch.where(some, result, self.value.mean(2)[:, None].repeat_interleave(groups, 2))

    def without_masks(self) -> Attention:
        """The same, where the kernel itself has seen to its masks and to rows without any key."""
        return replace(self, bias=None, key_mask=None, left=None, right=None)


class PortableAttention(Attention):
    """For other runtimes, with what OpenVINO 2026.4 cannot do left out."""

    def _any_above(self, bias: Tensor, lowest: float) -> Tensor:
        return (bias > lowest).any(-1, keepdim=True)  # the maximum of a row of -inf is the lowest finite number there

    def finish(self, result: Tensor) -> Tensor:
        """As above; where all sizes are fixed, OpenVINO dies of a product behind attention's last transpose."""
        some = self.some()
        if some is None or self.empty != "zeros":
            return super().finish(result)
        return torch.where(some.transpose(1, 2), result, 0.0)


def _lowering(function: Callable[[Attention], Tensor], kind: type[Attention] = Attention) -> Callable[..., Tensor]:
    """A function with the operator's signature."""

    def lowered(*args: Any, **kwargs: Any) -> Tensor:
        given = kind(*args, **kwargs)
        query, scale = scaled(given.query, given.scale)
        return function(replace(given, query=query, scale=scale))

    return lowered


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    # Not value.to(dtype): the exporter would have to decompose that, see export.to_onnx.
    result: Tensor = torch.ops.aten._to_copy.default(value, dtype=dtype)
    return result


def _rank4(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask


def _at_least_zero(bound: Any) -> bool:
    """Whether one side of a band is known to hold the query's own place."""
    return bound is None or (isinstance(bound, int) and bound >= 0)


def _full_rows(mask: Tensor | None, given: Attention) -> Tensor | None:
    """A mask with every row and key written out: the fused kernels broadcast batch and heads only."""
    if mask is None:
        return None
    return _rank4(mask).expand(*_rank4(mask).shape[:2], given.query.shape[2], given.key.shape[2])


def _tokens_first(tensor: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H * D]; torch's transpositions around it cancel."""
    batch, heads, length, size = tensor.shape
    return tensor.transpose(1, 2).reshape(batch, length, heads * size)  # flatten would ask a tensor for its shape


def _heads_second(result: Tensor, given: Attention) -> Tensor:
    """A kernel's result [B, N, H * E] as the operator's, with rows without any key mended."""
    batch, heads, length, _ = given.query.shape
    return given.finish(result.reshape(batch, length, heads, given.value.shape[3])).transpose(1, 2)


@_lowering
def _multi_head_attention(given: Attention) -> Tensor:
    """com.microsoft::MultiHeadAttention on [B, N, H * D]."""
    batch, heads, length, _ = given.query.shape
    native = given.is_causal and same_sizes([length], [given.key.shape[2]])
    result = symbolic(
        "com.microsoft::MultiHeadAttention",
        (
            *map(_tokens_first, (given.query, given.key, given.value)),
            None,
            None,
            None if native else _full_rows(given.additive(), given),
        ),
        {"num_heads": heads, "scale": given.factor, "unidirectional": int(native)},
        dtype=given.query.dtype,
        shape=(batch, length, heads * given.value.shape[3]),
        version=1,
    )
    return _heads_second(result, given)


@_lowering
def _attention_onnx(given: Attention) -> Tensor:
    """ai.onnx::Attention on [B, N, H * D]; with a boolean mask its fully masked rows are zeros, as torch's."""
    mask, rest = _kernel_mask(given)
    return _heads_second(_attention_node(given, mask), rest)


@_lowering
def _attention_heads_first(given: Attention) -> Tensor:
    """The same on [B, H, N, D]: a cache of keys and values is not transposed for each token."""
    mask, rest = _kernel_mask(given)
    if mask is not None and given.is_step:
        options: dict[str, Any] = {"q_num_heads": given.query.shape[1], "kv_num_heads": given.key.shape[1]}
        options |= {"scale": given.factor, "softcap": given.softcap}
        return causal.cached_attention(given.query, given.key, given.value, given.keys(), mask, given.right, options)
    result = symbolic(
        "Attention",
        (given.query, given.key, given.value, *([] if mask is None else [mask])),
        {"scale": given.factor, "is_causal": int(given.is_causal), "softcap": given.softcap},
        dtype=given.query.dtype,
        shape=(*given.query.shape[:3], given.value.shape[3]),
        version=23,
    )
    return rest.finish(result.transpose(1, 2)).transpose(1, 2)


def _kernel_mask(given: Attention) -> tuple[Tensor | None, Attention]:
    """The mask that ai.onnx::Attention takes, and what is left to `finish`."""
    if given.is_causal:
        return None, given
    if given.empty == "zeros" and (given.bias is None or given.bias.dtype == torch.bool):
        return _full_rows(given.allowed(), given), given.without_masks()
    return _full_rows(given.additive(), given), given


@_lowering
def _samples(given: Attention) -> Tensor:
    """Each sample with the keys that its mask leaves, see `samples`."""
    result = samples.attention_by_samples(
        _tokens_first(given.query),
        _tokens_first(given.key),
        _tokens_first(given.value),
        given.key_mask,
        given.empty,
        (given.query.shape[1], given.key.shape[1]),
        given.factor,
        given.softcap,
    )
    return _heads_second(result, given.without_masks())


@_lowering
def _blocks(given: Attention) -> Tensor:
    """Attention by blocks of queries, see `banded`."""
    batch, heads, length, _ = given.query.shape
    assert given.left is not None and given.right is not None
    keys = torch.ones((batch, length), dtype=torch.bool) if given.key_mask is None else given.key_mask
    result = banded.band_attention(
        _tokens_first(given.query),
        _tokens_first(given.key),
        _tokens_first(given.value),
        keys,
        given.left,
        given.right,
        {"q_num_heads": heads, "kv_num_heads": given.key.shape[1], "scale": given.factor, "softcap": given.softcap},
    )
    return _heads_second(result, given.without_masks() if given.empty == "zeros" else given)


@_lowering
def _steps(given: Attention) -> Tensor:
    """Causal attention in steps, see `causal`."""
    heads, groups = given.query.shape[1], given.key.shape[1]
    result = causal.causal_attention(
        _tokens_first(given.query),
        _tokens_first(given.key),
        _tokens_first(given.value),
        given.key_mask,
        {"q_num_heads": heads, "kv_num_heads": groups, "scale": given.factor, "softcap": given.softcap},
    )
    mended = given.without_masks() if given.empty == "zeros" else given
    return _heads_second(result, mended)


def _attention_node(given: Attention, mask: Tensor | None = None) -> Tensor:
    """The node itself, [B, N, H * E]."""
    batch, heads, length, _ = given.query.shape
    return symbolic(
        "Attention",
        (*map(_tokens_first, (given.query, given.key, given.value)), *([] if mask is None else [mask])),
        {
            "q_num_heads": heads,
            "kv_num_heads": given.key.shape[1],
            "scale": given.factor,
            "is_causal": int(given.is_causal),
            "softcap": given.softcap,
        },
        dtype=given.query.dtype,
        shape=(batch, length, heads * given.value.shape[3]),
        version=23,
    )


@_lowering
def _group_query_attention(given: Attention) -> Tensor:
    """com.microsoft::GroupQueryAttention on [B, N, H * D]: causal, with or without a window; other masks as a bias."""
    batch, heads, length, _ = given.query.shape
    masked = given.bias is not None or given.key_mask is not None
    options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": given.key.shape[1]}
    options |= {"scale": given.factor, "softcap": given.softcap}
    if given.left is not None:
        options["local_window_size"] = given.left + 1
    result = symbolic(
        "com.microsoft::GroupQueryAttention",
        (
            *map(_tokens_first, (given.query, given.key, given.value)),
            None,
            None,
            torch.full((batch,), length - 1, dtype=torch.int32),
            torch.full((), length, dtype=torch.int32),
            None,
            None,
            None,
            _full_rows(given.additive(), given) if masked else None,
            given.sinks,
        ),
        options,
        dtype=given.query.dtype,
        shape=(batch, length, heads * given.value.shape[3]),
        version=1,
    )
    return _heads_second(result, given)


def _unfused(given: Attention) -> Tensor:
    """MatMul, Add, Softmax, MatMul; the heads of a group are rows of one matmul, so keys are not repeated."""
    batch, heads, length, size = given.query.shape
    groups, keys = given.key.shape[1], given.key.shape[2]
    added = given.additive()
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
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    if groups != heads:
        weights = weights.reshape(batch, groups, heads // groups * length, keys)
    result = (weights @ given.value).reshape(batch, heads, length, given.value.shape[3])
    if given.empty == "mean":
        return result  # as the softmax over equal scores gives it
    return given.finish(result.transpose(1, 2)).transpose(1, 2)


unfused, portable = _lowering(_unfused), _lowering(_unfused, PortableAttention)


def _refuses_fused(node: fx.Node) -> str | None:
    given = arguments(node)
    heads = (shape(given["query"])[1], shape(given["key"])[1])
    if not all(isinstance(count, int) for count in heads):
        return "the number of heads is dynamic"
    return None if given["sinks"] is None else "the kernel has no sinks"


def _heads_first(node: fx.Node) -> bool:
    """Whether keys and values lie as [B, H, M, D]: joined to those of a cache."""
    given = arguments(node)
    return all(given[name].target is torch.ops.aten.cat.default for name in ("key", "value"))


def _refuses_heads_first(node: fx.Node) -> str | None:
    return _refuses_fused(node) if _heads_first(node) else "keys and values come from projections, tokens first"


def _refuses_multi_head(node: fx.Node) -> str | None:
    given = arguments(node)
    if _refuses_fused(node):
        return _refuses_fused(node)
    if shape(given["query"])[1] != shape(given["key"])[1]:
        return "MultiHeadAttention has no grouped key heads"
    if given["softcap"]:
        return "MultiHeadAttention has no soft cap"
    if dtype(given["query"]) != torch.float32:
        return "MultiHeadAttention is float32 only on CPU"
    return None


def _refuses_group_query(node: fx.Node) -> str | None:
    given = arguments(node)
    query, key, value = (shape(given[name]) for name in ("query", "key", "value"))
    if not (isinstance(given["right"], int) and given["right"] == 0):
        return "GroupQueryAttention is causal"
    if not (given["left"] is None or (isinstance(given["left"], int) and given["left"] >= 0)):
        return "GroupQueryAttention's window has a fixed size"
    if not same_sizes([query[2]], [key[2]]):
        return "the number of queries is not that of the keys"
    if not all(isinstance(size, int) for size in (query[1], key[1], query[3])) or query[3] != value[3]:
        return "GroupQueryAttention takes heads of one fixed size"
    if query[3] % causal.GROUP_QUERY_SIZES:
        return f"GroupQueryAttention takes heads of a multiple of {causal.GROUP_QUERY_SIZES}, found {query[3]}"
    if dtype(given["query"]) != torch.float32:
        return "GroupQueryAttention is float32 only here"
    return None


def _rows_first(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if name in ("query", "key", "value") else tensor


def _as_in_models(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def probe(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        result = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
        return result.transpose(1, 2).flatten(2)

    return probe


def _whole(
    name: str,
    function: Callable[..., Tensor],
    refuses: Callable[[fx.Node], str | None] = always,
    standard: bool = False,
) -> Lowering:
    """A lowering of all scores at once: not where the length varies and another serves a node at every length.

    The example's length says nothing about those to come; blocks, steps and samples lose little on short ones.
    """

    def refuses_long(node: fx.Node) -> str | None:
        if banded.settles(node):
            return "blocks serve a band at every length"
        if causal.settles(node):
            return "steps serve causal attention at every length"
        if samples.settles(node):
            return "samples serve every length"
        if refuses is not _refuses_heads_first and _refuses_heads_first(node) is None:
            return "keys and values are a cache's, heads first"
        return refuses(node)

    return Lowering(name, function, refuses_long, standard)


ATTENTION = (
    _whole("Attention", _attention_onnx, _refuses_fused),
    _whole("Attention, heads first", _attention_heads_first, _refuses_heads_first),
    _whole("GroupQueryAttention", _group_query_attention, _refuses_group_query),
    _whole("MultiHeadAttention", _multi_head_attention, _refuses_multi_head),
    _whole("MatMul+Softmax", unfused, standard=True),
    Lowering("Attention by blocks", _blocks, banded.refuses, standard=False),
    Lowering("Attention in steps", _steps, causal.refuses, standard=False),
    Lowering("Attention by samples", _samples, samples.refuses, standard=False),
)
# Projections give [B, N, H, D] and the output projection reads [B, N, H * D]: transpositions count.
PROBE = Probe(_rows_first, _as_in_models)
