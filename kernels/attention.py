"""Attention: blocks of queries against blocks of keys with an online softmax (FlashAttention-2: Dao, 2023).

Names of shapes, as in ir/ops/attention.py: query [B, H, N, D], key [B, G, M, D], value [B, G, M, E], where G divides H.
A stride is named by its tensor and axis. Offsets of whole tensors are computed in int64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .elementwise import tanh
from .launch import arch_of

FEW_QUERIES = 16  # up to which the heads that read the same keys share a block, and keys may be parted


@triton.jit
def load_tile(
    pointers, rows, columns, num_rows, CHECK_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Loads [ROWS, BLOCK]; zeros in columns from NUM_COLUMNS on and, with CHECK_ROWS, in rows from num_rows on."""
    if CHECK_ROWS and NUM_COLUMNS != BLOCK:
        tile = tl.load(pointers, mask=(rows < num_rows) & (columns < NUM_COLUMNS), other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows < num_rows, other=0.0)
    elif NUM_COLUMNS != BLOCK:
        tile = tl.load(pointers, mask=columns < NUM_COLUMNS, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def band_blocks(first, last, left, right, size, BLOCK: tl.constexpr):
    """Blocks of what the positions first..last see of `size` others, each x the band x - left .. x + right.

    Blocks [begin, end) hold all that any of them sees; of these [full_begin, full_end) only what all of them see.
    """
    low, high, full_low, full_high = 0, size, 0, size
    if left is not None:
        low = tl.maximum(first - left, 0)
        full_low = tl.maximum(last - left, 0)
    if right is not None:
        high = tl.minimum(last + right + 1, size)
        full_high = tl.minimum(first + right + 1, size)
    begin = low // BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK), begin)
    full_begin = tl.minimum(tl.cdiv(full_low, BLOCK), end)
    full_end = tl.maximum(tl.maximum(full_high, 0) // BLOCK, full_begin)
    return begin, end, full_begin, full_end


@triton.jit
def allowed_blocks(begin, end, key_mask, stride, num_keys, BLOCK: tl.constexpr):
    """Blocks [begin, end) of keys without those before the first and after the last key that a mask [M] allows."""
    first, last = num_keys, -1
    for start in tl.range(0, num_keys, 2048):
        j = start + tl.arange(0, 2048)
        allowed = tl.load(key_mask + j.to(tl.int64) * stride, mask=j < num_keys, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(allowed, j, num_keys), 0))
        last = tl.maximum(last, tl.max(tl.where(allowed, j, -1), 0))
    begin = tl.maximum(begin, first // BLOCK)
    return begin, tl.maximum(tl.minimum(end, tl.cdiv(last + 1, BLOCK)), begin)


# fmt: off
@triton.jit(do_not_specialize=["left", "right"])  # right grows with each token that a model generates
def attention_kernel(
    query, key, value, out, key_mask, sinks, maximum, total,
    num_heads, repeat, num_queries, num_keys,
    left, right, scale, softcap, first_globals, num_globals, dilation,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_g, key_stride_m, key_stride_d,
    value_stride_b, value_stride_g, value_stride_m, value_stride_e,
    out_stride_s, out_stride_b, out_stride_h, out_stride_n,
    key_mask_stride_b, key_mask_stride_m, total_stride_s,
    # hook: parameters
    bias, bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m,
    # end
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, EMPTY: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, SPLITS: tl.constexpr, SKIP_PADDING: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_M rows of queries of one head, or, with PACKED, of all the heads that read one group of keys.

    query [B, H, N, D], key [B, G, M, D], value [B, G, M, E], key_mask [B, M] boolean or None, sinks [H] or None,
    bias [B, H, N, M] boolean or float, or None; all of any strides. H is num_heads, H / G is repeat, N is num_queries,
    M is num_keys. left, right and softcap may be None. So may be what window_attention adds: of the band only every
    dilation-th key is seen; keys from first_globals[batch] (int64 [B]) on, num_globals in number, are seen by all and
    see all, with CAUSAL not what comes later.

    With SPLITS = 1 out is [B, H, N, E]. Else program (., s) reads the s-th part of the keys, and out [S, B, H, N, E] is
    the sum of its exp(score - maximum) value, in fp32. out has a stride of 1 on its last axis. maximum and total
    [S, B, H, N] in fp32, contiguous, or None: the largest score of a row, and its sum of exp(score - maximum).

    HAS_BIAS says whether the hook has anything to do. NATURAL: scores are scaled before their maximum is taken; else
    the scale is multiplied into the exponent, which costs nothing. UPCAST: products are of fp32 (the interpreter's
    bf16 is wrong).
    """
    log2e: tl.constexpr = 1.4426950408889634
    lowest: tl.constexpr = -3.4028234663852886e38  # of fp32

    num_rows = num_queries * repeat if PACKED else num_queries
    num_blocks = tl.cdiv(num_rows, BLOCK_M)
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    split = tl.program_id(1).to(tl.int64)
    if right is not None:
        block = num_blocks - 1 - block  # the rows that see most keys come first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    if PACKED:
        batch = (head // (num_heads // repeat)).to(tl.int64)
        group = (head % (num_heads // repeat)).to(tl.int64)
        head = group * repeat + tl.minimum(rows, num_rows - 1) // num_queries
        i = rows % num_queries
        first_row, last_row = 0, num_queries - 1
    else:
        batch = (head // num_heads).to(tl.int64)
        head = (head % num_heads).to(tl.int64)
        group = head // repeat
        i = rows
        first_row = block * BLOCK_M
        last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_E)[None, :]

    begin, end, full_begin, full_end = band_blocks(first_row, last_row, left, right, num_keys, BLOCK_N)
    if num_globals is not None:  # rows of global tokens see all
        first_global = tl.load(first_globals + batch).to(tl.int32)
        end_global = first_global + num_globals
        num_seen = tl.minimum(last_row + 1, num_keys) if CAUSAL else num_keys
        has_global = (first_row < end_global) & (last_row >= first_global)
        begin = tl.where(has_global, 0, begin)
        end = tl.where(has_global, tl.cdiv(num_seen, BLOCK_N), end)
    if key_mask is not None:
        key_mask += batch * key_mask_stride_b
    if SKIP_PADDING:
        begin, end = allowed_blocks(begin, end, key_mask, key_mask_stride_m, num_keys, BLOCK_N)
    if SPLITS > 1:
        share = tl.cdiv(end - begin, SPLITS)
        begin = tl.minimum(begin + tl.program_id(1) * share, end)
        end = tl.minimum(begin + share, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    if dilation is not None:
        full_end = full_begin
    num_masked = full_begin - begin + end - full_end
    if num_globals is not None:  # blocks of global keys before and after the others
        first_block = first_global // BLOCK_N
        end_block = tl.cdiv(tl.minimum(end_global, num_seen), BLOCK_N)
        num_before = tl.maximum(tl.minimum(end_block, begin) - first_block, 0)
        num_after = tl.maximum(end_block - tl.maximum(first_block, end), 0)

    query += batch * query_stride_b + head * query_stride_h + i.to(tl.int64) * query_stride_n
    query += dims.to(tl.int64) * query_stride_d
    queries = load_tile(query, rows, dims, num_rows, True, HEAD_DIM, BLOCK_D)
    if UPCAST:
        queries = queries.to(tl.float32)
    key += batch * key_stride_b + group * key_stride_g
    key_offsets = columns[:, None].to(tl.int64) * key_stride_m + dims.to(tl.int64) * key_stride_d
    value += batch * value_stride_b + group * value_stride_g
    value_offsets = columns[:, None].to(tl.int64) * value_stride_m + value_dims.to(tl.int64) * value_stride_e

    factor = log2e if NATURAL else scale * log2e  # exp(x) is exp2(x log2e); scores may still lack their scale
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)  # the largest score so far
    weight = tl.zeros([BLOCK_M], tl.float32)  # the sum of exp(score - m)
    accumulated = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        sink = tl.reshape(sink, [BLOCK_M]) if PACKED else sink
        m = tl.zeros([BLOCK_M], tl.float32) + (sink if NATURAL else sink / scale)
        weight += tl.exp2((sink - tl.where(sink == -float("inf"), 0.0, sink)) * log2e)  # 1, but not of an infinite one
    for masked in tl.static_range(2):
        # First the blocks that need no mask, then those on both ends of the band.
        count = num_masked if masked else full_end - full_begin
        if masked and num_globals is not None:
            count += num_before + num_after
        for step in tl.range(0, count):
            if masked:
                start = begin + step
                start = tl.where(start < full_begin, start, start - full_begin + full_end)
                if num_globals is not None:
                    others = step - num_masked
                    after = tl.maximum(first_block, end) + others - num_before
                    others = tl.where(others < num_before, first_block + others, after)
                    start = tl.where(step < num_masked, start, others)
                start *= BLOCK_N
            else:
                start = (full_begin + step) * BLOCK_N
            j = start + columns[None, :]
            offset = start.to(tl.int64)
            pointers = key + offset * key_stride_m + key_offsets
            keys = load_tile(pointers, start + columns[:, None], dims, num_keys, masked, HEAD_DIM, BLOCK_D)
            scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
            if NATURAL:
                scores *= scale
            if softcap is not None:
                scores = softcap * tanh(scores / softcap)
            inside = (rows < num_rows) & (j < num_keys)
            # hook: scores (batch, head, i, j, inside, scores)
            if HAS_BIAS:
                bias_offsets = i.to(tl.int64) * bias_stride_n + j.to(tl.int64) * bias_stride_m
                added = tl.load(bias + batch * bias_stride_b + head * bias_stride_h + bias_offsets, inside, other=0)
                if bias.dtype.element_ty == tl.int1:
                    scores = tl.where(added, scores, -float("inf"))
                else:
                    scores += added.to(tl.float32)
            # end
            if key_mask is not None:
                keep = tl.load(key_mask + j.to(tl.int64) * key_mask_stride_m, mask=j < num_keys, other=0)
                scores = tl.where(keep != 0, scores, -float("inf"))
            if masked:
                seen = j < num_keys
                if left is not None:
                    seen = seen & (j >= i - left)
                if right is not None:
                    seen = seen & (j <= i + right)
                if dilation is not None:
                    seen = seen & ((j - i) % dilation == 0)
                if num_globals is not None:
                    seen = seen | ((j >= first_global) & (j < end_global))
                    seen = seen | ((i >= first_global) & (i < end_global))
                    seen = seen & (j < num_seen if not CAUSAL else j <= i)
                scores = tl.where(seen, scores, -float("inf"))
            if EMPTY == "mean":  # as the reference's clamp; a NaN stays
                scores = tl.where((scores < lowest) & (j < num_keys), lowest, scores)

            new = tl.maximum(m, tl.max(scores, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)  # no key was seen yet: exp(-inf) rather than -inf + inf
            if NATURAL:  # the difference first: a score of -3e38 times log2e would be -inf
                probabilities = tl.exp2((scores - shift[:, None]) * factor)
                decay = tl.exp2((m - shift) * factor)
            else:
                probabilities = tl.exp2(scores * factor - (shift * factor)[:, None])
                decay = tl.exp2((m - shift) * factor)
            m = new
            weight = weight * decay + tl.sum(probabilities, 1)
            pointers = value + offset * value_stride_m + value_offsets
            values = load_tile(pointers, start + columns[:, None], value_dims, num_keys, masked, VALUE_DIM, BLOCK_E)
            accumulated *= decay[:, None]
            probabilities = probabilities.to(queries.dtype)
            accumulated = tl.dot(probabilities, values.to(queries.dtype), accumulated, input_precision="ieee")

    stored = rows < num_rows
    if maximum is not None:
        place = split * total_stride_s + (batch * num_heads + head) * num_queries + i
        tl.store(maximum + place, (m if NATURAL else m * scale)[:, None], mask=stored)
        tl.store(total + place, weight[:, None], mask=stored)
    if SPLITS == 1:
        if EMPTY == "mean":  # rows without any allowed key, of whose keys some may lie in blocks that were skipped
            nothing = (m <= lowest) & (weight == weight)
            value_sum = tl.zeros([1, BLOCK_E], tl.float32)
            for start in tl.range(0, tl.where(tl.max(nothing.to(tl.int32), 0) > 0, num_keys, 0), BLOCK_N):
                j_rows = start + columns[:, None]
                pointers = value + j_rows.to(tl.int64) * value_stride_m + value_dims.to(tl.int64) * value_stride_e
                tile = load_tile(pointers, j_rows, value_dims, num_keys, True, VALUE_DIM, BLOCK_E)
                value_sum += tl.sum(tile.to(tl.float32), 0)[None, :]
            accumulated = tl.where(nothing[:, None], value_sum, accumulated)
            weight = tl.where(nothing, num_keys, weight)
        elif EMPTY == "zeros":
            weight = tl.where(weight == 0.0, 1.0, weight)
        accumulated = accumulated / weight[:, None]
    out += split * out_stride_s + batch * out_stride_b + head * out_stride_h + i.to(tl.int64) * out_stride_n
    tl.store(out + value_dims, accumulated.to(out.dtype.element_ty), mask=stored & (value_dims < VALUE_DIM))


@triton.jit
def combine_kernel(
    partial, maximum, total, sinks, out, num_heads, num_queries, num_rows, out_stride_b, out_stride_h, out_stride_n,
    EMPTY: tl.constexpr, SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: one row of the result, from the parts of its keys (Flash-Decoding: Dao et al., 2023).

    partial [S, B, H, N, E], maximum and total [S, B, H, N], in fp32, contiguous, as `attention_kernel` leaves them;
    sinks [H] or None; out [B, H, N, E] with a stride of 1 on its last axis. num_rows is B H N.
    """
    log2e: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    i = row % num_queries
    head = row // num_queries % num_heads
    batch = row // num_queries // num_heads
    split = tl.arange(0, SPLITS).to(tl.int64)
    dims = tl.arange(0, BLOCK_E)
    maxima = tl.load(maximum + split * num_rows + row)
    weights = tl.load(total + split * num_rows + row)
    largest = tl.max(maxima, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        largest = tl.maximum(largest, sink)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    decay = tl.exp2((maxima - shift) * log2e)
    weight = tl.sum(weights * decay, 0)
    if sinks is not None:
        weight += tl.exp2((sink - shift) * log2e)
    if EMPTY == "zeros":
        weight = tl.where(weight == 0.0, 1.0, weight)
    offsets = (split * num_rows + row)[:, None] * VALUE_DIM + dims[None, :]
    sums = tl.load(partial + offsets, mask=dims[None, :] < VALUE_DIM, other=0.0)
    result = tl.sum(sums * decay[:, None], 0) / weight
    out += batch * out_stride_b + head * out_stride_h + i * out_stride_n
    tl.store(out + dims, result.to(out.dtype.element_ty), mask=dims < VALUE_DIM)


def attention_configs(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    arch: int,
    num_rows: int,
    num_keys: int,
    has_mask: bool = False,
    has_bias: bool = False,
) -> list[dict[str, int]]:
    """Blocks, warps and stages of `attention_kernel`, by size and compute capability, the best guess first.

    That is chosen so that a program stays within 227 KB of shared memory (sm_90 to sm_103) or 99 KB (others), where a
    bias of the scores' size is kept too, and, up to 128 dimensions, spills no registers: tests/kernels/
    test_attention_aot.py. The others are for measurements to choose among; they may not fit.
    """
    large = 90 <= arch < 120
    width = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim), 16)
    has_mask = has_mask or head_dim != width or value_dim != width
    others = []
    if dtype == torch.float32:
        # Exact products, without tensor cores: Triton up to 3.7 takes those of sm_100, in tf32, from 64 rows on where
        # scores depend on 8 bits, as of a mask (triton-lang/triton#10176).
        sizes = (16, 16, 4, 1) if width > 128 else (16, 32, 4, 2) if width > 64 and has_bias else (32, 32, 4, 2)
    elif width <= 64:
        sizes = (128, 64, 8, 3) if has_mask else (128, 64, 4, 3)
        if has_bias:
            sizes = (128, 64 if large else 32, 8, 2)
        others = [(128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3)]
    elif width <= 128 and not large:
        sizes = (64, 64, 8, 2) if has_bias else (128, 32, 8, 3) if has_mask else (128, 64, 8, 2)
        others = [(64, 64, 4, 2), (64, 32, 4, 3)]
    elif width <= 128:
        sizes = (128, 64, 8, 2) if has_bias else (128, 128, 8, 2) if arch == 90 else (128, 64, 8, 3)
        others = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2)]
    else:
        sizes = (64, 64 if large else 32, 8, 2) if width <= 256 else (16, 16, 4, 1)
    found = []
    for block_m, block_n, num_warps, num_stages in (sizes, *others):
        if num_rows <= 32 and width <= 128 and dtype != torch.float32:
            block_n, num_warps, num_stages = min(block_n, 64), 4, 3
        block_m = max(16, min(block_m, triton.next_power_of_2(num_rows)))
        block_n = max(16, min(block_n, triton.next_power_of_2(num_keys)))
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
        if config not in found:
            found.append(config)
    return found


