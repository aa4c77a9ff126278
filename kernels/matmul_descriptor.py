"""Matmul kernels whose blocks are loaded by TMA (sm_90 and later): for matrices of contiguous, aligned rows.

Neither addresses nor masks take registers, and one thread asks for a whole block. Their hooks are those of `matmul`;
between `# hook: before` and `# end` stands what an epilogue needs once for all tiles.
"""

import triton
import triton.language as tl

from .matmul_tiles import tile_of


@triton.jit
def matmul_descriptor_kernel(
    x,
    w,
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
    Q,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`matmul_kernel` where P = Q = 1 and blocks are loaded by TMA (sm_90 and later).

    x and w are descriptors of [M, K] and [N, K], in blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]. Grid: (tiles of
    M x N).
    """
    batch, first_row, first_col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    outer, inner = batch // Q, batch % Q
    rows = (first_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None]
    cols = (first_col.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]
    PARTIAL: tl.constexpr = 128 if BLOCK_K > 128 else BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x.dtype == tl.int8 else tl.float32)
    for first in range(0, K, BLOCK_K):
        left = x.load([first_row, first])
        right = w.load([first_col, first])
        acc = tl.dot(
            left,
            tl.trans(right),
            acc,
            input_precision=PRECISION,
            max_num_imprecise_acc=PARTIAL,
            out_dtype=acc.dtype,
        )
    inside = (rows < M) & (cols < N)
    # hook: epilogue (batch, outer, inner, rows, cols, inside, acc)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0).to(acc.dtype)
    out_at = out + outer * stride_op + inner * stride_oq + rows * stride_om + cols * stride_on
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
    # end


@triton.jit
def matmul_persistent_kernel(
    x,
    w,
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
    Q,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`matmul_descriptor_kernel` by as many programs as there are multiprocessors, which go over the tiles.

    Grid: (programs). While a program stores a tile, the blocks of its next one are on their way.
    """
    # hook: before
    # end
    PARTIAL: tl.constexpr = 128 if BLOCK_K > 128 else BLOCK_K
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        batch, first_row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        outer, inner = batch // Q, batch % Q
        rows = (first_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None]
        cols = (first_col.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x.dtype == tl.int8 else tl.float32)
        for first in range(0, K, BLOCK_K):
            left = x.load([first_row, first])
            right = w.load([first_col, first])
            acc = tl.dot(
                left,
                tl.trans(right),
                acc,
                input_precision=PRECISION,
                max_num_imprecise_acc=PARTIAL,
                out_dtype=acc.dtype,
            )
        inside = (rows < M) & (cols < N)
        # hook: epilogue (batch, outer, inner, rows, cols, inside, acc)
        if bias is not None:
            acc += tl.load(bias + cols, mask=cols < N, other=0).to(acc.dtype)
        out_at = out + outer * stride_op + inner * stride_oq + rows * stride_om + cols * stride_on
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
        # end
