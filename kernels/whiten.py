# SPDX-License-Identifier: Apache-2.0
"""Whitening: over everything, row by row, or by given moments, and its gradients.

Over everything: parts of the statistics (moments.py), one program that makes mean and 1 / std of them, and a sweep that
applies them: values are read twice and the mask once, or twice to mask the output. Of each row: one program, whose first
block stays in registers; what a row has beyond it is read twice.
"""

import torch
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, moments, moments_math
from rlkern.kernels.launch import NARROW, ROW, TOKENS, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
_OPTIONS = {"UNBIASED": True, "FLOOR": False, "SHIFT_MEAN": True, "SCALE": True}


# ---- over everything ------------------------------------------------------------------------------------------------
@launch.kernel
def whiten_scale_kernel(
    parts, n: tl.int32, moments, scale, eps: tl.float64,
    UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: mean and 1 / std, from parts, whose moments it stores, or from moments."""
    if parts is not None:
        count, mean, m2 = moments_math.merged(parts, n, BLOCK)
        moments_math.store_moments(moments, 0, count, mean, m2)
    else:
        count, mean, m2 = moments_math.load_moments(moments, 0)
    rstd = moments_math.reciprocal_std(count, mean, m2, UNBIASED, FLOOR, SCALE, eps)
    moments_math.store_numbers(scale, 2, mean, rstd, rstd, rstd, rstd)


# Every thread reads its parts number by number.
_PLAN = Plan(loads=(), stores=(), row_loads=("parts",) * 4 * moments.COLUMNS, row_stores=("moments", "scale"), registers=(80, 80))
_WIDE = {"parts": "fp64", "moments": "fp64", "scale": "fp64"}
_SCALE = {"UNBIASED": True, "FLOOR": False, "SCALE": True}
VARIANTS += variants(whiten_scale_kernel, launch.PARTS, _PLAN, _SCALE, **_WIDE)


@launch.kernel
def whiten_apply_fwd_kernel(
    values, mask, out, values_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, blocks: tl.int32, scale,
    SHIFT_MEAN: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without a mask no output is masked."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    high, low, rstd, add = moments_math.whiten_scale(tl.load(scale), tl.load(scale + 1), SHIFT_MEAN, A)
    v = moments_math.loaded(values, values_stride, row, first, inside, A, INNER[0], ALIGNED)
    y = moments_math.whitened(v, high, low, rstd, add)
    if mask is not None:
        y = tl.where(launch.load(mask, mask_stride, row, first, inside, INNER[1], ALIGNED) != 0, y, 0.0)
    launch.store(out, out_stride, row, first, y, inside, ALIGNED)


_PLAN = Plan(loads=("values",), stores=("out",), row_loads=("scale",) * 2, registers=(40, 40))
VARIANTS += variants(whiten_apply_fwd_kernel, TOKENS, _PLAN, {"SHIFT_MEAN": True}, scale="fp64")
_PLAN = _PLAN._replace(loads=("values", "mask"))
VARIANTS += variants(whiten_apply_fwd_kernel, TOKENS, _PLAN, {"SHIFT_MEAN": True}, mask="i64", scale="fp64")


# ---- row by row -----------------------------------------------------------------------------------------------------
@launch.kernel
def masked_normalize_fwd_kernel(
    values, mask, out, values_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, cu_seqlens, moments,
    eps: tl.float64, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SHIFT_MEAN: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
    SIGNED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    begin = T - T
    inside = launch.within(begin, T, ALIGNED, BLOCK)
    v = launch.load(values, values_stride, start, begin, inside, INNER[0], ALIGNED)
    w = moments_math.weights_of(mask, mask_stride, start, begin, inside, tl.float64, INNER[1], ALIGNED)
    weight, center, count, first, second = moments_math.sums_of(v, w, SIGNED)
    valid = w != 0
    begin += BLOCK
    while begin < T:
        more = launch.within(begin, T, ALIGNED, BLOCK)
        more_v = launch.load(values, values_stride, start, begin, more, INNER[0], ALIGNED)
        more_w = moments_math.weights_of(mask, mask_stride, start, begin, more, tl.float64, INNER[1], ALIGNED)
        m_weight, m_center, m_count, m_first, m_second = moments_math.sums_of(more_v, more_w, SIGNED)
        weight, center, count, first, second = moments_math.joined(
            weight, center, count, first, second, m_weight, m_center, m_count, m_first, m_second
        )
        begin += BLOCK
    count, mean, m2 = moments_math.moments_from(weight, center, count, first, second)
    if moments is not None:
        moments_math.store_moments(moments, row, count, mean, m2)
    if out is not None:  # empty rows have moments
        count, mean, m2 = moments_math.over_at_least_one(count, mean, m2)
        rstd = moments_math.reciprocal_std(count, mean, m2, UNBIASED, FLOOR, SCALE, eps)
        high, low, rstd, add = moments_math.whiten_scale(mean, rstd, SHIFT_MEAN, A)
        y = moments_math.whitened(moments_math.widened(v, A), high, low, rstd, add)
        if MASKED:
            y = tl.where(valid, y, 0.0)
        launch.store(out, out_stride, start, T - T, y, inside, ALIGNED)
        begin = T - T + BLOCK
        while begin < T:
            rest = launch.within(begin, T, ALIGNED, BLOCK)
            rest_v = moments_math.loaded(values, values_stride, start, begin, rest, A, INNER[0], ALIGNED)
            rest_y = moments_math.whitened(rest_v, high, low, rstd, add)
            if MASKED and mask is not None:
                rest_w = launch.load(mask, mask_stride, start, begin, rest, INNER[1], ALIGNED)
                rest_y = tl.where(rest_w != 0, rest_y, 0.0)
            launch.store(out, out_stride, start, begin, rest_y, rest, ALIGNED)
            begin += BLOCK


# The first block, and the loops over the rest: for the statistics, and for the output.
_PLAN = Plan(loads=("values", "mask") * 3, stores=("out",) * 2, row_stores=("moments",), registers=(128, 128))
_OPENRLHF = {"UNBIASED": False, "FLOOR": True, "SHIFT_MEAN": True, "SCALE": True, "MASKED": True, "SIGNED": True}
VARIANTS += variants(masked_normalize_fwd_kernel, NARROW, _PLAN, _OPENRLHF, mask="i64", moments="fp64")


@launch.kernel
def whiten_apply_rows_fwd_kernel(
    values, mask, out, values_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, cu_seqlens, moments,
    eps: tl.float64, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, SHIFT_MEAN: tl.constexpr, SCALE: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    count, mean, m2 = moments_math.load_moments(moments, row)
    rstd = moments_math.reciprocal_std(count, mean, m2, UNBIASED, FLOOR, SCALE, eps)
    high, low, rstd, add = moments_math.whiten_scale(mean, rstd, SHIFT_MEAN, A)
    first = T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        v = moments_math.loaded(values, values_stride, start, first, inside, A, INNER[0], ALIGNED)
        y = moments_math.whitened(v, high, low, rstd, add)
        if mask is not None:
            y = tl.where(launch.load(mask, mask_stride, start, first, inside, INNER[1], ALIGNED) != 0, y, 0.0)
        launch.store(out, out_stride, start, first, y, inside, ALIGNED)
        first += BLOCK


_PLAN = Plan(loads=("values",), stores=("out",), row_loads=("moments",) * 3, registers=(64, 64))
VARIANTS += variants(whiten_apply_rows_fwd_kernel, ROW, _PLAN, _OPTIONS, moments="fp64")


# ---- launchers ------------------------------------------------------------------------------------------------------
def choice(flags: list[bool], *names: str) -> dict[str, bool]:
    """Those of the options that a kernel has; flags: unbiased, floor, shift_mean, scale, mask_output."""
    given = dict(zip(("UNBIASED", "FLOOR", "SHIFT_MEAN", "SCALE", "MASKED"), flags, strict=True))
    return {name: given[name] for name in names}


def apply_over_tokens(values: Tensor, mask: Tensor | None, scale: Tensor, flags: list[bool], out: Tensor | None) -> None:
    if out is not None:
        tensors = (values, mask if flags[4] else None, out)
        options = {"SHIFT_MEAN": flags[2], "A": launch.arithmetic(values)}
        launch.over_tokens(whiten_apply_fwd_kernel, launch.rows(tensors, flat=True), tensors, scale, **options)


def masked_whiten_fwd(
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: None,
    flags: list[bool],
    eps: float,
    save: bool,
    out: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    """The count, for the CPU's judge."""
    if kept is None:
        kept = torch.empty(3, dtype=torch.float64, device=values.device)
    scale = torch.empty(2, dtype=torch.float64, device=values.device)
    parts, n = moments.moments_parts(values, mask)
    launch.once(whiten_scale_kernel, 1, launch.PARTS, parts, n, kept, scale, eps, **choice(flags, "UNBIASED", "FLOOR", "SCALE"))
    apply_over_tokens(values, mask, scale, flags, out)
    return kept[0]


def masked_normalize_fwd(
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    flags: list[bool],
    eps: float,
    save: bool,
    out: Tensor | None,
    kept: Tensor | None,
) -> None:
    if out is None and kept is None:
        return
    tensors = (values, mask, out)
    options = {"SIGNED": moments.signed(mask), "A": launch.arithmetic(values)}
    options |= choice(flags, "UNBIASED", "FLOOR", "SHIFT_MEAN", "SCALE", "MASKED")
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    launch.over_rows(masked_normalize_fwd_kernel, layout, tensors, cu_seqlens, kept, eps, block=NARROW, **options)


def whiten_apply_fwd(
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    given: Tensor,
    flags: list[bool],
    eps: float,
    by_row: bool,
    out: Tensor | None,
) -> Tensor | float:
    """The count that is judged, where there is one for all."""
    if not by_row:
        scale = torch.empty(2, dtype=torch.float64, device=values.device)
        launch.once(whiten_scale_kernel, 1, launch.PARTS, None, 0, given, scale, eps, **choice(flags, "UNBIASED", "FLOOR", "SCALE"))
        apply_over_tokens(values, mask, scale, flags, out)
        return given[0]
    if out is not None:
        tensors = (values, mask if flags[4] else None, out)
        options = {"A": launch.arithmetic(values), **choice(flags, "UNBIASED", "FLOOR", "SHIFT_MEAN", "SCALE")}
        layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
        launch.over_rows(whiten_apply_rows_fwd_kernel, layout, tensors, cu_seqlens, given, eps, **options)
    return 0.0
