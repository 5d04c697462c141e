# SPDX-License-Identifier: Apache-2.0
"""The twin of csrc/math/math.h: exp and expm1 by the same polynomial, comparisons by which a NaN stays.

float32 takes the decisions of the C++, operation by operation, fused multiply-adds where it has them. float64 takes Triton's
exp, and a series near 0.
"""

import triton
import triton.language as tl


@triton.jit
def constant(x, dtype: tl.constexpr):
    """A kernel's float64 argument in the dtype of the arithmetic."""
    return tl.full((), x, dtype)


@triton.jit
def clamped(x, low, high):
    """torch.clamp: a NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def minimum(a, b):
    """torch.minimum: NaN if either is."""
    return tl.where(a != a, a, tl.where(a < b, a, b))


@triton.jit
def maximum(a, b):
    """torch.maximum: NaN if either is."""
    return tl.where(a != a, a, tl.where(a > b, a, b))


# ---- exp ------------------------------------------------------------------------------------------------------------
@triton.jit
def power_from(shifted):
    """2^n for a whole n in [-126, 127], from 1.5 * 2^23 + n + 127: n + 127 moves from the mantissa into the exponent."""
    return (shifted.to(tl.uint32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reduce_bounded(x, SHIFT: tl.constexpr):
    """x = n ln 2 + r with |r| <= ln(2) / 2 and exp(r) = 1 + r + r^2 p: r, r^2, p, n, 2^(n + SHIFT)."""
    magic = 12582912.0 + 127.0 + SHIFT  # 1.5 * 2^23 and more: adding it rounds to an integer
    shifted = tl.fma(x, 1.44269504, magic)
    n = shifted - magic
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    square = r * r
    low = tl.fma(r, 1.66666672e-1, 0.5)
    mid = tl.fma(r, 8.33324529e-3, 4.16665301e-2)
    high = tl.fma(r, 1.99087823e-4, 1.3928744e-3)
    return r, square, tl.fma(tl.fma(high, square, mid), square, low), n, power_from(shifted)


@triton.jit
def scale_by_power(x, n):
    """x * 2^n in two steps: n leaves the exponent's range at both ends."""
    half = tl.fma(n, 0.5, 12582912.0) - 12582912.0
    return x * power_from(half + 12583039.0) * power_from((n - half) + 12583039.0)


@triton.jit
def series(x):
    """exp(x) - 1 - x for |x| <= 0.5 in float64: Taylor to x^17."""
    p = x * (1 / 355687428096000) + 1 / 20922789888000
    p = p * x + 1 / 1307674368000
    p = p * x + 1 / 87178291200
    p = p * x + 1 / 6227020800
    p = p * x + 1 / 479001600
    p = p * x + 1 / 39916800
    p = p * x + 1 / 3628800
    p = p * x + 1 / 362880
    p = p * x + 1 / 40320
    p = p * x + 1 / 5040
    p = p * x + 1 / 720
    p = p * x + 1 / 120
    p = p * x + 1 / 24
    p = p * x + 1 / 6
    return x * x * (p * x + 0.5)


@triton.jit
def exp_of(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        r, square, p, n, _power = reduce_bounded(clamped(x, -104.0, 89.0), 0)
        return scale_by_power(1.0 + tl.fma(square, p, r), n)


@triton.jit
def exp_bounded(x):
    """exp(x) for |x| <= 86: the power of two is a normal number."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        r, square, p, _n, power = reduce_bounded(x, 0)
        return tl.fma(power, tl.fma(square, p, r), power)


@triton.jit
def expm1_bounded(x):
    """exp(x) - 1 for |x| <= 86."""
    if x.dtype == tl.float64:
        return expm1_of(x)
    else:
        r, square, p, _n, power = reduce_bounded(x, 0)
        return tl.fma(power, tl.fma(square, p, r), power - 1.0)


@triton.jit
def expm1_of(x):
    """exp(x) - 1 = 2 (h near + h - 1/2) with h = 2^(n - 1), which does not overflow where 2^n does. Below -86 it is -1."""
    if x.dtype == tl.float64:
        return tl.where(tl.abs(x) < 0.5, x + series(x), tl.exp(x) - 1.0)
    else:
        r, square, p, _n, power = reduce_bounded(clamped(x, -86.0, 89.0), -1)
        half = tl.fma(power, tl.fma(square, p, r), power - 0.5)
        return half + half


@triton.jit
def exp_minus_1_minus_bounded(x):
    """exp(x) - 1 - x for |x| <= 86, without the cancellation at 0: for n = 0 all but the polynomial's tail is exactly 0."""
    if x.dtype == tl.float64:
        return exp_minus_1_minus(x)
    else:
        r, square, p, _n, power = reduce_bounded(x, 0)
        return tl.fma(power, square * p, tl.fma(power, r, (power - 1.0) - x))


@triton.jit
def exp_minus_1_minus(x):
    """The same for every x, infinite at both infinities."""
    if x.dtype == tl.float64:
        far = tl.where(x > 1.7e308, x, (tl.exp(x) - 1.0) - x)
        return tl.where(tl.abs(x) < 0.5, series(x), far)
    else:
        r, square, p, _n, power = reduce_bounded(clamped(x, -86.0, 89.0), -1)
        linear = tl.fma(tl.where(x > 89.0, 89.0, x), -0.5, power - 0.5)
        half = tl.fma(power, square * p, tl.fma(power, r, linear))
        return half + half


# ---- log ------------------------------------------------------------------------------------------------------------
@triton.jit
def log_of(x):
    """-infinity at 0, NaN below. A subnormal number is scaled first."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        tiny = x < 1.17549435e-38
        bits = tl.where(tiny, x * 8388608.0, x).to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23  # m in [sqrt(1/2), sqrt(2))
        n = tl.where(tiny, e.to(tl.float32) - 23.0, e.to(tl.float32))
        f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
        square = f * f
        p01, p23 = tl.fma(f, -0.25000838, 0.333333312), tl.fma(f, -0.166227649, 0.200012927)
        p45, p67 = tl.fma(f, -0.131641864, 0.141996959), tl.fma(f, -0.0764610149, 0.127791136)
        p = tl.fma(tl.fma(p67, square, p45), square * square, tl.fma(p23, square, p01))
        tail = tl.fma(f * square, p, -0.5 * square)
        tail = tl.fma(n, -2.12194440e-4, tail)
        found = tl.fma(n, 0.693359375, f + tail)
        special = tl.where(x == 0, float("-inf"), tl.where(x == float("inf"), x, float("nan")))
        return tl.where((x > 0) & (x < float("inf")), found, special)
