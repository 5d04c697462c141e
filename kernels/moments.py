# SPDX-License-Identifier: Apache-2.0
"""Masked sums, means, variances and moments, and their gradients.

Of everything: a program per span of blocks stores a part, and one last program merges the parts, both in a fixed order. Of
each row: one program.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, moments_math
from rlkern.kernels.launch import ROW, TOKENS, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
COLUMNS = 5  # of a part


# ---- over everything ------------------------------------------------------------------------------------------------
@launch.kernel
def masked_moments_parts_kernel(
    values, mask, values_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, blocks: tl.int32, total: tl.int32, span: tl.int32, parts,
    SIGNED: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, last, T = launch.span_of(T, total, span, ALIGNED)
    zero = tl.full((), 0, tl.float64)
    weight, center, count, first, second = zero, zero, zero, zero, zero
    while i < last:
        row, begin, inside = launch.block_at(i, T, blocks, ALIGNED, BLOCK)
        w = moments_math.weights_of(mask, mask_stride, row, begin, inside, tl.float64, INNER[1], ALIGNED)
        v = launch.load(values, values_stride, row, begin, inside, INNER[0], ALIGNED)
        b_weight, b_center, b_count, b_first, b_second = moments_math.sums_of(v, w, SIGNED)
        weight, center, count, first, second = moments_math.joined(
            weight, center, count, first, second, b_weight, b_center, b_count, b_first, b_second
        )
        i += 1
    moments_math.store_numbers(parts + tl.program_id(0) * 5, 5, weight, center, count, first, second)


# A loop's loads count once, as everywhere in these plans.
_PLAN = Plan(loads=("values", "mask"), stores=(), row_stores=("parts",), registers=(104, 104))
VARIANTS += variants(masked_moments_parts_kernel, TOKENS, _PLAN, {"SIGNED": True}, mask="i64", parts="fp64")
VARIANTS += variants(masked_moments_parts_kernel, TOKENS, _PLAN, {"SIGNED": False}, mask="i1", parts="fp64")


@launch.kernel
def masked_sum_parts_kernel(
    values, mask, values_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, blocks: tl.int32, total: tl.int32, span: tl.int32, parts,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, last, T = launch.span_of(T, total, span, ALIGNED)
    count, sum = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    while i < last:
        row, begin, inside = launch.block_at(i, T, blocks, ALIGNED, BLOCK)
        w = moments_math.weights_of(mask, mask_stride, row, begin, inside, tl.float64, INNER[1], ALIGNED)
        v = launch.load(values, values_stride, row, begin, inside, INNER[0], ALIGNED)
        count += tl.sum(w, 0)
        sum += tl.sum(w * tl.where(w != 0, moments_math.widened(v, tl.float64), 0.0), 0)
        i += 1
    moments_math.store_numbers(parts + tl.program_id(0) * 5, 2, count, sum, sum, sum, sum)


_PLAN = Plan(loads=("values", "mask"), stores=(), row_stores=("parts",), registers=(64, 64))
VARIANTS += variants(masked_sum_parts_kernel, TOKENS, _PLAN, {}, mask="i64", parts="fp64")


@triton.jit
def store_reduced(result, moments, row, count, mean, m2, KIND: tl.constexpr, UNBIASED: tl.constexpr):
    """`mean` holds the sum where nothing but it and the count was asked for."""
    if moments is not None:
        moments_math.store_moments(moments, row, count, mean, m2)
    if result is not None:
        value = moments_math.reduced(KIND, count, mean, m2, UNBIASED)
        tl.store(result + row, launch.rounded(value, result.dtype.element_ty))


@launch.kernel
def masked_reduce_merge_kernel(parts, n: tl.int32, result, moments, KIND: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr):
    """One program."""
    if KIND == "sum" or KIND == "mean":
        i = tl.arange(0, BLOCK)
        count = tl.sum(tl.load(parts + i * 5, mask=i < n, other=0), 0)
        mean = tl.sum(tl.load(parts + i * 5 + 1, mask=i < n, other=0), 0)
        m2 = tl.full((), 0, tl.float64)
    else:
        count, mean, m2 = moments_math.merged(parts, n, BLOCK)
    store_reduced(result, moments, 0, count, mean, m2, KIND, UNBIASED)


# Every thread reads its parts number by number.
_PLAN = Plan(loads=(), stores=(), row_loads=("parts",) * 4 * COLUMNS, row_stores=("result", "moments"), registers=(80, 80))
_VAR = {"KIND": "var", "UNBIASED": True}
VARIANTS += variants(
    masked_reduce_merge_kernel, launch.PARTS, _PLAN, {"KIND": "sum", "UNBIASED": False}, _VAR, parts="fp64", moments="fp64"
)


# ---- row by row -----------------------------------------------------------------------------------------------------
@launch.kernel
def masked_reduce_rows_fwd_kernel(
    values, mask, values_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens, result, moments,
    KIND: tl.constexpr, UNBIASED: tl.constexpr, SIGNED: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    zero = tl.full((), 0, tl.float64)
    weight, center, count, first, second = zero, zero, zero, zero, zero
    begin = T - T
    while begin < T:
        inside = launch.within(begin, T, ALIGNED, BLOCK)
        w = moments_math.weights_of(mask, mask_stride, start, begin, inside, tl.float64, INNER[1], ALIGNED)
        v = launch.load(values, values_stride, start, begin, inside, INNER[0], ALIGNED)
        if KIND == "sum" or KIND == "mean":
            count += tl.sum(w, 0)
            center += tl.sum(w * tl.where(w != 0, moments_math.widened(v, tl.float64), 0.0), 0)
        else:
            b_weight, b_center, b_count, b_first, b_second = moments_math.sums_of(v, w, SIGNED)
            weight, center, count, first, second = moments_math.joined(
                weight, center, count, first, second, b_weight, b_center, b_count, b_first, b_second
            )
        begin += BLOCK
    mean, m2 = center, zero
    if KIND != "sum" and KIND != "mean":
        count, mean, m2 = moments_math.moments_from(weight, center, count, first, second)
    store_reduced(result, moments, row, count, mean, m2, KIND, UNBIASED)


_PLAN = Plan(loads=("values", "mask"), stores=(), row_stores=("result", "moments"), registers=(104, 104))
_BY_ROW = ({"KIND": "sum", "UNBIASED": False, "SIGNED": True}, {"KIND": "moments", "UNBIASED": False, "SIGNED": True})
VARIANTS += variants(masked_reduce_rows_fwd_kernel, ROW, _PLAN, *_BY_ROW, mask="i64", moments="fp64")


# ---- gradients ------------------------------------------------------------------------------------------------------
@triton.jit
def reduced_grad(grad, moments, row, KIND: tl.constexpr, UNBIASED: tl.constexpr):
    """(level, slope, mean) of a reduction, from its cotangent."""
    zero = tl.full((), 0, tl.float64)
    count, mean, _m2 = zero, zero, zero
    if moments is not None:
        count, mean, _m2 = moments_math.load_moments(moments, row)
    if KIND == "moments":
        level = tl.where(count == 0, 0.0, tl.load(grad + row * 3 + 1) / count)
        return level, 2.0 * tl.load(grad + row * 3 + 2), mean
    g = moments_math.widened(tl.load(grad + row), tl.float64)
    if KIND == "var":
        return zero, 2.0 * moments_math.reduced("var", count, zero, g, UNBIASED), mean
    return moments_math.reduced(KIND, count, g, zero, False), zero, mean


@launch.kernel
def masked_reduce_bwd_kernel(
    d_values, values, mask, d_values_stride: tl.int64, values_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, blocks: tl.int32,
    grad, moments,
    KIND: tl.constexpr, UNBIASED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values are read for a variance or moments alone."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    level, slope, mean = reduced_grad(grad, moments, 0, KIND, UNBIASED)
    high, low = moments_math.halves(mean, A)
    v = moments_math.loaded(values, values_stride, row, first, inside, A, INNER[1], ALIGNED) if values is not None else None
    w = launch.load(mask, mask_stride, row, first, inside, INNER[2], ALIGNED) if mask is not None else None
    d = moments_math.gradient(None, level.to(A), slope.to(A), high, low, None, v, w, False)
    launch.store(d_values, d_values_stride, row, first, d, inside, ALIGNED)


_GRADS = ("grad", *["moments"] * 3)
_SUM_PLAN = Plan(loads=("mask",), stores=("d_values",), row_loads=_GRADS, registers=(64, 64))
_VAR_PLAN = Plan(loads=("values", "mask"), stores=("d_values",), row_loads=_GRADS, registers=(64, 64))
VARIANTS += variants(masked_reduce_bwd_kernel, TOKENS, _SUM_PLAN, {"KIND": "mean", "UNBIASED": False}, mask="i64", moments="fp64")
VARIANTS += variants(masked_reduce_bwd_kernel, TOKENS, _VAR_PLAN, _VAR, mask="i64", moments="fp64")


@launch.kernel
def masked_reduce_rows_bwd_kernel(
    d_values, values, mask, d_values_stride: tl.int64, values_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens,
    grad, moments,
    KIND: tl.constexpr, UNBIASED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    level, slope, mean = reduced_grad(grad, moments, row, KIND, UNBIASED)
    high, low = moments_math.halves(mean, A)
    first = T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        v = moments_math.loaded(values, values_stride, start, first, inside, A, INNER[1], ALIGNED) if values is not None else None
        w = launch.load(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) if mask is not None else None
        d = moments_math.gradient(None, level.to(A), slope.to(A), high, low, None, v, w, False)
        launch.store(d_values, d_values_stride, start, first, d, inside, ALIGNED)
        first += BLOCK


VARIANTS += variants(masked_reduce_rows_bwd_kernel, ROW, _SUM_PLAN, {"KIND": "mean", "UNBIASED": False}, mask="i64", moments="fp64")
_VAR_PLAN = _VAR_PLAN._replace(row_loads=("grad", "grad", *["moments"] * 3))
_MOMENTS = {"KIND": "moments", "UNBIASED": False}
VARIANTS += variants(masked_reduce_rows_bwd_kernel, ROW, _VAR_PLAN, _MOMENTS, mask="i64", moments="fp64", grad="fp64")


# ---- launchers ------------------------------------------------------------------------------------------------------
def signed(mask: Tensor | None) -> bool:
    """May its weights be negative?"""
    return mask is not None and mask.dtype not in (torch.bool, torch.uint8)


def moments_parts(values: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """What `merged` wants: statistics of all values, in how many parts."""
    parts = torch.empty(launch.PARTS.size * COLUMNS, dtype=torch.float64, device=values.device)
    tensors = (values, mask)
    return parts, launch.over_spans(masked_moments_parts_kernel, launch.rows(tensors, flat=True), tensors, parts, SIGNED=signed(mask))


def _reduce_fwd(
    kind: str,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    by_row: bool,
    unbiased: bool,
    save: bool,
    result: Tensor | None,
    kept: Tensor | None,
) -> Any:
    """The count, which is judged where all values are one."""
    if kind == "moments":
        result, kept = None, result
    tensors, choice = (values, mask), dict[str, Any](KIND=kind, UNBIASED=unbiased)
    if by_row:
        if result is not None or kept is not None:
            layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
            choice["SIGNED"] = signed(mask)
            launch.over_rows(masked_reduce_rows_fwd_kernel, layout, tensors, cu_seqlens, result, kept, **choice)
        return 0.0
    if kept is None:
        kept = torch.empty(3, dtype=torch.float64, device=values.device)
    if kind in ("sum", "mean"):
        parts = torch.empty(launch.PARTS.size * COLUMNS, dtype=torch.float64, device=values.device)
        n = launch.over_spans(masked_sum_parts_kernel, launch.rows(tensors, flat=True), tensors, parts)
    else:
        parts, n = moments_parts(values, mask)
    launch.once(masked_reduce_merge_kernel, 1, launch.PARTS, parts, n, result, kept, **choice)
    return kept[0]


def _reduce_bwd(
    kind: str,
    grad: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor | None,
    by_row: bool,
    unbiased: bool,
    d_values: Tensor | None,
) -> None:
    if d_values is None:
        return
    tensors = (d_values, values if kind in ("var", "moments") else None, mask)
    choice = {"KIND": kind, "UNBIASED": unbiased, "A": launch.arithmetic(d_values)}
    if by_row:
        launch.over_rows(
            masked_reduce_rows_bwd_kernel, launch.rows(tensors, cu_seqlens=cu_seqlens), tensors, cu_seqlens, grad, kept, **choice
        )
    else:
        launch.over_tokens(masked_reduce_bwd_kernel, launch.rows(tensors, flat=True), tensors, grad, kept, **choice)


masked_sum_fwd, masked_mean_fwd = partial(_reduce_fwd, "sum"), partial(_reduce_fwd, "mean")
masked_var_fwd, masked_moments_fwd = partial(_reduce_fwd, "var"), partial(_reduce_fwd, "moments")
masked_sum_bwd, masked_mean_bwd = partial(_reduce_bwd, "sum"), partial(_reduce_bwd, "mean")
masked_var_bwd, masked_moments_bwd = partial(_reduce_bwd, "var"), partial(_reduce_bwd, "moments")
