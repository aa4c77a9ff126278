"""Linear layers whose weight is 2:4 sparse: its numbers are put in their places in registers, a tile at a time.

What is read from memory is half of the numbers, and 4 bits for each four that say which half: 9/16 of the bytes of a
float16 weight. Tensor cores multiply the zeros, too, which is free as long as memory is what takes the time: for few
rows. A code generator copies this file's functions and replaces the lines between `# hook:` and `# end`, as those of
`matmul`; batch, outer and inner are 0 here.
"""

import torch
import triton
import triton.language as tl

from .launch import arch_of
from .matmul import linear_rows, matmul


@triton.jit
def expanded_sparse24(values, positions, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile [BLOCK_N, BLOCK_K] of a 2:4 weight from values [BLOCK_N, BLOCK_K / 2], positions [BLOCK_N, BLOCK_K / 8].

    Of each four neighbours the first number stands before the second, so never last, and the second never first: six
    comparisons and six choices.
    """
    FOURS: tl.constexpr = BLOCK_K // 4
    halves = tl.reshape(tl.join(positions & 15, positions >> 4), (BLOCK_N, FOURS))
    first_at = halves & 3
    second_at = halves >> 2
    first, second = tl.split(tl.reshape(values, (BLOCK_N, FOURS, 2)))
    none = tl.zeros_like(first)
    at_0 = tl.where(first_at == 0, first, none)
    at_1 = tl.where(first_at == 1, first, tl.where(second_at == 1, second, none))
    at_2 = tl.where(first_at == 2, first, tl.where(second_at == 2, second, none))
    at_3 = tl.where(second_at == 3, second, none)
    return tl.reshape(tl.join(tl.join(at_0, at_2), tl.join(at_1, at_3)), (BLOCK_N, BLOCK_K))


@triton.jit
def sparse24_matmul_kernel(
    x,
    values,
    positions,
    # hook: parameters
    bias,
    out,
    stride_op,
    stride_oq,
    stride_om,
    stride_on,
    # end
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_vn,
    stride_pn,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = sum over k of x[m, k] w[n, k] + bias[n], w the weight that values and positions say.

    x [M, K] and out [M, N] of any strides; values [N, K / 2] of x's dtype and positions uint8 [N, ceil(K / 8)], rows
    contiguous; bias [N], contiguous, or None. EVEN_K says that BLOCK_K divides K. Grid: (tiles of M x N), those of the
    same columns together, so that they find the weight in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    tile_m = tl.program_id(0) % tiles_m
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    kept = tl.arange(0, BLOCK_K // 2)
    eights = tl.arange(0, BLOCK_K // 8)
    x_at = x + row[None, :] * stride_xm + steps[:, None].to(tl.int64) * stride_xk
    values_at = values + col[:, None] * stride_vn + kept[None, :]
    positions_at = positions + col[:, None] * stride_pn + eights[None, :]
    row_exists = (row < M)[None, :]
    col_exists = (col < N)[:, None]
    advance = tl.full((), BLOCK_K, tl.int64)
    # The product is w x^T: the weight, made in registers, is the operand that tensor cores take from registers.
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            right = tl.load(x_at, mask=row_exists, other=0)
            numbers = tl.load(values_at, mask=col_exists, other=0)
            places = tl.load(positions_at, mask=col_exists, other=0)
        else:
            left = K - first
            right = tl.load(x_at, mask=row_exists & (steps < left)[:, None], other=0)
            numbers = tl.load(values_at, mask=col_exists & (kept * 2 < left)[None, :], other=0)
            places = tl.load(positions_at, mask=col_exists & (eights * 8 < left)[None, :], other=0)
        weight = expanded_sparse24(numbers, places, BLOCK_N, BLOCK_K)
        sums = tl.dot(weight, right, sums, out_dtype=tl.float32)
        x_at += advance * stride_xk
        values_at += BLOCK_K // 2
        positions_at += BLOCK_K // 8
    acc = tl.trans(sums)
    batch = tl.full((), 0, tl.int64)
    outer, inner = batch, batch
    rows = row[:, None]
    cols = col[None, :]
    inside = (rows < M) & (cols < N)
    # hook: epilogue (batch, outer, inner, rows, cols, inside, acc)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0).to(acc.dtype)
    at = outer * stride_op + inner * stride_oq + rows * stride_om + cols * stride_on
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    # end


FEW_ROWS = 64  # of x, up to which a weight is expanded once: more take a second tile of rows, and expand it again


def sparse24_matmul(x, values, positions, dense=None, out=None, bias=None, extra=(), config=None, kernels=None):
    """x w^T + bias for x [..., K] and a 2:4 sparse w [N, K]: [..., N].

    Args:
        x: float16 or bfloat16; its rows are a view where one stride walks over them.
        values, positions: of x's dtype [N, K / 2], and uint8 [N, ceil(K / 8)], as ir/ops/sparse.py packs a weight.
        dense: w itself, which `matmul` multiplies where there are more than FEW_ROWS rows; None: it is not there.
        out: where to write, contiguous [..., N]; by default a new tensor of x's dtype.
        bias: [N], contiguous.
        extra: the arguments of a generated epilogue, in place of `bias` and `out`.
        config: one of `sparse24_configs`; by default its best guess.
        kernels: generated ones in place of `sparse24_matmul_kernel` and, but they may be left out, of those of
            `matmul`, with the epilogue of `extra`.

    Returns:
        `out`, or None if a generated epilogue writes the results.
    """
    K, N = x.shape[-1], values.shape[0]
    if x.dtype not in (torch.float16, torch.bfloat16) or values.dtype != x.dtype:
        raise ValueError(f"x and values must both be float16 or bfloat16, found {x.dtype} and {values.dtype}")
    if 2 * values.shape[1] != K or tuple(positions.shape) != (N, -(-K // 8)) or positions.dtype != torch.uint8:
        raise ValueError(
            f"values {list(values.shape)} and positions {positions.dtype} {list(positions.shape)} do not fit x "
            f"{list(x.shape)}"
        )
    if out is None and not extra:
        out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    M = x.shape[:-1].numel()
    if M * N == 0:
        return out
    kernel, *whole = kernels or (sparse24_matmul_kernel,)
    if dense is not None and M > FEW_ROWS:
        target = None if out is None else out.view(1, 1, M, N)
        matmul(linear_rows(x), dense, target, bias, extra, kernels=whole or None)
        return out
    rows = x.reshape(M, K)
    if config is None:
        config = sparse24_configs(M, N, K, arch_of(x.device))[0]
    hooks = extra or (bias, out, 0, 0, N, 1)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    values, positions = values.contiguous(), positions.contiguous()
    kernel[(tiles,)](
        rows, values, positions, *hooks, M, N, K, *rows.stride(), values.stride(0), positions.stride(0),
        EVEN_K=K % config["BLOCK_K"] == 0, enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out


def sparse24_configs(M, N, K, arch):
    """Configurations of `sparse24_matmul` for x [M, K] and w [N, K] of 16 bits on sm_`arch`, the best guess first.

    A configuration is a dict: BLOCK_M, BLOCK_N, BLOCK_K, num_warps and num_stages.
    """
    shared = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}.get(arch, 99) * 1024
    # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages; 128 columns by 4 warps are what Triton 3.7 does not compile for sm_100
    one = [(16, 16, 256, 4, 5), (16, 32, 256, 4, 4), (16, 64, 128, 4, 5), (16, 128, 128, 8, 4)]
    few = [(32, 64, 128, 4, 4), (32, 32, 128, 4, 4)]
    some = [(64, 64, 128, 4, 4), (64, 128, 64, 8, 4)]
    if M <= 16:
        # The widest of those that still give each multiprocessor two programs, then the others.
        order = sorted(one, key=lambda tile: (triton.cdiv(N, tile[1]) < 256, -tile[1] if N >= 16 * 256 else tile[1]))
    else:
        order = few + one[2:] if M <= 32 else some + few[:1]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [
        dict(zip(names, (block_m, block_n, depth, warps, stages), strict=True))
        for block_m, block_n, depth, warps, stages in order
        if stages * depth * (2 * block_m + block_n + block_n // 8) <= shared
    ]
