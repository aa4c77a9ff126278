"""Small kernels that tests compile ahead of time."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, out, size, stride, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    """out[i] = x[i * stride]; x and out of `size` elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at * stride, mask=at < size)
    tl.store(out + at, values * 2 if TWICE else values, mask=at < size)


@triton.jit
def centre_kernel(x, out, BLOCK: tl.constexpr):
    """out = x - sum(x) of one block: all of it is in registers until the sum is known."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(out + at, values - tl.sum(values, 0))


@triton.jit
def product_kernel(x, y, out, K, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """out = x y for x [BLOCK, K] and y [K, BLOCK], contiguous; K a multiple of DEPTH."""
    rows = tl.arange(0, BLOCK)
    steps = tl.arange(0, DEPTH)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        left = tl.load(x + rows[:, None] * K + (start + steps)[None, :])
        right = tl.load(y + (start + steps)[:, None] * BLOCK + rows[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], acc)


@triton.jit
def block_kernel(x, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [ROWS, BLOCK] = the first block of x, a descriptor; out contiguous."""
    block = x.load([0, 0])
    tl.store(out + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], block)
