"""How each fxpress operator becomes ONNX: a table operator -> candidates, one short function each.

A candidate has the operator's own signature. It is run while torch's exporter traces the program, so it is written in
torch operations and `symbolic` nodes (ONNX operators by name). Operators that are not in the table are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from ...ir.graph import arguments, same_sizes, shape
from ...ir.ops.attention import attention
from ...ir.ops.linear import ACTIVATIONS, linear_act, split_linear
from ...ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm


def _always(node: fx.Node) -> str | None:
    return None


@dataclass(frozen=True)
class Lowering:
    """One way to lower an operator; `refuses(node)` is the reason why it cannot take a node, or None."""

    name: str
    function: Callable[..., Any]
    refuses: Callable[[fx.Node], str | None] = _always


# --- attention -------------------------------------------------------------------------------------------------


def _mask(
    query: Tensor, key: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """All masks as one finite additive bias, and which rows have a key at all ([B, 1 or H, N, 1], None: every row).

    ONNX Runtime's kernels know no fully masked row; torch gives zeros there, so the result is multiplied by the second.
    """
    allowed = bias if bias is not None and bias.dtype == torch.bool else None
    if key_mask is not None:
        allowed = key_mask[:, None, None, :] if allowed is None else allowed & key_mask[:, None, None, :]
    if causal:
        lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        allowed = lower if allowed is None else allowed & lower
    lowest = torch.finfo(query.dtype).min
    added = bias if bias is not None and bias.dtype != torch.bool else None
    if added is None and allowed is None:
        return None, None
    if added is None:
        assert allowed is not None
        nothing = torch.zeros((), dtype=query.dtype)
        return _rank4(torch.where(allowed, nothing, lowest)), _rank4(_cast(allowed.any(-1, keepdim=True), query.dtype))
    if allowed is not None:
        added = torch.where(allowed, added, -math.inf)
    some = _cast(added.amax(-1, keepdim=True) > -math.inf, query.dtype)
    return _rank4(added.clamp(min=lowest)), _rank4(some)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    # Not value.to(dtype): the exporter would have to decompose that, see export.to_onnx.
    result: Tensor = torch.ops.aten._to_copy.default(value, dtype=dtype)
    return result


def _rank4(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask


def _full_rows(mask: Tensor | None, length: Any, keys: Any) -> Tensor | None:
    """A mask with every row and key written out: the fused kernels broadcast batch and heads only."""
    return None if mask is None else _rank4(mask).expand(*_rank4(mask).shape[:2], length, keys)


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """com.microsoft::MultiHeadAttention on [B, N, H * D]; torch's transpositions around it cancel."""
    batch, heads, length, _ = query.shape
    square = bias is None and key_mask is None and same_sizes([length], [key.shape[2]])
    added, some = (None, None) if causal and square else _mask(query, key, bias, key_mask, causal)
    rows, keys, values = (item.transpose(1, 2).flatten(2) for item in (query, key, value))
    result = symbolic(
        "com.microsoft::MultiHeadAttention",
        (rows, keys, values, None, None, _full_rows(added, length, key.shape[2])),
        {"num_heads": heads, "scale": _scale(query, scale), "unidirectional": int(causal and square)},
        dtype=query.dtype,
        shape=(batch, length, values.shape[2]),
        version=1,
    )
    result = result.reshape(batch, length, heads, value.shape[3])
    return (result if some is None else result * some.transpose(1, 2)).transpose(1, 2)