def attention_splits(programs: int, seen_keys: int, arch: int) -> int:
    """Into how many parts the keys are split, so that a few programs become enough for all multiprocessors."""
    multiprocessors = 108 if arch < 90 else 132
    splits = 1
    while splits < 64 and programs * splits * 2 <= multiprocessors * 2 and seen_keys >= splits * 2 * 256:
        splits *= 2
    return splits


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    empty: str = "zeros",
    bias: torch.Tensor | None = None,
    extra: tuple | None = None,
    statistics: torch.Tensor | None = None,
    window: tuple = (None, None, None, False),
    kernel: object = None,
    config: dict | None = None,
) -> torch.Tensor:
    """Attention as the operator fxpress::attention defines it, in fp16, bf16 or fp32.

    query [B, H, N, D], key [B, G, M, D], value [B, G, M, E], key_mask [B, M] boolean, sinks [H], bias broadcasting to
    [B, H, N, M], boolean or float; any strides. The result [B, H, N, E] is contiguous once its axes 1 and 2 are
    exchanged. `extra` takes the place of the bias where the hook of the kernel, and its parameters, are generated ones,
    those of `kernel`.
    `statistics` [2, B, H, N] in fp32 gets the largest score of each row and its sum of exp(score - largest).
    `window` is what `window_attention` adds: first_globals [B], num_globals, dilation, and whether it is causal.
    `config` is one of `attention_configs`, by default the first.

    What lies in blocks of keys that are skipped, outside of the band or all padding, is not read, be it NaN or not.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_groups, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    dtype, device = query.dtype, query.device
    out = torch.empty((batch, num_queries, num_heads, value_dim), dtype=dtype, device=device).transpose(1, 2)
    if out.numel() == 0 or num_keys == 0:
        return out.zero_()
    arch = arch_of(device)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    empty = "nan" if sinks is not None else empty  # beside a sink no row is empty, unless that is -inf: NaN
    has_bias = bias is not None or extra is not None
    if extra is None:
        strides = (0, 0, 0, 0) if bias is None else bias.expand(batch, num_heads, num_queries, num_keys).stride()
        extra = (bias, *strides)
    mask_strides = (0, 0) if key_mask is None else key_mask.expand(batch, num_keys).stride()

    repeat = num_heads // num_groups
    *globals_and_dilation, causal = window
    packed = num_queries <= FEW_QUERIES and window == (None, None, None, False)
    num_rows = num_queries * repeat if packed else num_queries
    has_window = window[1:3] != (None, None)  # takes as many registers as a bias
    if config is None:
        config = attention_configs(
            head_dim, value_dim, dtype, arch, num_rows, num_keys, key_mask is not None, has_bias or has_window
        )[0]
    programs = triton.cdiv(num_rows, config["BLOCK_M"]) * batch * (num_groups if packed else num_heads)
    splits = 1
    if packed and empty != "mean" and statistics is None:
        seen_keys = num_keys if left is None or right is None else min(max(left + right + num_queries, 0), num_keys)
        splits = attention_splits(programs, seen_keys, arch)
    parts, part_strides = out, (0, *out.stride()[:3])
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=device)
        part_strides = parts.stride()[:4]
        statistics = torch.empty((2, *parts.shape[:4]), dtype=torch.float32, device=device)
    maximum, total = (None, None) if statistics is None else statistics
    (kernel or attention_kernel)[(programs, splits)](
        query, key, value, parts, key_mask, sinks if splits == 1 else None, maximum, total,
        num_heads, repeat, num_queries, num_keys, left, right, scale, softcap or None,
        *globals_and_dilation,
        *query.stride(), *key.stride(), *value.stride(), *part_strides, *mask_strides,
        0 if splits == 1 else maximum.stride(0), *extra,
        HAS_BIAS=has_bias, NATURAL=has_bias or softcap != 0.0 or empty == "mean" or scale <= 0.0, EMPTY=empty,
        CAUSAL=causal, PACKED=packed, SPLITS=splits,
        SKIP_PADDING=key_mask is not None and splits == 1 and num_keys > 4 * config["BLOCK_N"],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_E=max(16, triton.next_power_of_2(value_dim)),
        UPCAST=dtype == torch.bfloat16 and not query.is_cuda, **config,
    )  # fmt: skip
    if splits > 1:
        rows = batch * num_heads * num_queries
        combine_kernel[(rows,)](
            parts, maximum, total, sinks, out, num_heads, num_queries, rows, *out.stride()[:3],
            EMPTY=empty, SPLITS=splits, VALUE_DIM=value_dim, BLOCK_E=triton.next_power_of_2(value_dim),
        )  # fmt: skip
    return out


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    left: int = 0,
    right: int = 0,
    globals: int = 0,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention as the operator fxpress::window_attention defines it; only blocks of the window and of global tokens.

    Shapes, layouts and dtypes as of `attention`, with as many keys as queries.
    """
    right = min(right * dilation, 0) if causal else right * dilation
    first_globals = num_globals = None
    if globals > 0:
        num_globals = globals
        first_globals = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        if key_mask is not None:
            first_globals += key_mask.to(torch.int32).argmax(1)
    window = (first_globals, num_globals, dilation if dilation > 1 else None, causal and globals > 0)
    return attention(query, key, value, key_mask, left * dilation, right, scale, softcap, window=window)
