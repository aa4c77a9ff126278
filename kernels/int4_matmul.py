"""Linear layers whose weight alone is quantized: 4 bits, two integers a byte, or 8 bits, with scales for groups.

The weight becomes numbers of the input's dtype in registers, a tile at a time: what is read from memory is a quarter or
half of a float16 weight. Each tile of rows expands it again; for many rows it is expanded once, in memory, and `matmul`
multiplies that. A code generator copies this file's functions and replaces the lines between `# hook:` and
`# end`, as those of `matmul`; batch, outer and inner are 0 here.
"""

import torch
import triton
import triton.language as tl

from .launch import arch_of
from .matmul import linear_rows, matmul, matmul_combine_kernel
from .matmul_configs import dot_precision


@triton.jit
def spread_over_tile(
    numbers,
    cols,
    first,
    N,
    K,
    stride_n,
    stride_g,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """numbers[col, k // GROUP] for k in first..first + BLOCK_K, in float32: [BLOCK_N, BLOCK_K], or [BLOCK_N, 1].

    numbers [N, G], of any strides. GROUP and BLOCK_K are powers of two, first a multiple of BLOCK_K.
    """
    if GROUP >= BLOCK_K:
        at = cols * stride_n + (first // GROUP) * stride_g
        found = tl.load(numbers + at, mask=cols < N, other=0).to(tl.float32)[:, None]
    else:
        groups = first // GROUP + tl.arange(0, BLOCK_K // GROUP)
        at = cols[:, None] * stride_n + groups[None, :] * stride_g
        inside = (cols < N)[:, None] & (groups * GROUP < K)[None, :]
        of_groups = tl.load(numbers + at, mask=inside, other=0).to(tl.float32)
        spread = tl.broadcast_to(of_groups[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP))
        found = tl.reshape(spread, (BLOCK_N, BLOCK_K))
    return found


@triton.jit
def expanded_tile(
    stored,
    scale,
    zero_point,
    col,
    first,
    N,
    K,
    stride_sn,
    stride_sg,
    stride_zn,
    stride_zg,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The numbers that a tile of a weight stands for, k from `first` on: [BLOCK_N, BLOCK_K], in the scale's dtype."""
    if PACKED:
        halves = tl.join(stored & 15, stored >> 4)
        integers = tl.reshape(halves, (BLOCK_N, BLOCK_K)).to(tl.float32) - 8.0
    else:
        integers = stored.to(tl.float32)
    if zero_point is not None:
        integers -= spread_over_tile(zero_point, col, first, N, K, stride_zn, stride_zg, GROUP, BLOCK_N, BLOCK_K)
    factor = spread_over_tile(scale, col, first, N, K, stride_sn, stride_sg, GROUP, BLOCK_N, BLOCK_K)
    return (integers * factor).to(scale.dtype.element_ty)


@triton.jit
def int4_sums(
    x,
    w,
    scale,
    zero_point,
    row,
    col,
    begin,
    end,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_sn,
    stride_sg,
    stride_zn,
    stride_zg,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over k in begin..end of x[row, k] (w[col, k] - zero_point[col, k // GROUP]) scale[col, k // GROUP].

    begin is a multiple of BLOCK_K, and so is end, or it is K. Float32 [BLOCK_M, BLOCK_N].
    """
    steps = tl.arange(0, BLOCK_K)
    BYTES: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    places = tl.arange(0, BYTES)
    x_at = x + row[None, :] * stride_xm + (begin + steps)[:, None].to(tl.int64) * stride_xk
    w_at = w + col[:, None] * stride_wn + (begin // (2 if PACKED else 1) + places)[None, :]
    row_exists = (row < M)[None, :]
    col_exists = (col < N)[:, None]
    advance = tl.full((), BLOCK_K, tl.int64)
    # The product is w x^T: the weight, made in registers, is the operand that tensor cores take from registers.
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        if EVEN_K:
            right = tl.load(x_at, mask=row_exists, other=0)
            stored = tl.load(w_at, mask=col_exists, other=0)
        else:
            # Beyond K, x is 0, and the weight whatever number it is.
            right = tl.load(x_at, mask=row_exists & (steps < K - first)[:, None], other=0)
            left_of_row = (K - first + 1) // 2 if PACKED else K - first
            stored = tl.load(w_at, mask=col_exists & (places < left_of_row)[None, :], other=0)
        numbers = expanded_tile(
            stored, scale, zero_point, col, first, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
            GROUP, PACKED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sums = tl.dot(numbers.to(x.dtype.element_ty), right, sums, input_precision=PRECISION, out_dtype=tl.float32)
        x_at += advance * stride_xk
        w_at += BYTES
    return tl.trans(sums)


@triton.jit
def int4_matmul_kernel(
    x,
    w,
    scale,
    zero_point,
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
    stride_wn,
    stride_sn,
    stride_sg,
    stride_zn,
    stride_zg,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = sum over k of x[m, k] (w[n, k] - zero_point[n, k // GROUP]) scale[n, k // GROUP] + bias[n].

    x [M, K] and out [M, N] of any strides; w int8 [N, K], or if PACKED uint8 [N, ceil(K / 2)], each byte the integers
    of an even k (lower half) and the next, each plus 8, rows contiguous; scale float [N, G] and zero_point int8 [N, G]
    or None; bias [N], contiguous, or None. Grid: (tiles of M x N), those of the same columns together, so that they
    find the weight in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = int4_sums(
        x, w, scale, zero_point, row, col, 0, K, M, N, K, stride_xm, stride_xk, stride_wn, stride_sn, stride_sg,
        stride_zn, stride_zg, GROUP, PACKED, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
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


@triton.jit
def int4_split_kernel(
    x,
    w,
    scale,
    zero_point,
    partials,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_sn,
    stride_sg,
    stride_zn,
    stride_zg,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials[s, m, n] = the sum of `int4_matmul_kernel` over the s-th part of K.

    Few rows are few tiles, each of which takes as long as its weight takes to be expanded. partials float32
    [SPLIT, M, N], contiguous. Grid: (tiles of M x N, SPLIT).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    begin = tl.minimum(part * share, K)
    acc = int4_sums(
        x, w, scale, zero_point, row, col, begin, tl.minimum(begin + share, K), M, N, K, stride_xm, stride_xk,
        stride_wn, stride_sn, stride_sg, stride_zn, stride_zg, GROUP, PACKED, PRECISION, EVEN_K, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    rows = row[:, None]
    cols = col[None, :]
    tl.store(partials + (part.to(tl.int64) * M + rows) * N + cols, acc, mask=(rows < M) & (cols < N))


@triton.jit
def int4_expand_kernel(
    w,
    scale,
    zero_point,
    out,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_sg,
    stride_zn,
    stride_zg,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, k] = (w[n, k] - zero_point[n, k // GROUP]) scale[n, k // GROUP]: the weight of `int4_matmul_kernel`.

    out [N, K], contiguous. Grid: (tiles of N, tiles of K).
    """
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    BYTES: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    places = first // (2 if PACKED else 1) + tl.arange(0, BYTES)
    width = (K + 1) // 2 if PACKED else K
    exists = (col < N)[:, None]
    stored = tl.load(w + col[:, None] * stride_wn + places[None, :], mask=exists & (places < width)[None, :], other=0)
    numbers = expanded_tile(
        stored, scale, zero_point, col, first, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
        GROUP, PACKED, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    k = first + tl.arange(0, BLOCK_K)
    tl.store(out + col[:, None] * K + k[None, :], numbers.to(out.dtype.element_ty), mask=exists & (k < K)[None, :])


def int4_expanded(w, scale, zero_point, K, dtype):
    """The weight of `int4_matmul` as numbers of a dtype, [N, K]."""
    N = w.shape[0]
    out = torch.empty(N, K, dtype=dtype, device=w.device)
    block_n, block_k = 16, 128
    int4_expand_kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k))](
        w, scale, zero_point, out, N, K, w.stride(0), *scale.stride(),
        *((0, 0) if zero_point is None else zero_point.stride()),
        GROUP=group_size(K, scale.shape[-1]), PACKED=w.dtype == torch.uint8, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def group_size(K, groups):
    """How many neighbours have one of so many scales: the least power of two for which they suffice."""
    return 1 << (-(-K // groups) - 1).bit_length() if K else 1


# With more rows the weight is expanded in memory. An estimate, from 0.41 ms that an H100 took for 4096 rows and a
# weight of 4096 x 4096, 0.18 ms for the same with a dense one, and what it takes to read and write the weight.
MANY_ROWS = 256


def int4_matmul(
    x, w, scale, zero_point=None, out=None, bias=None, extra=(), config=None, precision="ieee", kernels=None
):
    """x ((w - zero_point) scale)^T + bias for x [..., K]: [..., N].

    Args:
        x: float16, bfloat16 or float32; its rows are a view where one stride walks over them.
        w: uint8 [N, ceil(K / 2)], two integers of 4 bits a byte, the lower half first, each plus 8; or int8 [N, K].
        scale: float [N, G], each of a group of neighbours in K, of the least power of two for which G suffice.
        zero_point: int8 [N, G] or None for 0.
        out: where to write, contiguous [..., N]; by default a new tensor of x's dtype.
        bias: [N], contiguous.
        extra: the arguments of a generated epilogue, in place of `bias` and `out`.
        config: one of `int4_configs`; by default its best guess, or for more than MANY_ROWS rows `matmul`.
        precision: of float32, as that of `matmul`.
        kernels: generated ones in place of `int4_matmul_kernel` and of those of `matmul`, with the epilogue of `extra`.

    Returns:
        `out`, or None if a generated epilogue writes the results.
    """
    packed = w.dtype == torch.uint8
    K, N = x.shape[-1], w.shape[0]
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be float16, bfloat16 or float32, found {x.dtype}")
    if w.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"w must be uint8 (two integers a byte) or int8, found {w.dtype}")
    if w.shape[1] != (-(-K // 2) if packed else K):
        raise ValueError(f"w {w.dtype} {list(w.shape)} does not fit x {list(x.shape)}")
    if out is None and not extra:
        out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    M = x.shape[:-1].numel()
    if M * N == 0:
        return out
    if w.stride(1) != 1:
        w = w.contiguous()
    kernel, *whole = kernels or (int4_matmul_kernel,)
    if config is None and M > MANY_ROWS:
        target = None if out is None else out.view(1, 1, M, N)
        weight = int4_expanded(w, scale, zero_point, K, x.dtype)
        matmul(linear_rows(x), weight, target, bias, extra, precision=precision, kernels=whole or None)
        return out
    rows = x.reshape(M, K)
    if config is None:
        config = int4_configs(M, N, K, x.dtype, arch_of(x.device))[0]
    hooks = extra or (bias, out, 0, 0, N, 1)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    strides = (
        *rows.stride(), w.stride(0), *scale.stride(), *((0, 0) if zero_point is None else zero_point.stride()),
    )  # fmt: skip
    constants = {
        "GROUP": group_size(K, scale.shape[-1]), "PACKED": packed,
        "PRECISION": dot_precision(precision, x.dtype, w.dtype, x.device), "EVEN_K": K % config["BLOCK_K"] == 0,
        "enable_fp_fusion": True, **config,
    }  # fmt: skip
    split = constants.pop("SPLIT", 1)
    if split == 1:
        kernel[(tiles,)](rows, w, scale, zero_point, *hooks, M, N, K, *strides, **constants)
        return out
    partials = torch.empty(split, M, N, dtype=torch.float32, device=x.device)
    int4_split_kernel[(tiles, split)](
        rows, w, scale, zero_point, partials, M, N, K, *strides, SPLIT=split, **constants
    )  # fmt: skip
    combine = whole[1] if whole else matmul_combine_kernel
    tall, wide = (16, 64) if M > 4 else (4, 128)
    combine[(triton.cdiv(M, tall) * triton.cdiv(N, wide),)](
        partials, *hooks, M, N, 1, M * N, SPLIT=split, BLOCK_M=tall, BLOCK_N=wide, enable_fp_fusion=True
    )
    return out


def int4_configs(M, N, K, dtype, arch):
    """Configurations of `int4_matmul` for x [M, K] and w [N, K] on sm_`arch`, the best guess first.

    A configuration is a dict: BLOCK_M, BLOCK_N, BLOCK_K, SPLIT (parts of K, combined by a second kernel), num_warps
    and num_stages. Those in parts come last: they were not measured yet.
    """
    shared = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}.get(arch, 99) * 1024
    size = torch.empty((), dtype=dtype, device="meta").element_size()
    # Few rows: the weight is read at the speed of memory if there are many programs, each with much on its way.
    # BLOCK_M, BLOCK_N, BLOCK_K of 16 bits, warps, stages
    few = [(16, 16, 256, 4, 5), (16, 32, 256, 4, 5), (16, 64, 128, 4, 5), (16, 128, 128, 4, 4)]
    some = [(32, 64, 128, 4, 4), (32, 128, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 64, 4, 4)]
    many = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3)]
    if M <= 16:
        # The widest of those that still give each multiprocessor two programs, then the others.
        order = sorted(few, key=lambda tile: (triton.cdiv(N, tile[1]) < 256, -tile[1] if N >= 16 * 256 else tile[1]))
    else:
        order = some + few[2:] if M <= 64 else many + some
    parted = [(16, 64, 128, 4, 4), (16, 128, 128, 4, 3), (16, 32, 256, 4, 4)] if M <= 16 else some[:1] + some[2:3]
    found = []
    for place, (block_m, block_n, depth, warps, stages) in enumerate(order + (parted if M <= 64 else [])):
        block_k, split = depth * 2 // size, 1
        tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
        if place >= len(order):  # four programs for each of some 132 multiprocessors, each with two steps or more
            while split < 16 and tiles * split * 2 <= 4 * 132 and 4 * split * block_k <= K:
                split *= 2
            if split == 1:
                continue
        if stages * block_k * (block_m * size + block_n) <= shared:
            names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages")
            found.append(dict(zip(names, (block_m, block_n, block_k, split, warps, stages), strict=True)))
    return found
