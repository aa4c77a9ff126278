"""Attention to the key blocks that a table names for each block of queries (BigBird: Zaheer et al., 2020).

The launcher makes of the table a plan: the named blocks ascending, each once, and how many there are. A program walks
over the keys of the blocks of its plan with an online softmax (FlashAttention-2: Dao, 2023): time and memory are linear
in the number of named blocks.

Names of shapes, as in ir/ops/block_attention.py: query [B, H, N, D], key [B, G, N, D], value [B, G, N, E], where G
divides H. R is the number of row blocks, K of the places in a row of the table.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .attention import load_tile
from .launch import arch_of


# fmt: off
@triton.jit
def block_attention_kernel(
    query, key, value, out, plan, count, key_mask,
    num_batches, heads_apart, num_tokens, rows, row_blocks, scale,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_g, key_stride_m, key_stride_d,
    value_stride_b, value_stride_g, value_stride_m, value_stride_e,
    out_stride_b, out_stride_h, out_stride_n,
    plan_stride_b, plan_stride_h, plan_stride_r,
    count_stride_b, count_stride_h, count_stride_r,
    key_mask_stride_b, key_mask_stride_m,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, REPEAT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_M queries of a row block, of one head, or with PACKED of the REPEAT heads of one group.

    query [B, H, N, D], key [B, G, N, D], value [B, G, N, E], key_mask [B, N] boolean or None, of any strides; plan
    [B, H or 1, R, K] int32, with a stride of 1 on its last axis: numbers of blocks of SIZE keys, of which the first
    count [B, H or 1, R] (int32) are seen; a count of -1: all blocks are. out [B, H, N, E] with a stride of 1 on its
    last axis. B is num_batches, N is num_tokens, R is row_blocks; heads_apart is G with PACKED, else H.

    WHOLE: BLOCK_N divides SIZE, so that a tile lies in one block; else it gathers its keys from several. EVEN: SIZE
    divides N. UPCAST: products are of fp32 (the interpreter's bf16 is wrong).
    Grid: (row blocks x tiles of each x num_batches x heads_apart): the first and the last row blocks, which are often
    those that see all, come first.
    """
    log2e: tl.constexpr = 1.4426950408889634
    num_rows = rows * REPEAT if PACKED else rows
    tiles = tl.cdiv(num_rows, BLOCK_M)
    head = (tl.program_id(0) % heads_apart).to(tl.int64)
    batch = (tl.program_id(0) // heads_apart % num_batches).to(tl.int64)
    turn = tl.program_id(0) // (heads_apart * num_batches)
    tile = turn % tiles
    turn = turn // tiles
    row_block = tl.where(turn % 2 == 0, turn // 2, row_blocks - 1 - turn // 2)

    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    if PACKED:
        group = head
        i = row_block * rows + place % rows
        query_head = head * REPEAT + tl.minimum(place // rows, REPEAT - 1)
        plan_head = tl.full((), 0, tl.int64)
    else:
        group = head // REPEAT
        i = row_block * rows + place
        query_head = head
        plan_head = head
    stored = (place < num_rows) & (i < num_tokens)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_E)[None, :]

    plan += batch * plan_stride_b + plan_head * plan_stride_h + row_block.to(tl.int64) * plan_stride_r
    blocks = tl.load(
        count + batch * count_stride_b + plan_head * count_stride_h + row_block.to(tl.int64) * count_stride_r
    )
    every = blocks < 0
    last = tl.minimum((row_block + 1) * rows, num_tokens) if CAUSAL else num_tokens
    num_seen = tl.where(every, tl.cdiv(last, SIZE), blocks) * SIZE

    query += batch * query_stride_b + query_head * query_stride_h + i.to(tl.int64) * query_stride_n
    query += dims.to(tl.int64) * query_stride_d
    queries = tl.load(query, mask=stored & (dims < HEAD_DIM), other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    key += batch * key_stride_b + group * key_stride_g + dims.to(tl.int64) * key_stride_d
    value += batch * value_stride_b + group * value_stride_g + value_dims.to(tl.int64) * value_stride_e
    if key_mask is not None:
        key_mask += batch * key_mask_stride_b

    factor = scale * log2e  # exp(x scale) is exp2(x factor)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)  # the largest score so far, before it is scaled
    weight = tl.zeros([BLOCK_M], tl.float32)  # the sum of exp(score - m)
    accumulated = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for first in tl.range(0, num_seen, BLOCK_N):
        if WHOLE:
            entry = first // SIZE
            number = tl.where(every, entry, tl.load(plan + entry, mask=blocks > 0, other=0))
            j = number * SIZE + first % SIZE + columns
        else:
            entry = (first + columns) // SIZE
            inside = first + columns < num_seen
            number = tl.load(plan + entry, mask=inside & (blocks > 0), other=0)
            j = tl.where(every, entry, number) * SIZE + (first + columns) % SIZE
            j = tl.where(inside, j, num_tokens)
        offsets = j[:, None].to(tl.int64)
        check: tl.constexpr = not (WHOLE and EVEN)
        keys = load_tile(key + offsets * key_stride_m, j[:, None], dims, num_tokens, check, HEAD_DIM, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
        if check:
            scores = tl.where(j[None, :] < num_tokens, scores, -float("inf"))
        if CAUSAL:
            scores = tl.where(j[None, :] <= i, scores, -float("inf"))
        if key_mask is not None:
            keep = tl.load(key_mask + j.to(tl.int64) * key_mask_stride_m, mask=j < num_tokens, other=0)
            scores = tl.where(keep[None, :] != 0, scores, -float("inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)  # no key was seen yet: exp(-inf) rather than -inf + inf
        probabilities = tl.exp2(scores * factor - (shift * factor)[:, None])
        decay = tl.exp2((m - shift) * factor)
        m = new
        weight = weight * decay + tl.sum(probabilities, 1)
        pointers = value + offsets * value_stride_m
        values = load_tile(pointers, j[:, None], value_dims, num_tokens, check, VALUE_DIM, BLOCK_E)
        accumulated *= decay[:, None]
        probabilities = probabilities.to(queries.dtype)
        accumulated = tl.dot(probabilities, values.to(queries.dtype), accumulated, input_precision="ieee")

    accumulated = accumulated / tl.where(weight == 0.0, 1.0, weight)[:, None]
    out += batch * out_stride_b + query_head * out_stride_h + i.to(tl.int64) * out_stride_n
    tl.store(out + value_dims, accumulated.to(out.dtype.element_ty), mask=stored & (value_dims < VALUE_DIM))


def block_attention_config(
    head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, num_rows: int, block: int
) -> dict[str, int]:
    """Tiles, warps and stages of `block_attention_kernel`, by sizes and compute capability.

    num_rows: the queries that read the same keys; `block`: the keys of a block, of which a tile is a part if it can be.
    """
    width = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim), 16)
    block_m = max(16, min(64 if width > 64 and arch < 90 else 128, triton.next_power_of_2(num_rows)))
    if dtype == torch.float32:
        # Exact products, without tensor cores, which Triton up to 3.7 may take from 64 rows on (triton#10176).
        block_m, block_n, num_warps, num_stages = (16, 16, 4, 1) if width > 128 else (min(block_m, 32), 32, 4, 2)
    elif width <= 128:
        block_n, num_warps, num_stages = 64, 8 if block_m == 128 else 4, 3 if width <= 64 else 2
    else:
        block_m, block_n, num_warps, num_stages = (min(block_m, 64), 32, 8, 2) if width <= 256 else (16, 16, 4, 1)
    while block % block_n and block_n > 32:
        block_n //= 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def block_plan(
    table: torch.Tensor, full: torch.Tensor | None, length: int, rows: int, block: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that each row of a table names, ascending and once, and how many they are; -1 for rows that see all.

    table [B or 1, H or 1, R or more, K], full [B or 1, F], as of `block_attention`. Results, int32:
    [B or 1, H or 1, R, K] and [B or 1, H or 1, R]. With `causal`, blocks that begin behind a row block are dropped.
    """
    row_blocks, blocks = triton.cdiv(length, rows), triton.cdiv(length, block)
    row = torch.arange(1, row_blocks + 1, device=table.device)
    named = table[:, :, :row_blocks]
    known = (named >= 0) & (named < blocks)
    if causal:
        known = known & (named * block < (row * rows)[:, None])
    plan = torch.where(known, named, blocks).to(torch.int32).sort(-1).values
    again = torch.zeros_like(known)
    again[..., 1:] = plan[..., 1:] == plan[..., :-1]
    plan = plan.masked_fill(again, blocks).sort(-1).values
    count = (plan < blocks).sum(-1).to(torch.int32)
    if full is not None:
        every = (full[:, None, :] == (row - 1)[:, None]).any(-1)  # [B or 1, R]
        count = torch.where(every[:, None], -1, count)
    return plan, count


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    full: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    rows: int = 64,
    block: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention as the operator fxpress::block_attention defines it, in fp16, bf16 or fp32.

    query [B, H, N, D], key [B, G, N, D], value [B, G, N, E], table [B or 1, H or 1, R or more, K] and full [B or 1, F]
    of integers, key_mask [B, N] boolean; any strides. The result [B, H, N, E] is contiguous once its axes 1 and 2 are
    exchanged. Blocks that no row names are not read, be they NaN or not.
    """
    batch, num_heads, length, head_dim = query.shape
    num_groups, value_dim = key.shape[1], value.shape[3]
    dtype, device = query.dtype, query.device
    out = torch.empty((batch, length, num_heads, value_dim), dtype=dtype, device=device).transpose(1, 2)
    if out.numel() == 0:
        return out
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if scale <= 0:  # the kernel takes the largest score before it is scaled
        query, scale = (query * 0, 1.0) if scale == 0 else (-query, -scale)
    plan, count = block_plan(table, full, length, rows, block, causal)
    packed = table.shape[1] == 1 and num_groups < num_heads
    shared_heads = plan.shape[1] == 1
    plan = plan.expand(batch, -1, -1, -1)
    count = count.expand(batch, -1, -1)
    plan_strides = (plan.stride(0), 0 if shared_heads else plan.stride(1), plan.stride(2))
    count_strides = (count.stride(0), 0 if shared_heads else count.stride(1), count.stride(2))
    mask_strides = (0, 0) if key_mask is None else key_mask.expand(batch, length).stride()
    repeat = num_heads // num_groups
    num_rows = min(rows, length) * repeat if packed else min(rows, length)
    config = block_attention_config(head_dim, value_dim, dtype, arch_of(device), num_rows, block)
    heads_apart = num_groups if packed else num_heads
    row_blocks = triton.cdiv(length, rows)
    tiles = triton.cdiv(rows * repeat if packed else rows, config["BLOCK_M"])
    block_attention_kernel[(row_blocks * tiles * batch * heads_apart,)](
        query, key, value, out, plan, count, key_mask,
        batch, heads_apart, length, rows, row_blocks, scale,
        *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3], *plan_strides, *count_strides,
        *mask_strides,
        CAUSAL=causal, PACKED=packed, REPEAT=repeat, WHOLE=block % config["BLOCK_N"] == 0, EVEN=length % block == 0,
        SIZE=block, HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_E=max(16, triton.next_power_of_2(value_dim)),
        UPCAST=dtype == torch.bfloat16 and not query.is_cuda, **config,
    )  # fmt: skip
    return out
