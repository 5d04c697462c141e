# SPDX-License-Identifier: Apache-2.0
"""The twin of csrc/math/whiten.h and csrc/cpu/moments.h, in float64: moments (count, mean, m2), how two merge, what they make
of a value and of its gradient; and how a block of tokens becomes moments. The fields of a struct come one by one.

A mask's values are weights, which may be negative. So a block is held as five sums about a center, which join without a
division by a sum of weights: (weight, center, count, first, second) = sum |w|, c, sum w, sum w (v - c), sum w (v - c)^2. The
center is the mean by |w|: two passes over what registers hold, and of equal weights Chan's merge.
"""

import triton
import triton.language as tl

from rlkern.kernels import launch, math


@triton.jit
def merge(count, mean, m2, o_count, o_mean, o_m2):
    """Chan, Golub and LeVeque (1979). An empty side changes nothing, not even by its NaN-free zero mean."""
    n, d = count + o_count, o_mean - mean
    part = o_count / tl.where(n == 0, 1.0, n)
    empty, first = o_count == 0, count == 0
    merged_mean = tl.where(first, o_mean, mean + d * part)
    merged_m2 = tl.where(first, o_m2, m2 + (o_m2 + d * d * (count * part)))
    return n, tl.where(empty, mean, merged_mean), tl.where(empty, m2, merged_m2)


@triton.jit
def over_at_least_one(count, mean, m2):
    """Moments about sum / max(count, 1)."""
    few, lower = count < 1, mean * count
    d = mean - lower
    return tl.where(few, 1.0, count), tl.where(few, lower, mean), tl.where(few, m2 + count * d * d, m2)


@triton.jit
def degrees(count, UNBIASED: tl.constexpr):
    return count - 1.0 if UNBIASED else count


@triton.jit
def variance(count, mean, m2, UNBIASED: tl.constexpr):
    """No count, no variance: NaN, also where count - 1 would divide."""
    return m2 / tl.where(count == 0, 0.0, degrees(count, UNBIASED))


@triton.jit
def reciprocal_std(count, mean, m2, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr, eps):
    if SCALE:
        var = variance(count, mean, m2, UNBIASED)
        return 1.0 / tl.sqrt(tl.where(var < eps, eps, var) if FLOOR else var + eps)
    else:
        return tl.full((), 1, tl.float64)


@triton.jit
def reciprocal_std_grad(count, mean, m2, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr, eps):
    """d rstd / d var; clamp's gradient is 1 on the closed interval."""
    if SCALE:
        rstd = reciprocal_std(count, mean, m2, UNBIASED, FLOOR, SCALE, eps)
        slope = -0.5 * rstd * rstd * rstd
        return tl.where(variance(count, mean, m2, UNBIASED) < eps, 0.0, slope) if FLOOR else slope
    else:
        return tl.full((), 0, tl.float64)


@triton.jit
def halves(mean, A: tl.constexpr):
    """A mean in two parts of the arithmetic type: in float32, v - mean loses the digits that a large mean rounds away."""
    high = mean.to(A)
    return high, (mean - high.to(tl.float64)).to(A)


@triton.jit
def whiten_scale(mean, rstd, SHIFT_MEAN: tl.constexpr, A: tl.constexpr):
    """(high, low, rstd, add): what `whitened` wants."""
    high, low = halves(mean, A)
    return high, low, rstd.to(A), tl.full((), 0, A) if SHIFT_MEAN else mean.to(A)


@triton.jit
def whitened(v, high, low, rstd, add):
    return tl.fma((v - high) - low, rstd, add)


@triton.jit
def whiten_grad(
    count, mean, m2, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SHIFT_MEAN: tl.constexpr, SCALE: tl.constexpr, eps,
    AT_LEAST_ONE: tl.constexpr, sum, product,
):  # fmt: skip
    """(direct, level, slope, d_mean, d_m2): d_v = direct * G + weight * (level + slope * (v - mean)).

    From sum(G) and sum(G (v - mean)), which pass nothing where they are 0, also where 1 / std is NaN: a row without a valid
    element. Moments as counted.
    """
    counted, counted_mean = count, mean
    if AT_LEAST_ONE:
        count, mean, m2 = over_at_least_one(count, mean, m2)
    rstd = reciprocal_std(count, mean, m2, UNBIASED, FLOOR, SCALE, eps)
    d_var = tl.where(product == 0, 0.0, reciprocal_std_grad(count, mean, m2, UNBIASED, FLOOR, SCALE, eps) * product)
    residual = counted * (counted_mean - mean)  # sum(w (v - mean)): 0 unless the count was raised to 1
    d_mean = tl.where(sum == 0, 0.0, (-rstd if SHIFT_MEAN else 1.0 - rstd) * sum)
    d_m2 = tl.where(d_var == 0, 0.0, d_var / degrees(count, UNBIASED))
    return rstd, (d_mean - 2.0 * d_m2 * residual) / count, 2.0 * d_m2, d_mean, d_m2


@triton.jit
def reduced(KIND: tl.constexpr, count, sum, m2, UNBIASED: tl.constexpr):
    """verl adds 1e-8 to the count that it divides by, in float32, where it shows only if the count is 0: a mean of nothing
    is 0."""
    n = tl.where(count == 0, math.constant(1e-8, tl.float64), count)
    if KIND == "sum":
        return sum
    elif KIND == "mean":
        return sum / n
    elif UNBIASED:
        return variance(count, sum, m2, True)
    else:
        return m2 / n


