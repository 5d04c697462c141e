# SPDX-License-Identifier: Apache-2.0
"""The gradients of whitening: d_v = direct * G + weight * (level + slope * (v - mean)), its numbers from the moments and from
sum(G) and sum(G (v - mean)).

Over everything: parts of the two sums, one program that makes the numbers, and a sweep that applies them: cotangent and values
are read twice. Of each row: one program, whose first block stays in registers.
"""

import torch
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, moments_math
from rlkern.kernels.launch import ROW, TOKENS, Plan, Variant, variants
from rlkern.kernels.whiten import choice

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
_OPTIONS = {"UNBIASED": True, "FLOOR": False, "SHIFT_MEAN": True, "SCALE": True}


# ---- over everything ------------------------------------------------------------------------------------------------
@launch.kernel
def whiten_sums_kernel(
    grad, values, mask, grad_stride: tl.int64, values_stride: tl.int64, mask_stride: tl.int64, T: tl.int64,
    blocks: tl.int32, total: tl.int32, span: tl.int32, moments, parts,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without a mask no output was masked."""
    i, last, T = launch.span_of(T, total, span, ALIGNED)
    mean, sum, product = tl.load(moments + 1), tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    while i < last:
        row, first, inside = launch.block_at(i, T, blocks, ALIGNED, BLOCK)
        g = moments_math.weights_of(grad, grad_stride, row, first, inside, tl.float64, INNER[0], ALIGNED)
        v = moments_math.loaded(values, values_stride, row, first, inside, tl.float64, INNER[1], ALIGNED) if values is not None else None
        w = launch.load(mask, mask_stride, row, first, inside, INNER[2], ALIGNED) if mask is not None else None
        b_sum, b_product = moments_math.grad_sums(g, v, w, mean, True)
        sum += b_sum
        product += b_product
        i += 1
    moments_math.store_numbers(parts + tl.program_id(0) * 2, 2, sum, product, product, product, product)


_WIDE = {"moments": "fp64", "parts": "fp64"}
_PLAN = Plan(loads=("grad", "values"), stores=(), row_loads=("moments",), row_stores=("parts",), registers=(64, 64))
VARIANTS += variants(whiten_sums_kernel, TOKENS, _PLAN, {}, **_WIDE)
_PLAN = _PLAN._replace(loads=("grad", "values", "mask"))
VARIANTS += variants(whiten_sums_kernel, TOKENS, _PLAN, {}, mask="i64", **_WIDE)


@launch.kernel
def whiten_factors_kernel(
    parts, n: tl.int32, moments, factors, d_moments, eps: tl.float64,
    UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SHIFT_MEAN: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: (direct, level, slope, mean). GIVEN: the moments are constants of d_values, with a gradient of their own."""
    count, mean, m2 = moments_math.load_moments(moments, 0)
    sum, product = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    if parts is not None:
        i = tl.arange(0, BLOCK)
        sum = tl.sum(tl.load(parts + i * 2, mask=i < n, other=0), 0)
        product = tl.sum(tl.load(parts + i * 2 + 1, mask=i < n, other=0), 0)
    direct, level, slope, d_mean, d_m2 = moments_math.whiten_grad(
        count, mean, m2, UNBIASED, FLOOR, SHIFT_MEAN, SCALE, eps, False, sum, product
    )
    if d_moments is not None:
        moments_math.store_moments(d_moments, 0, 0.0, d_mean, d_m2)
    if GIVEN:
        level, slope = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    moments_math.store_numbers(factors, 4, direct, level, slope, mean, mean)


# Every thread reads its parts number by number.
_PLAN = Plan(loads=(), stores=(), row_loads=(*["parts"] * 8, *["moments"] * 3), row_stores=("factors",), registers=(64, 64))
VARIANTS += variants(whiten_factors_kernel, launch.PARTS, _PLAN, {**_OPTIONS, "GIVEN": False}, factors="fp64", **_WIDE)


@launch.kernel
def whiten_bwd_kernel(
    grad, values, mask, d_values,
    grad_stride: tl.int64, values_stride: tl.int64, mask_stride: tl.int64, d_values_stride: tl.int64, T: tl.int64, blocks: tl.int32,
    factors,
    MASKED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Given moments need no values."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    direct, level, slope = tl.load(factors).to(A), tl.load(factors + 1).to(A), tl.load(factors + 2).to(A)
    high, low = moments_math.halves(tl.load(factors + 3), A)
    g = moments_math.loaded(grad, grad_stride, row, first, inside, A, INNER[0], ALIGNED)
    v = moments_math.loaded(values, values_stride, row, first, inside, A, INNER[1], ALIGNED) if values is not None else None
    w = launch.load(mask, mask_stride, row, first, inside, INNER[2], ALIGNED) if mask is not None else None
    d = moments_math.gradient(direct, level, slope, high, low, g, v, w, MASKED)
    launch.store(d_values, d_values_stride, row, first, d, inside, ALIGNED)


_PLAN = Plan(loads=("grad", "values", "mask"), stores=("d_values",), row_loads=("factors",) * 4, registers=(64, 64))
VARIANTS += variants(whiten_bwd_kernel, TOKENS, _PLAN, {"MASKED": False}, mask="i64", factors="fp64")


# ---- row by row -----------------------------------------------------------------------------------------------------
@launch.kernel
def whiten_rows_bwd_kernel(
    grad, values, mask, d_values,
    grad_stride: tl.int64, values_stride: tl.int64, mask_stride: tl.int64, d_values_stride: tl.int64, T: tl.int64, cu_seqlens,
    moments, d_moments, eps: tl.float64,
    UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SHIFT_MEAN: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
    GIVEN: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """masked_normalize, whose moments are about max(count, 1); GIVEN: whiten_apply. Sums need values, and only they of given
    moments: without values there are none."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    count, mean, m2 = moments_math.load_moments(moments, row)
    center = mean
    if not GIVEN:
        _count, center, _m2 = moments_math.over_at_least_one(count, mean, m2)
    begin = T - T
    inside = launch.within(begin, T, ALIGNED, BLOCK)
    g = moments_math.weights_of(grad, grad_stride, start, begin, inside, A, INNER[0], ALIGNED)
    v = moments_math.loaded(values, values_stride, start, begin, inside, A, INNER[1], ALIGNED) if values is not None else None
    w = launch.load(mask, mask_stride, start, begin, inside, INNER[2], ALIGNED) if mask is not None else None
    sum, product = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    if values is not None:
        sum, product = moments_math.grad_sums(g.to(tl.float64), moments_math.widened(v, tl.float64), w, center, MASKED)
        begin += BLOCK
        while begin < T:
            more = launch.within(begin, T, ALIGNED, BLOCK)
            more_g = moments_math.weights_of(grad, grad_stride, start, begin, more, tl.float64, INNER[0], ALIGNED)
            more_v = (
                moments_math.loaded(values, values_stride, start, begin, more, tl.float64, INNER[1], ALIGNED)
                if values is not None
                else None
            )
            more_w = launch.load(mask, mask_stride, start, begin, more, INNER[2], ALIGNED) if mask is not None else None
            m_sum, m_product = moments_math.grad_sums(more_g, more_v, more_w, center, MASKED)
            sum += m_sum
            product += m_product
            begin += BLOCK
    direct, level, slope, d_mean, d_m2 = moments_math.whiten_grad(
        count, mean, m2, UNBIASED, FLOOR, SHIFT_MEAN, SCALE, eps, not GIVEN, sum, product
    )
    if d_moments is not None:
        moments_math.store_moments(d_moments, row, 0.0, d_mean, d_m2)
    if d_values is not None:
        zero = tl.full((), 0, A)
        d_level, d_slope = zero if GIVEN else level.to(A), zero if GIVEN else slope.to(A)
        high, low = moments_math.halves(center, A)
        d = moments_math.gradient(direct.to(A), d_level, d_slope, high, low, g, v, w, MASKED)
        launch.store(d_values, d_values_stride, start, T - T, d, inside, ALIGNED)
        begin = T - T + BLOCK
        while begin < T:
            rest = launch.within(begin, T, ALIGNED, BLOCK)
            rest_g = moments_math.loaded(grad, grad_stride, start, begin, rest, A, INNER[0], ALIGNED)
            rest_v = moments_math.loaded(values, values_stride, start, begin, rest, A, INNER[1], ALIGNED) if values is not None else None
            rest_w = launch.load(mask, mask_stride, start, begin, rest, INNER[2], ALIGNED) if mask is not None else None
            rest_d = moments_math.gradient(direct.to(A), d_level, d_slope, high, low, rest_g, rest_v, rest_w, MASKED)
            launch.store(d_values, d_values_stride, start, begin, rest_d, rest, ALIGNED)
            begin += BLOCK


# The first block, and the loops over the rest: for the sums, and for the gradient.
_PLAN = Plan(loads=("grad", "values", "mask") * 3, stores=("d_values",) * 2, row_loads=("moments",) * 3, registers=(128, 128))
_OPENRLHF = {"UNBIASED": False, "FLOOR": True, "SHIFT_MEAN": True, "SCALE": True, "MASKED": True, "GIVEN": False}
VARIANTS += variants(whiten_rows_bwd_kernel, ROW, _PLAN, _OPENRLHF, mask="i64", moments="fp64")


# ---- launchers ------------------------------------------------------------------------------------------------------
def over_everything(
    grad: Tensor, values: Tensor, mask: Tensor | None, moments: Tensor, flags: list[bool], eps: float, given: bool,
    d_values: Tensor | None, d_moments: Tensor | None,
) -> None:  # fmt: skip
    parts, n = None, 0
    valid = mask if flags[4] else None
    if not given or d_moments is not None:
        parts, tensors = torch.empty(launch.PARTS.size * 2, dtype=torch.float64, device=values.device), (grad, values, valid)
        n = launch.over_spans(whiten_sums_kernel, launch.rows(tensors, flat=True), tensors, moments, parts)
    factors = torch.empty(4, dtype=torch.float64, device=values.device)
    options = choice(flags, "UNBIASED", "FLOOR", "SHIFT_MEAN", "SCALE")
    launch.once(whiten_factors_kernel, 1, launch.PARTS, parts, n, moments, factors, d_moments, eps, GIVEN=given, **options)
    if d_values is not None:
        tokens = (grad, None, valid, d_values) if given else (grad, values, mask, d_values)
        A = launch.arithmetic(grad, values)
        launch.over_tokens(whiten_bwd_kernel, launch.rows(tokens, flat=True), tokens, factors, MASKED=flags[4], A=A)


def row_by_row(
    grad: Tensor, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, moments: Tensor, flags: list[bool], eps: float,
    given: bool, d_values: Tensor | None, d_moments: Tensor | None,
) -> None:  # fmt: skip
    if d_values is None and d_moments is None:
        return
    read = values if not given or d_moments is not None else None
    tensors = (grad, read, mask if flags[4] or not given else None, d_values)
    options = {"GIVEN": given, "A": launch.arithmetic(grad, values)}
    options |= choice(flags, "UNBIASED", "FLOOR", "SHIFT_MEAN", "SCALE", "MASKED")
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    launch.over_rows(whiten_rows_bwd_kernel, layout, tensors, cu_seqlens, moments, d_moments, eps, **options)


def masked_whiten_bwd(
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: None,
    moments: Tensor,
    flags: list[bool],
    eps: float,
    d_values: Tensor | None,
) -> None:
    if d_values is not None:
        over_everything(grad, values, mask, moments, flags, eps, False, d_values, None)


def masked_normalize_bwd(
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    moments: Tensor,
    flags: list[bool],
    eps: float,
    d_values: Tensor | None,
) -> None:
    row_by_row(grad, values, mask, cu_seqlens, moments, flags, eps, False, d_values, None)


def whiten_apply_bwd(
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    moments: Tensor,
    flags: list[bool],
    eps: float,
    by_row: bool,
    needs: list[bool],
    d_values: Tensor | None,
    d_moments: Tensor | None,
) -> None:
    if by_row:
        row_by_row(grad, values, mask, cu_seqlens, moments, flags, eps, True, d_values, d_moments)
    else:
        over_everything(grad, values, mask, moments, flags, eps, True, d_values, d_moments)
