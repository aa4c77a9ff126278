"""Linear attention (Katharopoulos et al., 2020) in chunks, beside a window of exact attention (LoLCATs: Zhang et al.,
2025).

A chunk of keys is summed up in a state, sum_j phi(k_j) v_j^T [F, E], and sum_j phi(k_j) [F]; a query reads the state of
all chunks before, or behind, those that it reads key by key. Chunks are independent of one another but for a running
sum of their states (as the chunked form of Yang et al., 2024, Gated Linear Attention). Time and memory are linear in
the length.

What is read is no sum but the mean, state / sum, with weights phi(q) sum that are normalized in each row: numbers that
half precision holds, however long the sequence.

Names of shapes, as in ir/ops/linear_attention.py: query [B, H, N, D], key [B, G, N, D], value [B, G, N, E], features
[B, H, N, F] and [B, G, N, F], where G divides H. C is the number of chunks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


# fmt: off
@triton.jit
def feature_state_kernel(
    key_features, value, key_mask, state, total, num_groups, num_tokens, num_chunks,
    features_stride_b, features_stride_g, features_stride_n, features_stride_f,
    value_stride_b, value_stride_g, value_stride_n, value_stride_e,
    key_mask_stride_b, key_mask_stride_n,
    CHUNK: tl.constexpr, NUM_FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_F features of one chunk's state, of keys that key_mask allows.

    key_features [B, G, N, F], value [B, G, N, E], key_mask [B, N] boolean or None, of any strides; state
    [B, G, C, F, E] and total [B, G, C, F] in fp32, contiguous. G is num_groups, N is num_tokens, C is num_chunks, F is
    NUM_FEATURES, E is VALUE_DIM. Grid: (B x G x C x blocks of features).
    """
    feature_blocks: tl.constexpr = (NUM_FEATURES + BLOCK_F - 1) // BLOCK_F
    place = (tl.program_id(0) // feature_blocks).to(tl.int64)  # of the chunk among all
    chunk = (place % num_chunks).to(tl.int32)
    group = place // num_chunks % num_groups
    batch = place // num_chunks // num_groups
    f = tl.program_id(0) % feature_blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    e = tl.arange(0, BLOCK_E)[None, :]
    key_features += batch * features_stride_b + group * features_stride_g + f[None, :].to(tl.int64) * features_stride_f
    value += batch * value_stride_b + group * value_stride_g + e.to(tl.int64) * value_stride_e
    sums = tl.zeros([BLOCK_F], tl.float32)
    products = tl.zeros([BLOCK_F, BLOCK_E], tl.float32)
    end = tl.minimum((chunk + 1) * CHUNK, num_tokens)
    for start in tl.range(chunk * CHUNK, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[:, None]
        offsets = j.to(tl.int64)
        inside = (j < end) & (f[None, :] < NUM_FEATURES)
        features = tl.load(key_features + offsets * features_stride_n, mask=inside, other=0.0)
        values = tl.load(value + offsets * value_stride_n, mask=(j < end) & (e < VALUE_DIM), other=0.0)
        if key_mask is not None:
            keep = tl.load(key_mask + batch * key_mask_stride_b + offsets * key_mask_stride_n, j < end, other=0)
            features = tl.where(keep != 0, features, 0.0)
        if UPCAST:
            features, values = features.to(tl.float32), values.to(tl.float32)
        sums += tl.sum(features.to(tl.float32), 0)
        products = tl.dot(tl.trans(features), values, products, input_precision="ieee")
    tl.store(total + place * NUM_FEATURES + f, sums, mask=f < NUM_FEATURES)
    f = f[:, None]
    at = (place * NUM_FEATURES + f) * VALUE_DIM + e
    tl.store(state + at, products, mask=(f < NUM_FEATURES) & (e < VALUE_DIM))


# fmt: off
@triton.jit
def feature_scan_kernel(
    state, total, means, sums, num_chunks, num_kept, side_stride,
    NUM_FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_F features of one group's running sums, those of the chunks before each one, or behind it.

    state [B, G, C, F, E] and total [B, G, C, F] in fp32; means [S, B, G, K, F, E] of any dtype and sums [S, B, G, K, F]
    in fp32: the quotient of the sums of states and of totals, and the latter; all contiguous. C is num_chunks; K is
    num_kept: C, or 1 where only the sum over all chunks is wanted. side_stride is B G K. Side 0 is before, 1 behind.
    Grid: (B x G, blocks of features, S).
    """
    place = tl.program_id(0).to(tl.int64)
    side = tl.program_id(2)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (f < NUM_FEATURES)[:, None] & (e < VALUE_DIM)
    of_state = f[:, None] * VALUE_DIM + e
    running = tl.zeros([BLOCK_F, BLOCK_E], tl.float32)
    weight = tl.zeros([BLOCK_F], tl.float32)
    for step in tl.range(0, num_chunks, num_stages=3):
        chunk = tl.where(side == 0, step, num_chunks - 1 - step)
        if num_kept > 1:
            kept = side.to(tl.int64) * side_stride + place * num_kept + chunk
            mean = running / tl.where(weight == 0.0, 1.0, weight)[:, None]
            tl.store(means + kept * NUM_FEATURES * VALUE_DIM + of_state, mean.to(means.dtype.element_ty), mask=inside)
            tl.store(sums + kept * NUM_FEATURES + f, weight, mask=f < NUM_FEATURES)
        at = place * num_chunks + chunk
        running += tl.load(state + at * NUM_FEATURES * VALUE_DIM + of_state, mask=inside, other=0.0)
        weight += tl.load(total + at * NUM_FEATURES + f, mask=f < NUM_FEATURES, other=0.0)
    if num_kept == 1:
        mean = running / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(means + place * NUM_FEATURES * VALUE_DIM + of_state, mean.to(means.dtype.element_ty), mask=inside)
        tl.store(sums + place * NUM_FEATURES + f, weight, mask=f < NUM_FEATURES)


@triton.jit
def visible_keys(j, i, end, key_mask, stride, CAUSAL: tl.constexpr):
    """Which keys j [1, J] before `end` the queries i [I, 1] may see: [1 or I, J]. key_mask [N] boolean or None."""
    allowed = j < end
    if key_mask is not None:
        allowed = allowed & (tl.load(key_mask + j.to(tl.int64) * stride, mask=j < end, other=0) != 0)
    if CAUSAL:
        allowed = allowed & (j <= i)
    return allowed


@triton.jit
def within_blocks(i, j, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Which keys j [1, J] of a chunk and those beside it are in the block of a query i [I, 1] or beside it."""
    if WINDOW == CHUNK:
        near = (j == j) & (i == i)
    else:
        apart = i // WINDOW - j // WINDOW
        near = (apart <= 1) & (apart >= -1)
    return near


# fmt: off
@triton.jit
def linear_attention_kernel(
    query, key, value, query_features, key_features, gain, key_mask, means, sums, out,
    num_heads, repeat, num_tokens, num_chunks, num_kept, side_stride, scale,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_g, key_stride_n, key_stride_d,
    value_stride_b, value_stride_g, value_stride_n, value_stride_e,
    query_features_stride_b, query_features_stride_h, query_features_stride_n, query_features_stride_f,
    key_features_stride_b, key_features_stride_g, key_features_stride_n, key_features_stride_f,
    key_mask_stride_b, key_mask_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, SIDES: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_M queries of one chunk of one head.

    query [B, H, N, D] and key [B, G, N, D] (read where there is a window), value [B, G, N, E], query_features
    [B, H, N, F], key_features [B, G, N, F], key_mask [B, N] boolean or None; all of any strides; gain [H], contiguous,
    or None; means [SIDES, B, G, K, F, E] and sums [SIDES, B, G, K, F] as `feature_scan_kernel` leaves them; out
    [B, H, N, E] with a stride of 1 on its last axis. H is num_heads, H / G is repeat, N is num_tokens, C is num_chunks,
    K is num_kept, B G K is side_stride. CHUNK is a multiple of WINDOW, which is 0 where there is none.
    Grid: (B x H x C x tiles of a chunk).
    """
    log2e: tl.constexpr = 1.4426950408889634
    smallest: tl.constexpr = 1e-20
    tiles: tl.constexpr = (CHUNK + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % num_chunks
    head = (tl.program_id(0) // tiles // num_chunks % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // num_chunks // num_heads).to(tl.int64)
    group = head // repeat
    i = chunk * CHUNK + tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    chunk_end = tl.minimum((chunk + 1) * CHUNK, num_tokens)
    last = tl.minimum(chunk * CHUNK + (tile + 1) * BLOCK_M, chunk_end)  # behind the tile's queries
    exists = i < chunk_end
    e = tl.arange(0, BLOCK_E)[None, :]
    f = tl.arange(0, BLOCK_F)
    columns = tl.arange(0, BLOCK_N)
    operand = tl.float32 if UPCAST else value.dtype.element_ty
    query_features += batch * query_features_stride_b + head * query_features_stride_h
    query_features += i.to(tl.int64) * query_features_stride_n

    accumulated = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)  # the sum of weight value
    weight = tl.zeros([BLOCK_M], tl.float32)
    strength = 1.0
    if gain is not None:
        strength = tl.exp(tl.load(gain + head).to(tl.float32))
    begin = tl.maximum(chunk - (1 if WINDOW > 0 else 0), 0) * CHUNK
    end = last if CAUSAL else tl.minimum((chunk + 2) * CHUNK, num_tokens)
    value += batch * value_stride_b + group * value_stride_g + e.to(tl.int64) * value_stride_e
    if key_mask is not None:
        key_mask += batch * key_mask_stride_b

    if WINDOW > 0:
        # Exact probabilities of the keys nearby, by an online softmax.
        d = tl.arange(0, BLOCK_D)[None, :]
        query += batch * query_stride_b + head * query_stride_h + i.to(tl.int64) * query_stride_n
        query += d.to(tl.int64) * query_stride_d
        rows = tl.load(query, mask=exists & (d < HEAD_DIM), other=0.0).to(operand)
        key += batch * key_stride_b + group * key_stride_g + d.to(tl.int64) * key_stride_d
        largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for start in tl.range(begin, end, BLOCK_N):
            j_rows = start + columns[:, None]
            offsets = j_rows.to(tl.int64)
            keys = tl.load(key + offsets * key_stride_n, mask=(j_rows < end) & (d < HEAD_DIM), other=0.0)
            scores = tl.dot(rows, tl.trans(keys.to(operand)), input_precision="ieee") * (scale * log2e)
            allowed = visible_keys(start + columns[None, :], i, end, key_mask, key_mask_stride_n, CAUSAL)
            near = allowed & within_blocks(i, start + columns[None, :], WINDOW, CHUNK)
            scores = tl.where(near, scores, -float("inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            probabilities = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(largest - shift)
            largest = new
            weight = weight * decay + tl.sum(probabilities, 1)
            accumulated *= decay[:, None]
            values = tl.load(value + offsets * value_stride_n, mask=(j_rows < end) & (e < VALUE_DIM), other=0.0)
            accumulated = tl.dot(probabilities.to(operand), values.to(operand), accumulated, input_precision="ieee")
        some = weight != 0.0
        accumulated /= tl.where(some, weight, 1.0)[:, None]
        weight = tl.where(some, 1.0, 0.0)

    if WINDOW != CHUNK and (CAUSAL or WINDOW > 0):
        # Weights of keys that are not within the window, but too near to be part of a state.
        key_features += batch * key_features_stride_b + group * key_features_stride_g
        for start in tl.range(begin, end, BLOCK_N):
            j_rows = start + columns[:, None]
            offsets = j_rows.to(tl.int64)
            weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in tl.range(0, NUM_FEATURES, BLOCK_F):
                named = first + f[None, :]
                pointers = query_features + named.to(tl.int64) * query_features_stride_f
                of_queries = tl.load(pointers, mask=exists & (named < NUM_FEATURES), other=0.0)
                pointers = key_features + offsets * key_features_stride_n + named.to(tl.int64) * key_features_stride_f
                of_keys = tl.load(pointers, mask=(j_rows < end) & (named < NUM_FEATURES), other=0.0)
                of_keys = tl.trans(of_keys.to(operand))
                weights = tl.dot(of_queries.to(operand), of_keys, weights, input_precision="ieee")
            far = visible_keys(start + columns[None, :], i, end, key_mask, key_mask_stride_n, CAUSAL)
            if WINDOW > 0:
                far = far & (within_blocks(i, start + columns[None, :], WINDOW, CHUNK) == 0)
            weights = tl.where(far, weights, 0.0)
            weight += tl.sum(weights, 1) * strength
            size = tl.max(tl.abs(weights), 1)
            shares = (weights / tl.where(size == 0.0, 1.0, size)[:, None]).to(operand)
            values = tl.load(value + offsets * value_stride_n, mask=(j_rows < end) & (e < VALUE_DIM), other=0.0)
            accumulated += tl.dot(shares, values.to(operand), input_precision="ieee") * (size * strength)[:, None]

    for side in tl.static_range(SIDES):
        kept = tl.full((), 0, tl.int32)
        if num_kept > 1:
            lag: tl.constexpr = 1 if WINDOW > 0 else 0
            kept = tl.maximum(chunk - lag, 0) if side == 0 else tl.minimum(chunk + lag, num_kept - 1)
        place = side * side_stride + (batch * (num_heads // repeat) + group) * num_kept + kept
        for first in tl.range(0, NUM_FEATURES, BLOCK_F):
            named = first + f
            pointers = query_features + named[None, :].to(tl.int64) * query_features_stride_f
            queries = tl.load(pointers, mask=exists & (named[None, :] < NUM_FEATURES), other=0.0).to(tl.float32)
            queries *= tl.load(sums + place * NUM_FEATURES + named, mask=named < NUM_FEATURES, other=0.0)[None, :]
            size = tl.sum(queries, 1)
            shares = (queries / tl.where(size == 0.0, 1.0, size)[:, None]).to(operand)
            at = (place * NUM_FEATURES + named[:, None]) * VALUE_DIM + e
            mean = tl.load(means + at, mask=(named[:, None] < NUM_FEATURES) & (e < VALUE_DIM), other=0.0).to(operand)
            size *= strength
            accumulated += tl.dot(shares, mean, input_precision="ieee") * size[:, None]
            weight += size

    accumulated /= tl.where(weight < smallest, smallest, weight)[:, None]
    out += batch * out_stride_b + head * out_stride_h + i.to(tl.int64) * out_stride_n
    tl.store(out + e, accumulated.to(out.dtype.element_ty), mask=exists & (e < VALUE_DIM))


def linear_attention_config(
    head_dim: int, num_features: int, value_dim: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles, warps and stages: of `linear_attention_kernel`, and of `feature_state_kernel`."""
    width = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim), 16)
    if dtype == torch.float32:
        # Exact products, without tensor cores, which Triton up to 3.7 may take from 64 rows on (triton#10176).
        size, stages = (32, 2) if width <= 128 else (16, 1)
    else:
        size, stages = (64, 2) if width <= 128 else (32, 2) if width <= 256 else (16, 1)
    features = max(16, min(size, triton.next_power_of_2(num_features)))
    tiles = {"BLOCK_N": size, "BLOCK_F": features, "num_warps": 4, "num_stages": stages}
    return {"BLOCK_M": size, **tiles, "num_warps": 8 if width > 64 else 4}, tiles


def linear_attention_chunk(
    length: int, num_features: int, value_dim: int, window: int, causal: bool, block: int
) -> tuple[int, int, int]:
    """The tokens of a chunk, the states that are kept of each group (1: their sum), and how many of them a query reads.

    A chunk is a multiple of the window, and otherwise about so long that its state is no larger than what it sums up.
    """
    if window:
        chunk = window * triton.cdiv(block, window)
        few = triton.cdiv(length, chunk) <= 2  # all keys are in the chunk of a query or beside it
        return chunk, triton.cdiv(length, chunk), 0 if few else 1 if causal else 2
    whole = triton.next_power_of_2(2 * num_features * value_dim // (num_features + value_dim))
    chunk = max(block, min(256, whole))
    if causal:
        return chunk, triton.cdiv(length, chunk), 0 if length <= chunk else 1
    return max(256, triton.cdiv(triton.cdiv(length, 64), block) * block), 1, 1


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    gain: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    window: int = 0,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """What the operator fxpress::linear_attention defines, in fp16, bf16 or fp32.

    query [B, H, N, D], key [B, G, N, D], value [B, G, N, E], query_features [B, H, N, F], key_features [B, G, N, F],
    the last two not negative, key_mask [B, N] boolean; any strides; gain [H]. Tensors of several dtypes are computed in
    fp32. The result [B, H, N, E] is contiguous once its axes 1 and 2 are exchanged.
    """
    batch, num_heads, length, head_dim = query.shape
    num_groups, value_dim, num_features = key.shape[1], value.shape[3], query_features.shape[3]
    dtype, device = query.dtype, query.device
    out = torch.empty((batch, length, num_heads, value_dim), dtype=dtype, device=device).transpose(1, 2)
    if out.numel() == 0:
        return out
    if any(item.dtype != dtype for item in (key, value, query_features, key_features)):
        query, key, value = query.float(), key.float(), value.float()
        query_features, key_features = query_features.float(), key_features.float()
    upcast = query.dtype == torch.bfloat16 and not query.is_cuda
    config, state_config = linear_attention_config(head_dim, num_features, value_dim, query.dtype)
    chunk, num_kept, sides = linear_attention_chunk(
        length, num_features, value_dim, window, causal, config["BLOCK_M"]
    )
    block_e = max(16, triton.next_power_of_2(value_dim))
    mask_strides = (0, 0) if key_mask is None else key_mask.expand(batch, length).stride()
    means = sums = None
    if sides:
        chunks = triton.cdiv(length, chunk)
        groups = batch * num_groups
        state = torch.empty((groups, chunks, num_features, value_dim), dtype=torch.float32, device=device)
        total = torch.empty((groups, chunks, num_features), dtype=torch.float32, device=device)
        feature_state_kernel[(groups * chunks * triton.cdiv(num_features, state_config["BLOCK_F"]),)](
            key_features, value, key_mask, state, total, num_groups, length, chunks,
            *key_features.stride(), *value.stride(), *mask_strides,
            CHUNK=chunk, NUM_FEATURES=num_features, VALUE_DIM=value_dim, UPCAST=upcast, BLOCK_E=block_e,
            **state_config,
        )  # fmt: skip
        kept = (sides, groups, num_kept, num_features)
        means_dtype = torch.float32 if upcast else query.dtype
        means = torch.empty((*kept, value_dim), dtype=means_dtype, device=device)
        sums = torch.empty(kept, dtype=torch.float32, device=device)
        feature_scan_kernel[(groups, triton.cdiv(num_features, 16), sides)](
            state, total, means, sums, chunks, num_kept, groups * num_kept,
            NUM_FEATURES=num_features, VALUE_DIM=value_dim, BLOCK_F=16, BLOCK_E=block_e,
        )  # fmt: skip
    if not window and not causal:
        chunk = config["BLOCK_M"]  # of queries
    chunks = triton.cdiv(length, chunk)
    linear_attention_kernel[(batch * num_heads * chunks * triton.cdiv(chunk, config["BLOCK_M"]),)](
        query, key, value, query_features, key_features, gain, key_mask, means, sums, out,
        num_heads, num_heads // num_groups, length, chunks, num_kept, batch * num_groups * num_kept,
        1 / math.sqrt(head_dim) if scale is None else scale,
        *query.stride(), *key.stride(), *value.stride(), *query_features.stride(), *key_features.stride(),
        *mask_strides, *out.stride()[:3],
        CHUNK=chunk, WINDOW=window, CAUSAL=causal, SIDES=sides, HEAD_DIM=head_dim, NUM_FEATURES=num_features,
        VALUE_DIM=value_dim, UPCAST=upcast, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_E=block_e,
        **config,
    )  # fmt: skip
    return out