# ---- blocks of tokens -----------------------------------------------------------------------------------------------
@triton.jit
def widened(x, A: tl.constexpr):
    """In the arithmetic type; the interpreter takes bfloat16 no further than float32 at once."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(A)


@triton.jit
def loaded(x, stride, row, first, inside, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """The block in the arithmetic type."""
    return widened(launch.load(x, stride, row, first, inside, INNER, ALIGNED), A)


@triton.jit
def weights_of(mask, stride, row, first, inside, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """The weights of a block, 0 where there is no token."""
    if mask is None:
        return tl.where(inside, tl.full((), 1, A), 0.0)
    else:
        w = widened(launch.load(mask, stride, row, first, inside, INNER, ALIGNED), A)
        return tl.where(inside, w, 0.0) if INNER == 0 else w


@triton.jit
def sums_of(v, w, SIGNED: tl.constexpr):
    """Of a block."""
    v = tl.where(w != 0, widened(v, tl.float64), 0.0)
    count = tl.sum(w, 0)
    size, weight = w, count
    if SIGNED:
        size = tl.abs(w)
        weight = tl.sum(size, 0)
    center = tl.sum(size * v, 0) / tl.where(weight == 0, 1.0, weight)
    d = tl.where(w != 0, v - center, 0.0)
    return weight, center, count, tl.sum(w * d, 0), tl.sum(w * d * d, 0)


@triton.jit
def moved(count, first, second, by):
    """first and second about a center that lies lower by `by`."""
    return first + count * by, second + by * (2.0 * first + count * by)


@triton.jit
def joined(weight, center, count, first, second, o_weight, o_center, o_count, o_first, o_second):
    """Chan's merge. An empty side changes nothing."""
    n = weight + o_weight
    between = center + (o_center - center) * (o_weight / tl.where(n == 0, 1.0, n))
    between = tl.where(o_weight == 0, center, tl.where(weight == 0, o_center, between))
    first, second = moved(count, first, second, center - between)
    o_first, o_second = moved(o_count, o_first, o_second, o_center - between)
    return n, between, count + o_count, first + o_first, second + o_second


@triton.jit
def moments_from(weight, center, count, first, second):
    """(count, mean, m2). Where the weights cancel, the mean is 0 by definition."""
    some = count != 0
    mean = center + first / tl.where(some, count, 1.0)
    m2 = second - first * (mean - center)
    m2 = tl.where((m2 < 0) & (count == weight), 0.0, m2)  # rounding; negative weights may mean it, and a NaN stays
    return count, tl.where(some, mean, 0.0), tl.where(some, m2, second + 2.0 * center * first)


@triton.jit
def merged(parts, n, BLOCK: tl.constexpr):
    """The moments of n parts (moments.py stores them): two passes over the parts."""
    i = tl.arange(0, BLOCK)
    weight = tl.load(parts + i * 5, mask=i < n, other=0)
    center = tl.load(parts + i * 5 + 1, mask=i < n, other=0)
    count = tl.load(parts + i * 5 + 2, mask=i < n, other=0)
    first = tl.load(parts + i * 5 + 3, mask=i < n, other=0)
    second = tl.load(parts + i * 5 + 4, mask=i < n, other=0)
    whole = tl.sum(weight, 0)
    middle = tl.sum(weight * center, 0) / tl.where(whole == 0, 1.0, whole)
    first, second = moved(count, first, second, tl.where(weight == 0, 0.0, center - middle))
    return moments_from(whole, middle, tl.sum(count, 0), tl.sum(first, 0), tl.sum(second, 0))


@triton.jit
def store_numbers(x, N: tl.constexpr, a, b, c, d, e):
    """The first N in one access."""
    i = tl.arange(0, 8)
    number = tl.where(i == 0, a, tl.where(i == 1, b, tl.where(i == 2, c, tl.where(i == 3, d, e))))
    tl.store(x + i, number, mask=i < N)


@triton.jit
def store_moments(moments, row, count, mean, m2):
    store_numbers(moments + row * 3, 3, count, mean, m2, m2, m2)


@triton.jit
def load_moments(moments, row):
    return tl.load(moments + row * 3), tl.load(moments + row * 3 + 1), tl.load(moments + row * 3 + 2)


# ---- gradients ------------------------------------------------------------------------------------------------------
@triton.jit
def grad_sums(g, v, w, center, MASKED: tl.constexpr):
    """sum(G) and sum(G (v - mean)) of a block. A NaN that G does not ask about stays where it is."""
    if MASKED and w is not None:
        g = tl.where(w != 0, g, 0.0)
    return tl.sum(g, 0), tl.sum(g * tl.where(g != 0, v - center, 0.0), 0)


@triton.jit
def gradient(direct, level, slope, high, low, g, v, w, MASKED: tl.constexpr):
    """direct * G + weight * (level + slope * (v - mean)): every gradient of whitening and of reductions. G, v and w (the mask,
    as it came) may be absent; v is read by a slope other than 0. MASKED: 0 where the weight is, for there `direct` may be NaN."""
    d = level
    if v is not None:
        d = tl.where(slope == 0, level, tl.fma(slope, (v - high) - low, level))
    if w is not None:
        d = tl.where((level != 0) | (slope != 0), tl.where(w != 0, widened(w, level.dtype) * d, 0.0), 0.0)
    if g is not None:
        d = tl.fma(direct, g, d)
    if MASKED and w is not None:
        d = tl.where(w != 0, d, 0.0)
    return d
