"""Linear layers whose weight alone is of float8_e4m3, with a scale for each output channel.

The weight becomes numbers of the input's dtype in registers, exactly, a tile at a time, and the scale multiplies the
sums: what is read from memory is half of a float16 weight. A code generator copies this file's functions and replaces
the lines between `# hook:` and `# end`, as those of `matmul`; batch, outer and inner are 0 here.
"""

import torch
import triton
import triton.language as tl

from .float8 import float8_value
from .int4_matmul import int4_configs
from .launch import arch_of
from .matmul_configs import dot_precision


@triton.jit
def float8_matmul_kernel(
    x,
    w,
    scale,
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
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = scale[n] * sum over k of x[m, k] w[n, k] + bias[n].

    x [M, K] and out [M, N] of any strides; w float8_e4m3, or where there is no such dtype its bytes (uint8), [N, K],
    rows contiguous; scale float [N] and bias [N], contiguous, bias or None. Grid: (tiles of M x N), those of the same
    columns together, so that they find the weight in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    tile_m = tl.program_id(0) % tiles_m
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    x_at = x + row[None, :] * stride_xm + steps[:, None].to(tl.int64) * stride_xk
    w_at = w + col[:, None] * stride_wn + steps[None, :]
    row_exists = (row < M)[None, :]
    col_exists = (col < N)[:, None]
    advance = tl.full((), BLOCK_K, tl.int64)
    # The product is w x^T: the weight, made in registers, is the operand that tensor cores take from registers.
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            right = tl.load(x_at, mask=row_exists, other=0.0)
            stored = tl.load(w_at, mask=col_exists, other=0.0)
        else:
            right = tl.load(x_at, mask=row_exists & (steps < K - first)[:, None], other=0.0)
            stored = tl.load(w_at, mask=col_exists & (steps < K - first)[None, :], other=0.0)
        left = float8_value(stored).to(x.dtype.element_ty)
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=tl.float32)
        x_at += advance * stride_xk
        w_at += BLOCK_K
    rows = row[:, None]
    cols = col[None, :]
    acc = tl.trans(sums) * tl.load(scale + cols, mask=cols < N, other=0.0).to(tl.float32)
    batch = tl.full((), 0, tl.int64)
    outer, inner = batch, batch
    inside = (rows < M) & (cols < N)
    # hook: epilogue (batch, outer, inner, rows, cols, inside, acc)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(acc.dtype)
    at = outer * stride_op + inner * stride_oq + rows * stride_om + cols * stride_on
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    # end


def float8_matmul(x, w, scale, out=None, bias=None, extra=(), config=None, precision="ieee", kernels=None):
    """scale x w^T + bias for x [..., K] and w of float8_e4m3 [N, K]: [..., N].

    Args:
        x: float16, bfloat16 or float32; its rows are a view where one stride walks over them.
        w: float8_e4m3fn [N, K].
        scale: float [N], contiguous.
        out: where to write, contiguous [..., N]; by default a new tensor of x's dtype.
        bias: [N], contiguous.
        extra: the arguments of a generated epilogue, in place of `bias` and `out`.
        config: one of `float8_configs`; by default its best guess.
        precision: of float32, as that of `matmul`.
        kernels: a generated one in place of `float8_matmul_kernel`, with the epilogue of `extra`.

    Returns:
        `out`, or None if a generated epilogue writes the results.
    """
    K, N = x.shape[-1], w.shape[0]
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be float16, bfloat16 or float32, found {x.dtype}")
    if w.dtype != torch.float8_e4m3fn or w.shape[1] != K:
        raise ValueError(f"w must be float8_e4m3fn [{N}, {K}] for x {list(x.shape)}, found {w.dtype} {list(w.shape)}")
    if out is None and not extra:
        out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    M = x.shape[:-1].numel()
    if M * N == 0:
        return out
    rows, arch = x.reshape(M, K), arch_of(x.device)
    w = w if w.stride(1) == 1 else w.contiguous()
    w = w if arch >= 89 else w.view(torch.uint8)
    if config is None:
        config = float8_configs(M, N, K, x.dtype, arch)[0]
    hooks = extra or (bias, out, 0, 0, N, 1)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    (kernel,) = kernels or (float8_matmul_kernel,)
    kernel[(tiles,)](
        rows, w, scale, *hooks, M, N, K, *rows.stride(), w.stride(0),
        PRECISION=dot_precision(precision, x.dtype, w.dtype, x.device),
        EVEN_K=K % config["BLOCK_K"] == 0, enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out


def float8_configs(M, N, K, dtype, arch):
    """Configurations of `float8_matmul`, the best guess first: those of `int4_matmul`, which unpacks its weight, too.

    Rows that are not aligned are loaded a byte at a time, each with its address: wide blocks would not fit registers.
    """
    size = torch.empty((), dtype=dtype, device="meta").element_size()
    return [
        {name: value for name, value in config.items() if name != "SPLIT"}
        for config in int4_configs(M, N, K, dtype, arch)
        if config["SPLIT"] == 1 and (K % 16 == 0 or config["BLOCK_N"] * config["BLOCK_K"] * size <= 16384)
    ]
