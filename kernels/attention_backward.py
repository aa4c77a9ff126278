"""The gradient of attention, recomputed block by block from the statistics of each row (FlashAttention-2: Dao, 2023).

Names of shapes and strides as in attention.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import allowed_blocks, attention, band_blocks, load_tile
from .elementwise import tanh
from .launch import arch_of


@triton.jit
def score_tile(
    rows, columns, i, j, bias, key_mask, num_queries, num_keys, left, right, scale, softcap,
    bias_stride_n, bias_stride_m, key_mask_stride_m,
):  # fmt: skip
    """The scores of rows [ROWS, D] and columns [COLUMNS, D], as they are after the mask, and as the softcap left them.

    Either rows are queries, at i [ROWS, 1], and columns keys, at j [1, COLUMNS], or rows are keys, at j [ROWS, 1], and
    columns queries, at i [1, COLUMNS]. bias and key_mask point to what one head and one sample have.
    """
    scores = tl.dot(rows, tl.trans(columns), input_precision="ieee") * scale
    if softcap is not None:
        scores = softcap * tanh(scores / softcap)
    capped = scores
    if bias is not None:
        inside = (i < num_queries) & (j < num_keys)
        offsets = i.to(tl.int64) * bias_stride_n + j.to(tl.int64) * bias_stride_m
        added = tl.load(bias + offsets, mask=inside, other=0)
        if bias.dtype.element_ty == tl.int1:
            scores = tl.where(added, scores, -float("inf"))
        else:
            scores += added.to(tl.float32)
    if key_mask is not None:
        keep = tl.load(key_mask + j.to(tl.int64) * key_mask_stride_m, mask=j < num_keys, other=0)
        scores = tl.where(keep != 0, scores, -float("inf"))
    seen = (i < num_queries) & (j < num_keys)
    if left is not None:
        seen = seen & (j >= i - left)
    if right is not None:
        seen = seen & (j <= i + right)
    return tl.where(seen, scores, -float("inf")), capped


@triton.jit
def load_row_statistics(maximum, total, rows, num_rows):
    """The shift and the factor with which exp(score - shift) factor is a probability; of rows [ROWS]."""
    shift = tl.load(maximum + rows, mask=rows < num_rows, other=0.0)
    weight = tl.load(total + rows, mask=rows < num_rows, other=1.0)
    return tl.where(shift == -float("inf"), 0.0, shift), 1.0 / tl.where(weight == 0.0, 1.0, weight)


# fmt: off
@triton.jit
def gradient_query_kernel(
    query, key, value, out, grad, grad_query, key_mask, bias, maximum, total, delta,
    num_heads, repeat, num_queries, num_keys, left, right, scale, softcap,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_g, key_stride_m, key_stride_d,
    value_stride_b, value_stride_g, value_stride_m, value_stride_e,
    out_stride_b, out_stride_h, out_stride_n, out_stride_e,
    grad_stride_b, grad_stride_h, grad_stride_n, grad_stride_e,
    grad_query_stride_b, grad_query_stride_h, grad_query_stride_n, grad_query_stride_d,
    key_mask_stride_b, key_mask_stride_m,
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr, SKIP_PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_M rows of one head of grad_query [B, H, N, D], and their delta [B, H, N] = sum(out * grad).

    out and grad [B, H, N, E], the result and its gradient; maximum and total [B, H, N] as of `attention_kernel`.
    """
    log2e: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    batch = (head // num_heads).to(tl.int64)
    head = (head % num_heads).to(tl.int64)
    group = head // repeat
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    i = rows[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_E)[None, :]
    i_offsets = i.to(tl.int64)

    query += batch * query_stride_b + head * query_stride_h + i_offsets * query_stride_n
    queries = load_tile(query + dims.to(tl.int64) * query_stride_d, i, dims, num_queries, True, HEAD_DIM, BLOCK_D)
    grad += batch * grad_stride_b + head * grad_stride_h + i_offsets * grad_stride_n
    grads = load_tile(
        grad + value_dims.to(tl.int64) * grad_stride_e, i, value_dims, num_queries, True, VALUE_DIM, BLOCK_E
    )
    out += batch * out_stride_b + head * out_stride_h + i_offsets * out_stride_n
    outs = load_tile(out + value_dims.to(tl.int64) * out_stride_e, i, value_dims, num_queries, True, VALUE_DIM, BLOCK_E)
    if UPCAST:
        queries = queries.to(tl.float32)
        grads = grads.to(tl.float32)
    deltas = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    first_place = (batch * num_heads + head) * num_queries
    tl.store(delta + first_place + rows, deltas, mask=rows < num_queries)
    shift, factor = load_row_statistics(maximum + first_place, total + first_place, rows, num_queries)

    key += batch * key_stride_b + group * key_stride_g
    value += batch * value_stride_b + group * value_stride_g
    if key_mask is not None:
        key_mask += batch * key_mask_stride_b
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    begin, end, _, _ = band_blocks(first_row, last_row, left, right, num_keys, BLOCK_N)
    if SKIP_PADDING:
        begin, end = allowed_blocks(begin, end, key_mask, key_mask_stride_m, num_keys, BLOCK_N)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in tl.range(begin, end):
        columns = step * BLOCK_N + tl.arange(0, BLOCK_N)
        j_rows = columns[:, None]
        pointers = key + j_rows.to(tl.int64) * key_stride_m + dims.to(tl.int64) * key_stride_d
        keys = load_tile(pointers, j_rows, dims, num_keys, True, HEAD_DIM, BLOCK_D).to(queries.dtype)
        pointers = value + j_rows.to(tl.int64) * value_stride_m + value_dims.to(tl.int64) * value_stride_e
        values = load_tile(pointers, j_rows, value_dims, num_keys, True, VALUE_DIM, BLOCK_E).to(queries.dtype)
        scores, capped = score_tile(
            queries, keys, i, columns[None, :], bias, key_mask, num_queries, num_keys, left, right, scale, softcap,
            bias_stride_n, bias_stride_m, key_mask_stride_m,
        )  # fmt: skip
        probabilities = tl.exp2((scores - shift[:, None]) * log2e) * factor[:, None]
        changes = tl.dot(grads, tl.trans(values), input_precision="ieee") - deltas[:, None]
        changes = probabilities * changes
        if softcap is not None:
            capped = capped / softcap
            changes *= 1.0 - capped * capped
        result = tl.dot(changes.to(queries.dtype), keys, result, input_precision="ieee")
    grad_query += batch * grad_query_stride_b + head * grad_query_stride_h + i_offsets * grad_query_stride_n
    result = (result * scale).to(grad_query.dtype.element_ty)
    stored = (i < num_queries) & (dims < HEAD_DIM)
    tl.store(grad_query + dims.to(tl.int64) * grad_query_stride_d, result, mask=stored)


# fmt: off
@triton.jit
def gradient_key_value_kernel(
    query, key, value, grad, grad_key, grad_value, key_mask, bias, maximum, total, delta,
    num_groups, repeat, num_queries, num_keys, left, right, scale, softcap,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_g, key_stride_m, key_stride_d,
    value_stride_b, value_stride_g, value_stride_m, value_stride_e,
    grad_stride_b, grad_stride_h, grad_stride_n, grad_stride_e,
    grad_key_stride_b, grad_key_stride_g, grad_key_stride_m, grad_key_stride_d,
    grad_value_stride_b, grad_value_stride_g, grad_value_stride_m, grad_value_stride_e,
    key_mask_stride_b, key_mask_stride_m,
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr, SKIP_PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_N keys of one group, of grad_key [B, G, M, D] and grad_value [B, G, M, E].

    grad [B, H, N, E]; maximum, total and delta [B, H, N], which `gradient_query_kernel` has written.
    """
    log2e: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    block = tl.program_id(0) % num_blocks
    group = tl.program_id(0) // num_blocks
    batch = (group // num_groups).to(tl.int64)
    group = (group % num_groups).to(tl.int64)
    first_key = block * BLOCK_N
    j_rows = first_key + tl.arange(0, BLOCK_N)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_E)[None, :]
    j_offsets = j_rows.to(tl.int64)

    key += batch * key_stride_b + group * key_stride_g + j_offsets * key_stride_m
    keys = load_tile(key + dims.to(tl.int64) * key_stride_d, j_rows, dims, num_keys, True, HEAD_DIM, BLOCK_D)
    value += batch * value_stride_b + group * value_stride_g + j_offsets * value_stride_m
    values = load_tile(
        value + value_dims.to(tl.int64) * value_stride_e, j_rows, value_dims, num_keys, True, VALUE_DIM, BLOCK_E
    )
    if UPCAST:
        keys = keys.to(tl.float32)
        values = values.to(tl.float32)
    if key_mask is not None:
        key_mask += batch * key_mask_stride_b
    last_key = tl.minimum(first_key + BLOCK_N, num_keys) - 1
    # Query i sees key j where i - left <= j <= i + right: key j is seen from j - right to j + left.
    begin, end, _, _ = band_blocks(first_key, last_key, right, left, num_queries, BLOCK_M)
    if SKIP_PADDING:  # a block that is nothing but padding is seen by no query
        keep = tl.load(key_mask + j_offsets * key_mask_stride_m, mask=j_rows < num_keys, other=0)
        end = tl.where(tl.max(tl.max((keep != 0).to(tl.int32), 0), 0) > 0, end, begin)
    key_result = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_result = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for member in tl.range(0, repeat):
        head = group * repeat + member
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_grad = grad + batch * grad_stride_b + head * grad_stride_h
        first_place = (batch * num_groups * repeat + head) * num_queries
        head_bias = bias
        if bias is not None:
            head_bias = bias + (batch * bias_stride_b + head * bias_stride_h)
        for step in tl.range(begin, end):
            rows = step * BLOCK_M + tl.arange(0, BLOCK_M)
            i = rows[:, None]
            pointers = head_query + i.to(tl.int64) * query_stride_n + dims.to(tl.int64) * query_stride_d
            queries = load_tile(pointers, i, dims, num_queries, True, HEAD_DIM, BLOCK_D).to(keys.dtype)
            pointers = head_grad + i.to(tl.int64) * grad_stride_n + value_dims.to(tl.int64) * grad_stride_e
            grads = load_tile(pointers, i, value_dims, num_queries, True, VALUE_DIM, BLOCK_E).to(keys.dtype)
            shift, factor = load_row_statistics(maximum + first_place, total + first_place, rows, num_queries)
            deltas = tl.load(delta + first_place + rows, mask=rows < num_queries, other=0.0)
            # All with keys as rows, so that no product is transposed on its way into the next.
            scores, capped = score_tile(
                keys, queries, rows[None, :], j_rows, head_bias, key_mask, num_queries, num_keys, left, right, scale,
                softcap, bias_stride_n, bias_stride_m, key_mask_stride_m,
            )  # fmt: skip
            probabilities = tl.exp2((scores - shift[None, :]) * log2e) * factor[None, :]
            value_result = tl.dot(probabilities.to(keys.dtype), grads, value_result, input_precision="ieee")
            changes = tl.dot(values, tl.trans(grads), input_precision="ieee") - deltas[None, :]
            changes = probabilities * changes
            if softcap is not None:
                capped = capped / softcap
                changes *= 1.0 - capped * capped
            key_result = tl.dot(changes.to(keys.dtype), queries, key_result, input_precision="ieee")
    inside = j_rows < num_keys
    grad_key += batch * grad_key_stride_b + group * grad_key_stride_g + j_offsets * grad_key_stride_m
    key_result = (key_result * scale).to(grad_key.dtype.element_ty)
    tl.store(grad_key + dims.to(tl.int64) * grad_key_stride_d, key_result, mask=inside & (dims < HEAD_DIM))
    grad_value += batch * grad_value_stride_b + group * grad_value_stride_g + j_offsets * grad_value_stride_m
    value_result = value_result.to(grad_value.dtype.element_ty)
    inside = inside & (value_dims < VALUE_DIM)
    tl.store(grad_value + value_dims.to(tl.int64) * grad_value_stride_e, value_result, mask=inside)


def attention_backward_config(
    head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, of_query: bool, has_bias: bool = False
) -> dict[str, int]:
    """Blocks, warps and stages of the gradient kernels, that of the query or that of key and value, by architecture.

    Within the limits of `attention_configs`: tests/kernels/test_attention_aot.py.
    """
    width = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim), 16)
    if dtype == torch.float32:  # exact products, without tensor cores: as in attention_configs
        sizes = (32, 32, 4, 2) if width <= 64 else (16, 16, 4, 1)
        if of_query and width > 64:
            sizes = (16, 32 if width <= 128 else 16, 4, 2)
    elif of_query and width <= 128:
        sizes = (64, 64, 4 if width <= 64 else 8, 2)
    elif width <= 64:
        sizes = (64, 64, 8, 2) if 90 <= arch < 120 else (32, 32 if has_bias else 64, 4, 2)
    elif width <= 128:
        sizes = (16 if has_bias else 32, 64, 8, 2)
    else:
        sizes = (32, 32, 8, 1)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))


def attention_gradients(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and sinks from grad [B, H, N, E], that of `out`.

    `out` [B, H, N, E] and `statistics` [2, B, H, N] are what `attention` gave for the other arguments.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_groups, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    delta = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0 or num_keys == 0:
        for tensor in (grad_query, grad_key, grad_value, delta):
            tensor.zero_()
    else:
        arch = arch_of(query.device)
        query_config, key_config = (
            attention_backward_config(head_dim, value_dim, query.dtype, arch, of_query, bias is not None)
            for of_query in (True, False)
        )
        sizes = (num_heads // num_groups, num_queries, num_keys, left, right, scale, softcap or None)
        inputs = (*query.stride(), *key.stride(), *value.stride())
        masks = (0, 0) if key_mask is None else key_mask.expand(batch, num_keys).stride()
        shape = (batch, num_heads, num_queries, num_keys)
        biases = (0, 0, 0, 0) if bias is None else bias.expand(shape).stride()
        constants = {
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_E": max(16, triton.next_power_of_2(value_dim)),
            "UPCAST": query.dtype == torch.bfloat16 and not query.is_cuda,
            "SKIP_PADDING": key_mask is not None and num_keys > 4 * query_config["BLOCK_N"],
        }  # fmt: skip
        gradient_query_kernel[(triton.cdiv(num_queries, query_config["BLOCK_M"]) * batch * num_heads,)](
            query, key, value, out, grad, grad_query, key_mask, bias, *statistics, delta, num_heads, *sizes, *inputs,
            *out.stride(), *grad.stride(), *grad_query.stride(), *masks, *biases, **constants, **query_config,
        )  # fmt: skip
        gradient_key_value_kernel[(triton.cdiv(num_keys, key_config["BLOCK_N"]) * batch * num_groups,)](
            query, key, value, grad, grad_key, grad_value, key_mask, bias, *statistics, delta, num_groups, *sizes,
            *inputs, *grad.stride(), *grad_key.stride(), *grad_value.stride(), *masks, *biases, **constants,
            **key_config,
        )  # fmt: skip
    grad_sinks = None
    if sinks is not None:  # a sink has a probability, but a value of 0
        maximum, total = statistics
        probability = torch.exp(sinks.float()[:, None] - maximum) / total
        grad_sinks = -(probability * delta).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_sinks


class _Attention(torch.autograd.Function):
    """Attention that keeps of its scores the statistics of each row alone."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, key_mask: Tensor | None,
        bias: Tensor | None, *options: Any,
    ) -> Tensor:  # fmt: skip
        statistics = torch.empty((2, *query.shape[:3]), dtype=torch.float32, device=query.device)
        out = attention(query, key, value, key_mask, *options, sinks, bias=bias, statistics=statistics)
        ctx.save_for_backward(out, statistics, query, key, value, key_mask, sinks, bias)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, key_mask, sinks, bias = ctx.saved_tensors
        return (*attention_gradients(grad, *inputs, key_mask, *ctx.options, sinks, bias), *(None,) * 6)


def attention_with_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty: str = "zeros",
    bias: Tensor | None = None,
) -> Tensor:
    """`attention` that can be differentiated by query, key, value and sinks; shapes as there.

    Raises ValueError where a bias needs a gradient, and for rows without any allowed key that are not "zeros".
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("the bias of attention needs a gradient, which no kernel computes; use the operator itself")
    if empty != "zeros" and sinks is None:
        raise ValueError(f"the gradient is that of empty='zeros', found {empty!r}; use the operator itself")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    result: Tensor = _Attention.apply(query, key, value, sinks, key_mask, bias, left, right, scale, softcap)
    return result
