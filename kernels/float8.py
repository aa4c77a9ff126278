"""Numbers of float8_e4m3 as bytes, on any architecture: Triton has the format from sm_89 on only.

A byte is a sign, four bits of exponent and three of fraction; 0x7f and 0xff are NaN, and there is no infinity. Moved
into the places of a float16 they are the same number, but for the exponents' bias: 256 times smaller.
"""

import triton
import triton.language as tl

from .elementwise import float8_e4m3


@triton.jit
def float8_value(stored):
    """The float16 numbers that bytes (uint8) are, exactly; those of a dtype that is one of numbers are as they are."""
    if stored.dtype == tl.uint8:
        wide = stored.to(tl.uint16)
        number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        found = tl.where((wide & 0x7F) == 0x7F, float("nan"), number).to(tl.float16)
    else:
        found = stored.to(tl.float16)
    return found


@triton.jit
def float8_bits(x):
    """The bytes of the numbers nearest to x, ties to even, within -448..448, as PyTorch casts since 2.13."""
    wide = x.to(tl.float32)
    kept = tl.abs(float8_e4m3(wide))
    bits = kept.to(tl.int32, bitcast=True)
    # From 2^-6 on the exponent's bias is 120 less, and 20 bits of the fraction are zero; below, steps are of 2^-9.
    code = tl.where(kept < 0.015625, (kept * 512.0).to(tl.int32), (bits >> 20) - 960)
    code = tl.where(wide == wide, code, 0x7F)
    sign = (wide.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
