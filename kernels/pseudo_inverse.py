"""Pseudo-inverses of small matrices of probabilities (Razavi et al., 2014), as Nystromformer needs one for each head.

One launch for the twenty-four products of six steps. What they multiply lies in memory that is the program's own and
small enough for the first cache: in registers, of which a product of fp32 takes all for its operands, it would spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = 64  # rows and columns: four such matrices are 64 KB


# fmt: off
@triton.jit
def pseudo_inverse_kernel(
    matrix, scratch, out, matrix_stride_p, matrix_stride_i, matrix_stride_j, size,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):
    # fmt: on
    """One program: one matrix of matrix [P, m, m], of any strides; m is size. out [P, m, m], and scratch
    [P, 4, BLOCK, BLOCK] in fp32, are contiguous.

    Rows and columns beyond m are zeros, and stay so: there the identity is zero too. Products are fp32, in steps of
    STEP. Grid: (P).
    """
    which = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (i < size) & (j < size)
    place = i * BLOCK + j
    given = scratch + which * (4 * BLOCK * BLOCK)
    found = given + BLOCK * BLOCK
    product = found + BLOCK * BLOCK
    inner = product + BLOCK * BLOCK
    matrix += which * matrix_stride_p
    values = tl.load(matrix + i * matrix_stride_i + j * matrix_stride_j, mask=inside, other=0.0).to(tl.float32)
    identity = tl.where((i == j) & inside, 1.0, 0.0)
    tl.store(given + place, values)
    tl.store(found + j * BLOCK + i, values / tl.max(tl.sum(values, 0), 0))
    tl.debug_barrier()
    for _ in tl.range(0, ITERATIONS):
        values = multiply(given, found, BLOCK, STEP)
        tl.store(product + place, values)
        tl.store(inner + place, 7.0 * identity - values)
        tl.debug_barrier()
        values = 15.0 * identity - multiply(product, inner, BLOCK, STEP)
        tl.debug_barrier()
        tl.store(inner + place, values)
        tl.debug_barrier()
        values = 13.0 * identity - multiply(product, inner, BLOCK, STEP)
        tl.debug_barrier()
        tl.store(inner + place, values)
        tl.debug_barrier()
        values = 0.25 * multiply(found, inner, BLOCK, STEP)
        tl.debug_barrier()
        tl.store(found + place, values)
        tl.debug_barrier()
    values = tl.load(found + place)
    tl.store(out + which * size * size + i * size + j, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def multiply(left, right, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The product of two matrices [BLOCK, BLOCK] in memory."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in tl.range(0, BLOCK, STEP):
        inner = k + tl.arange(0, STEP)
        rows, columns = tl.load(left + i * BLOCK + inner[None, :]), tl.load(right + inner[:, None] * BLOCK + j)
        sums = tl.dot(rows, columns, sums, input_precision="ieee")
    return sums


def pseudo_inverse(matrix: torch.Tensor, iterations: int = 6) -> torch.Tensor:
    """What the operator fxpress::pseudo_inverse defines, of matrices [..., m, m], fp32 or half, m <= LARGEST.

    Raises:
        ValueError: m is larger.
    """
    size = matrix.shape[-1]
    if size > LARGEST:
        raise ValueError(f"matrices of at most {LARGEST} rows are inverted by one program each, found {size}")
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    if out.numel() == 0:
        return out
    given = matrix.reshape(-1, size, size)
    block = max(16, triton.next_power_of_2(size))
    scratch = torch.empty((given.shape[0], 4, block, block), dtype=torch.float32, device=matrix.device)
    pseudo_inverse_kernel[(given.shape[0],)](
        given, scratch, out, *given.stride(), size,
        ITERATIONS=iterations, BLOCK=block, STEP=16, num_warps=8 if block == 64 else 4, num_stages=2,
    )  # fmt: skip
    return out