def _attention_onnx(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """ai.onnx::Attention on [B, N, H * D]; with a boolean mask its fully masked rows are zeros, as torch's."""
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    some = None
    if bias is not None and bias.dtype != torch.bool:
        mask, some = _mask(query, key, bias, key_mask, causal)
    else:
        mask = bias
        if key_mask is not None:
            mask = key_mask[:, None, None, :] if mask is None else mask & key_mask[:, None, None, :]
        if causal and mask is not None:
            mask = mask & torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    mask = _full_rows(mask, length, keys)
    result = symbolic(
        "Attention",
        tuple(item.transpose(1, 2).flatten(2) for item in (query, key, value)) + ((mask,) if mask is not None else ()),
        {
            "q_num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": _scale(query, scale),
            "is_causal": int(causal and mask is None),
        },
        dtype=query.dtype,
        shape=(batch, length, heads * value.shape[3]),
        version=23,
    ).reshape(batch, length, heads, value.shape[3])
    return (result if some is None else result * some.transpose(1, 2)).transpose(1, 2)


def _refuses_onnx(node: fx.Node) -> str | None:
    given = arguments(node)
    heads = (shape(given["query"])[1], shape(given["key"])[1])
    return None if all(isinstance(count, int) for count in heads) else "the number of heads is dynamic"


def _refuses_fused(node: fx.Node) -> str | None:
    given = arguments(node)
    if _refuses_onnx(node):
        return _refuses_onnx(node)
    if shape(given["query"])[1] != shape(given["key"])[1]:
        return "MultiHeadAttention has no grouped key heads"
    if given["query"].meta["val"].dtype != torch.float32:
        return "MultiHeadAttention is float32 only on CPU"
    return None


def _attention_unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """MatMul, Add, Softmax, MatMul; the heads of a group are rows of one matmul, so keys are not repeated."""
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    added, some = _mask(query, key, bias, key_mask, causal)
    rows = query.reshape(batch, groups, heads // groups * length, size) if groups != heads else query
    scores = (rows * _scale(query, scale)) @ key.transpose(-1, -2)
    if groups != heads:
        scores = scores.reshape(batch, heads, length, key.shape[2])
    weights = torch.softmax(scores if added is None else scores + added, -1)
    if groups != heads:
        weights = weights.reshape(batch, groups, heads // groups * length, key.shape[2])
    result = (weights @ value).reshape(batch, heads, length, value.shape[3])
    return result if some is None else result * some


# --- norms -----------------------------------------------------------------------------------------------------


def _add_layer_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = input + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def _skip_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _skip_norm("SkipLayerNormalization", (input, residual, weight, bias), eps)


def _rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return symbolic("RMSNormalization", (input, weight), {"epsilon": eps, "axis": -1},
                    dtype=input.dtype, shape=input.shape, version=23)  # fmt: skip


def _add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = input + residual
    return _rms_norm(total, weight, eps), total


def _skip_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _skip_norm("SkipSimplifiedLayerNormalization", (input, residual, weight), eps)


def _skip_norm(operator: str, inputs: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    rows = inputs[0]
    statistics = (*rows.shape[:-1], 1)
    norm, _, _, total = symbolic_multi_out(
        f"com.microsoft::{operator}",
        inputs,
        {"epsilon": eps},
        dtypes=(rows.dtype, torch.float32, torch.float32, rows.dtype),
        shapes=(rows.shape, statistics, statistics, rows.shape),
        version=1,
    )
    return norm, total


def _refuses_skip(node: fx.Node) -> str | None:
    return None if len(shape(node.args[0])) == 3 else "the kernel takes [batch, length, size] only"


# --- linears ---------------------------------------------------------------------------------------------------


def _linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


_BIAS_ACTIVATIONS = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}


def _linear_bias_act(input: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """MatMul, then bias and activation in one pass over the result."""
    product = input @ weight.t()
    return symbolic(f"com.microsoft::{_BIAS_ACTIVATIONS[activation]}", (product, bias),
                    dtype=product.dtype, shape=product.shape, version=1)  # fmt: skip


def _refuses_bias_act(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["activation"] not in _BIAS_ACTIVATIONS:
        return f"no kernel joins a bias and {given['activation']}"
    return "there is no bias" if given["bias"] is None else None


def _split_linear(input: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    return list(F.linear(input, weight, bias).split(sizes, -1))


def _separate_linears(input: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """A matmul for each part: no pass over the joint result to cut it."""
    results, start = [], 0
    for size in sizes:  # slices, not a split: those of constants are computed once, at export
        part = slice(start, start := start + size)
        results.append(F.linear(input, weight[part], None if bias is None else bias[part]))
    return results


LOWERINGS: dict[Any, tuple[Lowering, ...]] = {
    attention: (
        Lowering("Attention", _attention_onnx, _refuses_onnx),
        Lowering("MultiHeadAttention", _attention_fused, _refuses_fused),
        Lowering("MatMul+Softmax", _attention_unfused),
    ),
    add_layer_norm: (
        Lowering("Add+LayerNormalization", _add_layer_norm),
        Lowering("SkipLayerNormalization", _skip_layer_norm, _refuses_skip),
    ),
    rms_norm: (Lowering("RMSNormalization", _rms_norm),),
    add_rms_norm: (
        Lowering("Add+RMSNormalization", _add_rms_norm),
        Lowering("SkipSimplifiedLayerNormalization", _skip_rms_norm, _refuses_skip),
    ),
    linear_act: (
        Lowering("Linear+Activation", _linear_act),
        Lowering("MatMul+BiasActivation", _linear_bias_act, _refuses_bias_act),
    ),
    split_linear: (
        Lowering("separate MatMuls", _separate_linears),
        Lowering("MatMul+Split", _split_linear),
    ),
}


def supported(node: fx.Node) -> tuple[list[Lowering], list[str]]:
    """The candidates that take a node, and the reasons of those that do not."""
    candidates, reasons = [], []
    for lowering in LOWERINGS.get(node.target, ()):
        reason = lowering.refuses(node)
        if reason is None:
            candidates.append(lowering)
        else:
            reasons.append(f"{lowering.name}: {reason}")
    return candidates, reasons


@dataclass(frozen=True)
class Probe:
    """How an operator is measured in the surroundings it has in models.

    `prepare(name, tensor)` gives the argument as it comes from its producer; `wrap(function)` undoes that before the
    operator and does what its reader does after it.
    """

    prepare: Callable[[str, Tensor], Tensor]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


def _rows_first(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if name in ("query", "key", "value") else tensor


def _as_in_models(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def probe(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        result = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
        return result.transpose(1, 2).flatten(2)

    return probe


# Projections give [B, N, H, D] and the output projection reads [B, N, H * D]: transpositions count.
PROBES: dict[Any, Probe] = {attention: Probe(_rows_first, _as_in_models)}
