# SPDX-License-Identifier: Apache-2.0
"""The twin of csrc/math/group.h, in float64: a group as (count, shift, mean, baseline, m2, weight), mean and baseline as distances
from shift, its first score; and how a program walks one."""

import triton
import triton.language as tl

from rlkern.kernels import moments_math

_NAN = tl.constexpr(float("nan"))


@triton.jit
def group_variance(count, m2, UNBIASED: tl.constexpr):
    return m2 / (count - 1.0 if UNBIASED else count)


@triton.jit
def mean_of(count, shift, mean, SINGLETON: tl.constexpr):
    whole = shift + mean
    return tl.where(count <= 1, 0.0, whole) if SINGLETON == "raw" else whole


@triton.jit
def std_of(count, m2, UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, eps):
    """eps is the floor of the variance."""
    var = group_variance(count, m2, UNBIASED)
    return tl.where(count <= 1, _NAN if SINGLETON == "nan" else 1.0, tl.sqrt(tl.where(var < eps, eps, var)))


@triton.jit
def std_slope(count, m2, UNBIASED: tl.constexpr, floor):
    """d std / d score is the deviation times this: 0 at no spread, below the floor, and in a group of one."""
    var = group_variance(count, m2, UNBIASED)
    root = (count - 1.0 if UNBIASED else count) * tl.sqrt(var)
    return tl.where((count <= 1) | (var == 0) | (var < floor), 0.0, 1.0 / root)


@triton.jit
def stretch_of(count, BASELINE: tl.constexpr):
    if BASELINE == "leave_one_out":
        return tl.where(count <= 1, 1.0, count / (count - 1.0))
    else:
        return tl.full((), 1, tl.float64)


@triton.jit
def inverse_scale(count, m2, SCALE: tl.constexpr, UNBIASED: tl.constexpr, eps):
    if SCALE:
        return 1.0 / (tl.where(count <= 1, 1.0, tl.sqrt(group_variance(count, m2, UNBIASED))) + eps)
    else:
        return tl.full((), 1, tl.float64)


@triton.jit
def group_scale(
    count, shift, baseline, m2, BASELINE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, eps, SINGLETON: tl.constexpr
):
    """(shift, baseline, factor): a score becomes ((s - shift) - baseline) * factor."""
    alone = count <= 1
    factor = inverse_scale(count, m2, SCALE, UNBIASED, eps) * stretch_of(count, BASELINE)
    if SINGLETON != "raw":
        factor = tl.where(alone, 0.0 if SINGLETON == "zero" else _NAN, factor)
    return tl.where(alone, 0.0, shift), tl.where(alone, 0.0, baseline), factor


# ---- one group ------------------------------------------------------------------------------------------------------
@triton.jit
def rows_at(order, first, last, BLOCK: tl.constexpr):
    """The rows of a group's block at `first`, and which of them exist."""
    i = first + tl.arange(0, BLOCK)
    return tl.load(order + i, mask=i < last, other=0), i < last


@triton.jit
def numbers(x, stride, rows, there):
    """One number a row, 0 where there is no row."""
    return moments_math.widened(tl.load(x + rows * stride, mask=there, other=0), tl.float64)


@triton.jit
def there_of(scores, scores_stride, rows, inside, OMIT: tl.constexpr):
    """A block's scores, and which of its rows count."""
    s = numbers(scores, scores_stride, rows, inside)
    if OMIT:
        inside = inside & (s == s)
    return s, inside


@triton.jit
def first_of(scores, scores_stride, order, first, last, OMIT: tl.constexpr, BLOCK: tl.constexpr):
    """The group's first score that counts; 0 without one."""
    if OMIT:
        at, i = last, first
        while i < last:
            rows, inside = rows_at(order, i, last, BLOCK)
            _s, there = there_of(scores, scores_stride, rows, inside, OMIT)
            at = tl.minimum(at, tl.min(tl.where(there, i + tl.arange(0, BLOCK), last), 0))
            i += BLOCK
        first = at
    there = first < last
    return numbers(scores, scores_stride, tl.load(order + first, mask=there, other=0), there)


@triton.jit
def group_moments(scores, scores_stride, weights, weights_stride, order, first, last, OMIT: tl.constexpr, BLOCK: tl.constexpr):
    """(count, shift, mean, baseline, m2, weight): two passes about the group's first score. OMIT: a NaN is no score."""
    shift = first_of(scores, scores_stride, order, first, last, OMIT, BLOCK)
    shift = tl.where(shift - shift == 0, shift, 0.0)  # not an infinity, which would be NaN minus itself
    sum, weight, weighted = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    count = (last - first).to(tl.float64)
    if OMIT:
        count = tl.full((), 0, tl.float64)
    i = first
    while i < last:
        rows, inside = rows_at(order, i, last, BLOCK)
        s, inside = there_of(scores, scores_stride, rows, inside, OMIT)
        d = tl.where(inside, s - shift, 0.0)
        sum += tl.sum(d, 0)
        if OMIT:
            count += tl.sum(tl.where(inside, 1.0, 0.0).to(tl.float64), 0)
        if weights is not None:
            w = numbers(weights, weights_stride, rows, inside)
            weight += tl.sum(w, 0)
            weighted += tl.sum(w * d, 0)
        i += BLOCK
    mean = sum / count
    baseline = mean
    if weights is not None:
        baseline = weighted / weight
    else:
        weight = count
    m2 = tl.full((), 0, tl.float64)
    i = first
    while i < last:
        rows, inside = rows_at(order, i, last, BLOCK)
        s, inside = there_of(scores, scores_stride, rows, inside, OMIT)
        d = tl.where(inside, (s - shift) - mean, 0.0)
        m2 += tl.sum(d * d, 0)
        i += BLOCK
    return count, shift, mean, baseline, m2, weight
