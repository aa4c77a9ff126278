"""Functions of one number that Triton itself lacks, or has only on the GPU; each keeps NaN and infinity where PyTorch
has them. They take tiles of any shape, in fp32 or fp64, and are called by generated kernels."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x): near 0, where 1 - exp(-2 x) would lose digits, by its series (error below 1e-9 of it)."""
    size = tl.abs(x)
    below = tl.exp(-2.0 * size)
    far = (1.0 - below) / (1.0 + below)
    square = x * x
    series = 1.0 + square * (
        -0.3333333333333333
        + square
        * (
            0.13333333333333333
            + square * (-0.05396825396825397 + square * (0.021869488536155203 - square * 0.008863235529902197))
        )
    )
    return tl.where(size < 0.25, x * series, tl.where(x < 0, -far, far))


@triton.jit
def float8_e4m3_or_nan(x):
    """As `float8_e4m3`, but NaN for what is too large: how PyTorch casts before 2.13."""
    return tl.where(tl.abs(x) > 464.0, float("nan"), float8_e4m3(x))


@triton.jit
def gelu_to_half(x):
    """x Phi(x), with an error of 1e-6 at most, for what half precision rounds next; fewer instructions than erf.

    Log2 Phi(-a) is close to a polynomial: this one, fitted on 0..7, gives Phi(-a) to 5e-6 of it up to 4.5, and 0 far
    out, where its first coefficient has the last word.
    """
    a = tl.abs(x)
    power = -0.45860319516242964 + a * (
        -0.053798429247523816
        + a
        * (
            0.00841483700500138
            + a * (-0.0009026582932537032 + a * (5.7446479798034973e-05 - a * 1.5920806581045263e-06))
        )
    )
    below = tl.exp2(-1.0 + a * (-1.1512012102049567 + a * power))
    return x * tl.where(x < 0, below, 1.0 - below)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """exp(x) - 1 without loss near 0 (Kahan)."""
    whole = tl.exp(x)
    less = whole - 1.0
    close = less * x / tl.where(whole == 1.0, 1.0, tl.log(whole))
    near = tl.where(whole == 1.0, x, close)
    return tl.where(tl.abs(x) < 1.0, near, less)


@triton.jit
def log1p(x):
    """log(1 + x) without loss near 0 (Kahan)."""
    whole = 1.0 + x
    near = tl.log(whole) * x / tl.where(whole == 1.0, 1.0, whole - 1.0)
    return tl.where(whole == 1.0, x, tl.where(tl.abs(x) < 1.0, near, tl.log(whole)))


@triton.jit
def round_even(x):
    """The nearest whole number, halves to even: a sum with 2^23 (2^52 in fp64) has no room for a fraction."""
    if x.dtype == tl.float64:
        edge = tl.full([1, 1], 4503599627370496.0, tl.float64)
    else:
        edge = tl.full([1, 1], 8388608.0, tl.float32)
    shift = tl.where(x < 0, -edge, edge)
    return tl.where(tl.abs(x) < edge, (x + shift) - shift, x)


@triton.jit
def truncate(x):
    """The whole number towards 0."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def power(x, y):
    """x ** y as C has it, in fp64, since an error of log x is multiplied by y."""
    base, exponent = x.to(tl.float64), y.to(tl.float64)
    size = tl.abs(base)
    found = tl.exp(tl.where(size == 1.0, 0.0, exponent * tl.log(size)))  # 1 to the infinite is 1, too
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(exponent * 0.5) * 2.0 != exponent)
    negative = base.to(tl.int64, bitcast=True) < 0  # -0.0, too
    found = tl.where(negative & odd, found * -1.0, found)  # Triton's -found is 0 - found, which has no -0.0
    found = tl.where((base < 0) & (size < float("inf")) & ~whole, float("nan"), found)
    return tl.where((exponent == 0) | (base == 1.0), 1.0, found).to(x.dtype)


@triton.jit
def floor_divide(x, y):
    """floor(x / y) of integers, whichever way the machine rounds."""
    quotient = x // y
    rest = x - quotient * y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def fmod(x, y):
    """The rest of x / y with the sign of x, as C has it: exact, whatever two numbers of fp32 are given.

    A long division in fp64, 28 bits of the quotient at a time: these times the 24 of y are exact. The largest number of
    fp32 has its smallest 2^277 times in it.
    """
    rest, step = tl.broadcast(tl.abs(x).to(tl.float64), tl.abs(y).to(tl.float64))
    step = tl.where(step == float("inf"), 1.6069380442589903e60, step)  # 2^200: more than any x, as infinity is
    step = step * 7.237005577332262e75  # 2^252
    for _ in range(10):
        rest = rest - tl.floor(rest / step) * step
        step = step * 3.725290298461914e-09  # 2^-28
    signed = tl.where(x < 0, -rest, rest)
    return tl.where(rest == 0, x * 0.0, signed.to(x.dtype))


@triton.jit
def floor_mod(x, y):
    """The rest of x / y with the sign of y, of fp32."""
    rest = fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def floor_quotient(x, y):
    """floor(x / y) of fp32 as Python and PyTorch define it, by the rest, since x / y may be rounded up to a whole
    number: NaN for infinite x, -1 for x / -infinity, x > 0."""
    rest = fmod(x, y)
    whole = tl.div_rn(x - rest, y)
    whole = tl.where((rest != 0) & ((rest < 0) != (y < 0)), whole - 1.0, whole)
    below = tl.floor(whole)
    found = tl.where(whole - below > 0.5, below + 1.0, below)
    return tl.where(y == 0, x / y, tl.where(whole == 0, x / y * 0.0, found))


@triton.jit
def truncate_divide(x, y):
    """x / y of integers, rounded towards 0."""
    quotient = x // y
    rest = x - quotient * y
    return tl.where((rest != 0) & ((rest < 0) != (x < 0)), quotient + 1, quotient)


@triton.jit
def greater(x, y):
    """The larger; NaN where one is."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def smaller(x, y):
    """The smaller; NaN where one is."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def float8_e4m3(x):
    """The number of float8_e4m3 nearest to x, ties to even, within -448..448; computed in fp32.

    A sum with 1.5 * 2^20 times the power of two in x has room for three bits of fraction, so it need not be an
    architecture that has the format.
    """
    kept = x.to(tl.float32)
    kept = tl.where(tl.abs(kept) < 448.0, kept, tl.where(kept == kept, tl.where(kept < 0, -448.0, 448.0), kept))
    exponent = kept.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.where(exponent > 0x3C800000, exponent, 0x3C800000)  # 2^-6: from there on down steps stay 2^-9
    edge = exponent.to(tl.float32, bitcast=True) * 1572864.0
    found = ((kept + edge) - edge).to(tl.int32, bitcast=True) | (kept.to(tl.int32, bitcast=True) & -0x80000000)
    return found.to(tl.float32, bitcast=True).to(x.dtype)  # what becomes 0 keeps its sign, too
