"""Attention of queries at some places to keys at others: chunks of hashed attention (Reformer: Kitaev et al., 2020).

Rows of queries, keys and values are read where they lie, with an online softmax (FlashAttention-2: Dao, 2023): neither
the gathered rows nor the scores are written.

Names of shapes, as in ir/ops/lsh_attention.py: query [B, H, N, D], key [B, G, M, D], value [B, G, M, E], where G
divides H; rows [B, H, T, C, R] and columns [B, H, T, C, W], places of queries and keys in each of C chunks in each of T
rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import arch_of


# fmt: off
@triton.jit
def gathered_attention_kernel(
    query, key, value, rows, columns, first, end, out, totals,
    num_heads, repeat, num_chunks, scale,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_g, key_stride_m, key_stride_d,
    value_stride_b, value_stride_g, value_stride_m, value_stride_e,
    SHARED: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_M queries of a chunk.

    query, key, value of any strides; rows, first and end [B, H, T, C, R] and columns [B, H, T, C, W], int64, out
    [B, H, T, C, R, E] and totals [B, H, T, C, R], fp32, are contiguous. H is num_heads, H / G is repeat, T * C is
    num_chunks, R is NUM_ROWS, W is WIDTH. A query sees the columns first .. end - 1 of W.

    The scores -1e5 (SHARED: of a query's own place) and -1e30 (of columns that it does not see) are those of the
    reference. UPCAST: products are of fp32 (the interpreter's bf16 is wrong).
    Grid: (tiles of R x T C x H x B): chunks that lie side by side, and share keys, run side by side.
    """
    log2e: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(NUM_ROWS, BLOCK_M)
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    head = chunk // num_chunks % num_heads
    batch = chunk // num_chunks // num_heads
    r = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < NUM_ROWS
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_E)
    query += batch * query_stride_b + head * query_stride_h
    key += batch * key_stride_b + head // repeat * key_stride_g
    value += batch * value_stride_b + head // repeat * value_stride_g

    place = tl.load(rows + chunk * NUM_ROWS + r, mask=inside, other=0)
    start = tl.load(first + chunk * NUM_ROWS + r, mask=inside, other=0)
    stop = tl.load(end + chunk * NUM_ROWS + r, mask=inside, other=0)
    pointers = query + place[:, None] * query_stride_n + dims[None, :].to(tl.int64) * query_stride_d
    queries = tl.load(pointers, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)  # the largest score so far, times log2(e)
    weight = tl.zeros([BLOCK_M], tl.float32)  # the sum of exp2(score - m)
    accumulated = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for w0 in tl.range(0, WIDTH, BLOCK_N):
        w = w0 + tl.arange(0, BLOCK_N)
        real = w < WIDTH
        at = tl.load(columns + chunk * WIDTH + w, mask=real, other=0)
        pointers = key + at[:, None] * key_stride_m + dims[None, :].to(tl.int64) * key_stride_d
        keys = tl.load(pointers, mask=real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee") * scale
        if SHARED:
            scores = tl.where(place[:, None] == at[None, :], -1e5, scores)
        seen = (w[None, :] >= start[:, None]) & (w[None, :] < stop[:, None])
        scores = tl.where(seen, scores, -1e30) * log2e
        scores = tl.where(real[None, :], scores, -float("inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        probabilities = tl.exp2(scores - new[:, None])
        decay = tl.exp2(m - new)
        m = new
        weight = weight * decay + tl.sum(probabilities, 1)
        pointers = value + at[:, None] * value_stride_m + value_dims[None, :].to(tl.int64) * value_stride_e
        values = tl.load(pointers, mask=real[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0)
        accumulated *= decay[:, None]
        probabilities = probabilities.to(queries.dtype)
        accumulated = tl.dot(probabilities, values.to(queries.dtype), accumulated, input_precision="ieee")

    place_out = chunk * NUM_ROWS + r
    tl.store(totals + place_out, (m + tl.log2(weight)) / log2e, mask=inside)
    accumulated = accumulated / weight[:, None]
    pointers = out + place_out[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(pointers, accumulated.to(out.dtype.element_ty), mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :])


def gathered_attention_config(
    head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, num_rows: int, width: int
) -> dict[str, int]:
    """Tiles, warps and stages of `gathered_attention_kernel`, by sizes and compute capability."""
    size = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim), 16)
    block_m, block_n = (max(16, triton.next_power_of_2(number)) for number in (num_rows, width))
    if dtype == torch.float32:
        # Exact products, without tensor cores, which Triton up to 3.7 may take from 64 rows on (triton#10176).
        most_m, most_n, num_warps, num_stages = (16, 16, 4, 1) if size > 128 else (32, 32, 4, 2)
    elif size <= 128:
        most_m, most_n, num_warps, num_stages = 64, 64, 4, 2 if arch < 90 else 3
    else:
        most_m, most_n, num_warps, num_stages = (64, 32, 8, 2) if size <= 256 else (16, 16, 4, 1)
    return {
        "BLOCK_M": min(block_m, most_m), "BLOCK_N": min(block_n, most_n), "num_warps": num_warps,
        "num_stages": num_stages,
    }  # fmt: skip


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    shared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator fxpress::gathered_attention defines, in fp16, bf16 or fp32.

    query [B, H, N, D], key [B, G, M, D], value [B, G, M, E]; rows, first and end [B, H, T, C, R], columns
    [B, H, T, C, W], int64; any strides. Results: logarithms of sums of exponentials [B, H, T, C, R] in fp32, and
    attention [B, H, T, C, R, E].
    """
    num_heads, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    num_rows, width = rows.shape[4], columns.shape[4]
    out = torch.empty((*rows.shape, value_dim), dtype=query.dtype, device=query.device)
    totals = torch.empty(rows.shape, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return totals, out
    config = gathered_attention_config(head_dim, value_dim, query.dtype, arch_of(query.device), num_rows, width)
    rows, columns, first, end = (tensor.contiguous() for tensor in (rows, columns, first, end))
    chunks = rows.numel() // num_rows
    gathered_attention_kernel[(triton.cdiv(num_rows, config["BLOCK_M"]) * chunks,)](
        query, key, value, rows, columns, first, end, out, totals,
        num_heads, num_heads // key.shape[1], rows.shape[2] * rows.shape[3], scale,
        *query.stride(), *key.stride(), *value.stride(),
        SHARED=shared, NUM_ROWS=num_rows, WIDTH=width, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_E=max(16, triton.next_power_of_2(value_dim)),
        UPCAST=query.dtype == torch.bfloat16 and not query.is_cuda, **config,
    )  # fmt: skip
    return totals, out
