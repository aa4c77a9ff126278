"""Matrix multiplication: x w^T over a batch, with an epilogue of the caller's.

A code generator copies this file's functions and replaces the lines between `# hook:` and `# end`: the parameters and
the epilogue of `matmul_kernel`, `matmul_descriptor_kernel` and `matmul_combine_kernel`, the same text in all of them.
The lines of an epilogue read

    batch, outer, inner     int64 scalars: the flat index in the batch [P, Q], and that on P and on Q
    rows, cols              int64 [BLOCK_M, 1] and [1, BLOCK_N]: indices in M and in N
    inside                  bool [BLOCK_M, BLOCK_N]: which of them exist
    acc                     float32 or int32 [BLOCK_M, BLOCK_N]: the sums over K

Sums are float32, or int32 where x is int8.
"""

import torch
import triton
import triton.language as tl

from .launch import arch_of


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The flat index in the batch, the first row and the first column of this program's tile.

    The first axis of the grid walks over the tiles of one matrix, then over the batch. GROUP_M rows of tiles are walked
    down before the next column, so that programs that run together read few rows of x and w, from the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
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
    multiple of BLOCK_K; so is `stop` if EVEN_K. A w of another dtype than x is cast to that of x.
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    for first in range(start, stop, BLOCK_K):
        if EVEN_K:
            left = tl.load(x_at + x_steps, mask=row_exists, other=0)
            right = tl.load(w_at + w_steps, mask=col_exists, other=0)
        else:
            within = steps < stop - first
            left = tl.load(x_at + x_steps, mask=row_exists & within[None, :], other=0)
            right = tl.load(w_at + w_steps, mask=col_exists & within[:, None], other=0)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        x_at += advance * stride_xk
        w_at += advance * stride_wk
    return acc


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
    batch, first_row, first_col = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
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
    M x N). Neither addresses nor masks take registers, and one thread asks for a whole block.
    """
    batch, first_row, first_col = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    outer, inner = batch // Q, batch % Q
    rows = (first_row.to(tl.int64) + tl.arange(0, BLOCK_M))[:, None]
    cols = (first_col.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x.dtype == tl.int8 else tl.float32)
    for first in range(0, K, BLOCK_K):
        left = x.load([first_row, first])
        right = w.load([first_col, first])
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION, out_dtype=acc.dtype)
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
    batch, first_row, first_col = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
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
    batch, first_row, first_col = tile_of(M, N, BLOCK_M, BLOCK_N, 1)
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
        x: float16, bfloat16, float32 or int8, of any strides: nothing is copied where two strides walk over the batch.
        w: of x's dtype, or of one that is cast to it.
        out: where to write; by default a new tensor of x's dtype, int32 for int8.
        bias: [N], contiguous.
        extra: the arguments of a generated epilogue, in place of `bias` and `out`. Its `inner` is the index on the last
            axis of the batch, `outer` the flat index on the others.
        config: one of `matmul_configs`; by default its best guess.
        precision: of float32, "ieee", "tf32" (10 bits of each factor) or "tf32x3" (nearly all of them).
        kernels: generated ones in place of `matmul_kernel`, `matmul_combine_kernel` and, but it may be left out,
            `matmul_descriptor_kernel`, with the epilogue of `extra`.
        sums: how many of a tile's sums a thread may keep: fewer where an epilogue needs registers of its own.

    Returns:
        `out`, or None if a generated epilogue writes the results.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x {list(x.shape)} and w {list(w.shape)} must end in axes of one size")
    (M, K), N = x.shape[-2:], w.shape[-2]
    batch = x.shape[:-2] if w.dim() == 2 else torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    exact = x.dtype == torch.int8
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        raise ValueError(f"x must be float16, bfloat16, float32 or int8, found {x.dtype}")
    if exact and w.dtype != torch.int8:
        raise ValueError(f"w must be int8 as x is, found {w.dtype}")
    if out is None and not extra:
        out = torch.empty(*batch, M, N, dtype=torch.int32 if exact else x.dtype, device=x.device)
    count = batch.numel()
    if count * M * N == 0:
        return out
    matrices = [x, w] if extra else [x, w, out]
    if count == 1:
        inner, strides = 1, [(0, 0, *matrix.stride()[-2:]) for matrix in matrices]
    else:
        inner, strides, matrices = batch_strides(batch, matrices, fixed=bool(extra))
    x, w = matrices[:2]
    target = None if extra else matrices[2]
    precision = dot_precision(precision, x.dtype, w.dtype, x.device)
    whole, combine, *described = kernels or (matmul_kernel, matmul_combine_kernel, matmul_descriptor_kernel)
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
    if config["TMA"] and described and tma_takes(x, w):
        from triton.tools.tensor_descriptor import TensorDescriptor

        left = TensorDescriptor(x, [M, K], list(x.stride()[-2:]), [block_m, block_k])
        right = TensorDescriptor(w, [N, K], list(w.stride()[-2:]), [block_n, block_k])
        described[0][(tiles,)](left, right, *hooks, *sizes, **constants)
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


FIRST_CONFIGS = {}  # what `first_config` found, by its arguments


def first_config(M, N, K, dtype, device, batch, precision, tma, sums):
    """The best guess of `matmul_configs` for a device, remembered; as for sm_80 where there is no GPU."""
    key = (M, N, K, dtype, device, batch, precision, tma, sums)
    if key not in FIRST_CONFIGS:
        if len(FIRST_CONFIGS) >= 4096:  # lengths may grow without end
            FIRST_CONFIGS.clear()
        FIRST_CONFIGS[key] = matmul_configs(M, N, K, dtype, arch_of(device), batch, precision, tma, sums)[0]
    return FIRST_CONFIGS[key]


def dot_precision(precision, dtype, weight_dtype, device):
    """What to ask of tl.dot for x of one dtype and a weight of another, which the kernel casts to that of x.

    On sm_100 Triton takes tf32 for "ieee" where an operand is made of narrower numbers (its issue 10176), as if the
    other operand were of so few bits too: there it is "tf32x3", which has nearly all of float32.
    """
    wrong = precision == "ieee" and dtype == torch.float32 != weight_dtype and 100 <= arch_of(device) < 120
    return "tf32x3" if wrong else precision


def tma_takes(x, w):
    """Whether TMA can load blocks of x [M, K] and w [N, K], or of batches of one: rows contiguous, 16 bytes aligned."""
    if x.dtype != w.dtype:
        return False
    size = x.element_size()
    for matrix in (x, w):
        rows, columns = matrix.shape[-2:]
        step, one = matrix.stride()[-2:]
        if one != 1 or step <= 0 or step * size % 16 or matrix.data_ptr() % 16:
            return False
        if not matrix.numel() == rows * columns > 0:
            return False
    return True


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


def matmul_configs(M, N, K, dtype, arch, batch=1, precision="ieee", tma=False, sums=128):
    """Configurations of `matmul` for x [batch, M, K] and w [batch, N, K] on sm_`arch`, the best guess first.

    A configuration is a dict: BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT (parts of K, combined by a second kernel), TMA
    (only where `tma` says that `tma_takes` x and w), num_warps and num_stages. None asks for more shared memory or
    registers than there are. They are ordered by a model of the time: the tiles that the busiest multiprocessor
    computes, what it loads for them, and what all of them load. A thread keeps at most `sums` sums.
    """
    size = torch.empty((), dtype=dtype, device="meta").element_size()
    scalar = dtype == torch.float32 and precision == "ieee"  # no tensor cores
    # wgmma and tcgen05 read their operands from shared memory; Triton has no tcgen05 for integers before 3.9.
    from_shared = not scalar and 90 <= arch < 120 and (arch < 100 or size > 1)
    unaligned = K * size % 16 != 0
    # By the oldest architecture that has it: multiprocessors, bytes of shared memory, and in a microsecond the bytes
    # from memory, the bytes of one multiprocessor from the L2 cache, its products in 16 bits and in plain float32.
    machines = {
        80: (108, 163 * 1024, 1.9e6, 4.5e4, 1.4e6, 0.9e5),
        86: (84, 99 * 1024, 0.9e6, 3e4, 0.9e6, 2e5),
        90: (132, 227 * 1024, 4e6, 5.5e4, 3.7e6, 2.5e5),
        100: (148, 227 * 1024, 7.5e6, 6e4, 7.6e6, 2.5e5),
        120: (170, 99 * 1024, 1.7e6, 3e4, 1.2e6, 3e5),
    }
    processors, shared, memory_rate, cache_rate, tensor_rate, scalar_rate = machines[
        max((known for known in machines if known <= arch), default=80)
    ]
    rate = scalar_rate if scalar else tensor_rate * (2 / size) / (3 if precision == "tf32x3" else 1)
    # BLOCK_M, BLOCK_N, bytes of BLOCK_K, warps, stages, part of the rate that is reached
    tiles = (
        [(16, 64, 128, 4, 3, 0.3), (32, 64, 64, 4, 3, 0.6), (64, 64, 64, 4, 3, 0.8), (64, 128, 64, 8, 3, 0.9)]
        if scalar
        else [
            (16, 32, 64, 4, 4, 0.05),
            (16, 32, 256, 4, 4, 0.1),
            (16, 64, 256, 4, 4, 0.15),
            (16, 128, 128, 4, 4, 0.2),
            (32, 64, 128, 4, 4, 0.25),
            (32, 128, 128, 4, 4, 0.35),
            (64, 64, 32, 4, 4, 0.3),
            (64, 64, 64, 4, 4, 0.4),
            (64, 64, 128, 4, 4, 0.5),
            (64, 128, 128, 4, 4, 0.65),
            (128, 64, 128, 4, 4, 0.65),
            (64, 256, 128, 8, 3, 0.7),
            (128, 128, 64, 8, 4, 0.75),
            (128, 128, 128, 8, 3, 0.8),
            (128, 128, 128, 4, 4, 0.85),
            (128, 256, 64, 8, 4, 0.95),
            (128, 256, 128, 8, 3, 1.0),
        ]
    )
    found = []
    for block_m, block_n, depth, warps, stages, reached in tiles:
        block_k = depth // size
        if block_k < (32 if size == 1 else 16):  # what tl.dot takes
            continue
        if max(stages * (block_m + block_n) * block_k * size, block_m * block_n * 4) > shared:
            continue
        # Half of a thread's 255 registers may be sums by default; where operands are there too, of a lesser depth.
        if block_m * block_n * (1 if from_shared else depth / 64) > sums * 32 * warps:
            continue
        # Rows that are not aligned are loaded an element at a time, each with its address; others suit wide blocks.
        if unaligned:
            if block_m * block_n + 2 * (block_m + block_n) * block_k > 80 * 32 * warps:
                continue
        elif depth < (128 if from_shared else 64):
            continue
        # More than half of such a tile would be outside, and there is a smaller one.
        if (block_m > 16 and block_m >= 2 * M) or (block_n > 64 and block_n >= 2 * N):
            continue
        count = -(-M // block_m) * -(-N // block_n) * batch
        for split in (1, 2, 4, 8, 16):
            # Parts are for tiles too few to go round; tiles of half the size come first.
            if split > 1 and (
                count * split > 2 * processors or 4 * split * block_k > K or block_m * block_n > 64 * 32 * warps
            ):
                break
            busiest = -(-count * split // processors) / split
            products = busiest * block_m * block_n * K / (rate * reached)
            loads = busiest * (min(block_m, M) + min(block_n, N)) * K * size / cache_rate
            bytes_moved = batch * ((M + N) * K + M * N) * size + (split > 1) * 8 * split * batch * M * N
            time = max(products, loads, bytes_moved / memory_rate) + busiest * split + (3 if split > 1 else 0)
            names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SPLIT", "TMA", "num_warps", "num_stages")
            for described in (True, False) if tma and split == 1 and arch >= 90 and not scalar else (False,):
                values = (block_m, block_n, block_k, 8, split, described, warps, stages)
                found.append((time, dict(zip(names, values, strict=True))))
    found.sort(key=lambda pair: pair[0])
    return [config for _, config in found]
