"""Matrix multiplication: x w^T over a batch, with an epilogue of the caller's.

A code generator copies this file's functions and replaces the lines between `# hook:` and `# end`: the parameters and
the epilogue of `matmul_kernel`, `matmul_combine_kernel` and those of matmul_descriptor.py, the same text in each.
The lines of an epilogue read

    batch, outer, inner     int64 scalars: the flat index in the batch [P, Q], and that on P and on Q
    rows, cols              int64 [BLOCK_M, 1] and [1, BLOCK_N]: indices in M and in N
    inside                  bool [BLOCK_M, BLOCK_N]: which of them exist
    acc                     float32 or int32 [BLOCK_M, BLOCK_N]: the sums over K

Sums are float32, or int32 where x is int8. Numbers of float8_e4m3 are multiplied as such from sm_89 on; elsewhere they
come as bytes and become float16, exactly.
"""

import torch
import triton
import triton.language as tl

from .launch import arch_of
from .matmul_configs import dot_precision, first_config, tma_takes
from .matmul_descriptor import matmul_descriptor_kernel, matmul_persistent_kernel
from .matmul_tiles import sums_of_products, tile_of


@triton.jit
def matmul_kernel(
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
    stride_xp,
    stride_xq,
    stride_xm,
    stride_xk,
    stride_wp,
    stride_wq,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[p, q, m, n] = sum over k of x[p, q, m, k] w[p, q, n, k] + bias[n].

    x [P, Q, M, K], w [P, Q, N, K] and out [P, Q, M, N] of any strides; bias [N], contiguous, or None. Grid:
    (tiles of M x N times P Q). PRECISION is what tl.dot may do to float32: "ieee", "tf32" or "tf32x3"; EVEN_K says that
    BLOCK_K divides K.
    """
    batch, first_row, first_col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    outer, inner = batch // Q, batch % Q
    rows = (first_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None]
    cols = (first_col.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]
    acc = sums_of_products(
        x + outer * stride_xp + inner * stride_xq,
        w + outer * stride_wp + inner * stride_wq,
        rows,
        cols,
        0,
        K,
        M,
        N,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        PRECISION,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    inside = (rows < M) & (cols < N)
    # hook: epilogue (batch, outer, inner, rows, cols, inside, acc)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0).to(acc.dtype)
    out_at = out + outer * stride_op + inner * stride_oq + rows * stride_om + cols * stride_on
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
    # end


@triton.jit
def matmul_split_kernel(
    x,
    w,
    partials,
    M,
    N,
    K,
    Q,
    stride_xp,
    stride_xq,
    stride_xm,
    stride_xk,
    stride_wp,
    stride_wq,
    stride_wn,
    stride_wk,
    stride_split,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """partials[s, p, q, m, n] = sum over the s-th part of K of x[p, q, m, k] w[p, q, n, k].

    x [P, Q, M, K] and w [P, Q, N, K] of any strides; partials float32 (int32 for int8) [SPLIT, P, Q, M, N], contiguous,
    `stride_split` = P Q M N. Grid: (tiles of M x N times P Q, SPLIT). For few rows: one tile of x w^T would leave most
    of the GPU idle.
    """
    batch, first_row, first_col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    outer, inner = batch // Q, batch % Q
    rows = (first_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None]
    cols = (first_col.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]
    split = tl.program_id(1)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    start = split * part
    acc = sums_of_products(
        x + outer * stride_xp + inner * stride_xq,
        w + outer * stride_wp + inner * stride_wq,
        rows,
        cols,
        start,
        tl.minimum(start + part, K),
        M,
        N,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        PRECISION,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    part_at = partials + split.to(tl.int64) * stride_split + batch * M * N + rows * N + cols
    tl.store(part_at, acc, mask=(rows < M) & (cols < N))


@triton.jit
def matmul_combine_kernel(
    partials,
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
    Q,
    stride_split,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[p, q, m, n] = sum over s of partials[s, p, q, m, n] + bias[n], always in the same order.

    partials float32 or int32 [SPLIT, P, Q, M, N], contiguous, `stride_split` = P Q M N; out [P, Q, M, N] of any
    strides; bias [N], contiguous, or None. Grid: (tiles of M x N times P Q).
    """
    batch, first_row, first_col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, 1)
    outer, inner = batch // Q, batch % Q
    rows = (first_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None]
    cols = (first_col.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < M) & (cols < N)
    part_at = partials + (batch * M + rows) * N + cols
    acc = tl.load(part_at, mask=inside, other=0)
    for _ in range(1, SPLIT):
        part_at += stride_split
        acc += tl.load(part_at, mask=inside, other=0)
    # hook: epilogue (batch, outer, inner, rows, cols, inside, acc)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0).to(acc.dtype)
    out_at = out + outer * stride_op + inner * stride_oq + rows * stride_om + cols * stride_on
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
    # end


