"""Parts of matmul kernels: which tile a program has, and the sums of its products."""

import triton
import triton.language as tl

from .float8 import float8_value


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The flat index in the batch, the first row and the first column of the tile of a program.

    The number of the program walks over the tiles of one matrix, then over the batch. GROUP_M rows of tiles are walked
    down before the next column, so that programs that run together read few rows of x and w, from the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = program % (tiles_m * tiles_n)
    batch = program // (tiles_m * tiles_n)
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + within % height
    tile_n = within // height
    return batch.to(tl.int64), tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def sums_of_products(
    x,
    w,
    rows,
    cols,
    start,
    stop,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum over k in start..stop of x[row, k] w[col, k], [BLOCK_M, BLOCK_N], for matrices x [M, K] and w [N, K].

    rows and cols are int64 [BLOCK_M, 1] and [1, BLOCK_N]: a tensor may have more than 2^31 elements. `start` is a
    multiple of BLOCK_K; so is `stop` if EVEN_K. A w of another dtype than x is cast to that of x; bytes (uint8) are
    numbers of float8_e4m3.
    """
    # Pointers of rows alone move: those of all elements would take the registers where loads are not of 16 bytes.
    steps = tl.arange(0, BLOCK_K)
    first_step = tl.cast(start, tl.int64)
    x_at = x + rows * stride_xm + first_step * stride_xk
    w_at = w + cols * stride_wn + first_step * stride_wk
    x_steps = steps[None, :].to(tl.int64) * stride_xk
    w_steps = steps[:, None].to(tl.int64) * stride_wk
    row_exists = rows < M
    col_exists = cols < N
    advance = tl.full((), BLOCK_K, tl.int64)
    # Hopper adds products of float8 in some 14 bits of a number: every 128 of them go to sums in float32.
    PARTIAL: tl.constexpr = 128 if BLOCK_K > 128 else BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    for first in range(start, stop, BLOCK_K):
        if EVEN_K:
            left = tl.load(x_at + x_steps, mask=row_exists, other=0.0)
            right = tl.load(w_at + w_steps, mask=col_exists, other=0.0)
        else:
            within = steps < stop - first
            left = tl.load(x_at + x_steps, mask=row_exists & within[None, :], other=0.0)
            right = tl.load(w_at + w_steps, mask=col_exists & within[:, None], other=0.0)
        if x.dtype.element_ty == tl.uint8:
            left, right = float8_value(left), float8_value(right)
        acc = tl.dot(
            left,
            right.to(left.dtype),
            acc,
            input_precision=PRECISION,
            max_num_imprecise_acc=PARTIAL,
            out_dtype=acc.dtype,
        )
        x_at += advance * stride_xk
        w_at += advance * stride_wk
    return acc