def matmul(x, w, out=None, bias=None, extra=(), config=None, precision="ieee", kernels=None, sums=128):
    """x w^T + bias for x [..., M, K] and w [..., N, K], whose leading axes broadcast to a batch: [..., M, N].

    Args:
        x: float16, bfloat16, float32, int8 or float8_e4m3fn, of any strides: nothing is copied where two strides walk
            over the batch.
        w: of x's dtype, or of one that is cast to it.
        out: where to write; by default a new tensor of x's dtype, int32 for int8 and float32 for float8_e4m3fn.
        bias: [N], contiguous.
        extra: the arguments of a generated epilogue, in place of `bias` and `out`. Its `inner` is the index on the last
            axis of the batch, `outer` the flat index on the others.
        config: one of `matmul_configs`; by default its best guess.
        precision: of float32, "ieee", "tf32" (10 bits of each factor) or "tf32x3" (nearly all of them).
        kernels: generated ones in place of `matmul_kernel`, `matmul_combine_kernel` and, but they may be left out,
            `matmul_descriptor_kernel` and `matmul_persistent_kernel`, with the epilogue of `extra`.
        sums: how many of a tile's sums a thread may keep: fewer where an epilogue needs registers of its own.

    Returns:
        `out`, or None if a generated epilogue writes the results.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x {list(x.shape)} and w {list(w.shape)} must end in axes of one size")
    (M, K), N = x.shape[-2:], w.shape[-2]
    batch = x.shape[:-2] if w.dim() == 2 else torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    exact, eight = x.dtype == torch.int8, x.dtype == torch.float8_e4m3fn
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"x must be float16, bfloat16, float32, int8 or float8_e4m3fn, found {x.dtype}")
    if (exact or eight) and w.dtype != x.dtype:
        raise ValueError(f"w must be {str(x.dtype).removeprefix('torch.')} as x is, found {w.dtype}")
    if out is None and not extra:
        made = torch.int32 if exact else torch.float32 if eight else x.dtype
        out = torch.empty(*batch, M, N, dtype=made, device=x.device)
    count = batch.numel()
    if count * M * N == 0:
        return out
    matrices = [x, w] if extra else [x, w, out]
    if count == 1:
        inner, strides = 1, [(0, 0, *matrix.stride()[-2:]) for matrix in matrices]
    else:
        inner, strides, matrices = batch_strides(batch, matrices, fixed=bool(extra))
    x, w = matrices[:2]
    if eight and arch_of(x.device) < 89:
        x, w = x.view(torch.uint8), w.view(torch.uint8)
    target = None if extra else matrices[2]
    precision = dot_precision(precision, x.dtype, w.dtype, x.device)
    whole, combine, *described = kernels or (
        matmul_kernel,
        matmul_combine_kernel,
        matmul_descriptor_kernel,
        matmul_persistent_kernel,
    )
    if config is None:
        config = first_config(M, N, K, x.dtype, x.device, count, precision, bool(described) and tma_takes(x, w), sums)
    block_m, block_n, block_k, split = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"], config["SPLIT"]
    hooks = extra or (bias, target, *strides[2])
    sizes = (M, N, K, inner)
    constants = {
        "PRECISION": precision, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "GROUP_M": config["GROUP_M"], "num_warps": config["num_warps"], "num_stages": config["num_stages"],
        "enable_fp_fusion": True,
    }  # fmt: skip
    tiles = -(-M // block_m) * -(-N // block_n) * count
    even = K % block_k == 0
    if config["TMA"] and described and x.dtype != torch.uint8 and tma_takes(x, w):
        from triton.tools.tensor_descriptor import TensorDescriptor

        left = TensorDescriptor(x, [M, K], list(x.stride()[-2:]), [block_m, block_k])
        right = TensorDescriptor(w, [N, K], list(w.stride()[-2:]), [block_n, block_k])
        programs = config["PROGRAMS"] if len(described) > 1 else 0
        kernel = described[1 if programs else 0]
        kernel[(min(tiles, programs or tiles),)](left, right, *hooks, *sizes, **constants)
    elif split == 1:
        whole[(tiles,)](x, w, *hooks, *sizes, *strides[0], *strides[1], EVEN_K=even, **constants)
    else:
        part = torch.int32 if exact else torch.float32
        partials = torch.empty(split, count, M, N, dtype=part, device=x.device)
        step = count * M * N
        matmul_split_kernel[(tiles, split)](
            x, w, partials, *sizes, *strides[0], *strides[1], step, SPLIT=split, EVEN_K=even, **constants
        )
        block_m, block_n = (16, 64) if M > 4 else (4, 128)
        tiles = -(-M // block_m) * -(-N // block_n) * count
        combine[(tiles,)](
            partials, *hooks, M, N, inner, step, SPLIT=split, BLOCK_M=block_m, BLOCK_N=block_n, enable_fp_fusion=True
        )
    if target is not out:
        out.copy_(target)
    return out


def linear_rows(x):
    """x [..., K] as [1, 1, M, K], M the product of the other sizes: a view, unless no stride walks over them."""
    return x.reshape(1, 1, x.shape[:-1].numel(), x.shape[-1])


def batch_strides(batch, matrices, fixed=False):
    """The size Q of a batch [P, Q], the strides on [P, Q, rows, columns] of each matrix, and the matrices.

    `matrices` are [..., rows, columns]; their leading axes broadcast to `batch`. Q is the product of the last axes of
    the batch, of one if `fixed`, else of as many as it takes for two strides to walk over the batch. A matrix whose
    strides do not is copied.
    """
    spread = []
    for matrix in matrices:
        missing = len(batch) + 2 - matrix.dim()
        sizes = (1,) * missing + tuple(matrix.shape[:-2])
        steps = (0,) * missing + matrix.stride()[:-2]
        spread.append([step if size == whole else 0 for whole, size, step in zip(batch, sizes, steps, strict=True)])

    def walked(steps, first, last):
        """The one stride that walks over axes first..last of the batch, or None."""
        stride, expected = 0, None
        for axis in range(last - 1, first - 1, -1):
            if batch[axis] == 1:
                continue
            if expected is None:
                stride = steps[axis]
            elif steps[axis] != expected:
                return None
            expected = steps[axis] * batch[axis]
        return stride

    def found_at(cut):
        return [(walked(steps, 0, cut), walked(steps, cut, len(batch))) for steps in spread]

    last = max(len(batch) - 1, 0)
    cuts = [last] if fixed else range(last, -1, -1)
    cut = next((cut for cut in cuts if all(None not in pair for pair in found_at(cut))), last)
    inner = batch[cut:].numel()
    strides, copies = [], []
    for matrix, pair in zip(matrices, found_at(cut), strict=True):
        if None in pair:
            matrix = matrix.expand(*batch, *matrix.shape[-2:]).clone(memory_format=torch.contiguous_format)
            step = matrix.shape[-2] * matrix.shape[-1]
            pair = (inner * step, step)
        strides.append((*pair, *matrix.stride()[-2:]))
        copies.append(matrix)
    return inner, strides, copies
