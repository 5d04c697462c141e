# SPDX-License-Identifier: Apache-2.0
"""Group statistics over scores. A program a group walks its rows in order, in float64. `order` and `offsets` are what
rlkern.group_index made: nothing here can judge them, and other numbers read or write outside their tensors.
"""

import triton.language as tl
from torch import Tensor

from rlkern.kernels import group_math, launch, moments_math
from rlkern.kernels.launch import GROUP, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles


# ---- kernels --------------------------------------------------------------------------------------------------------
@launch.kernel
def group_mean_std_fwd_kernel(
    scores, scores_stride: tl.int64, order, offsets, mean_out, std_out, eps: tl.float64,
    UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, OMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, mean, _baseline, m2, _weight = group_math.group_moments(scores, scores_stride, None, 0, order, first, last, OMIT, BLOCK)
    tl.store(mean_out + g, launch.rounded(group_math.mean_of(count, shift, mean, SINGLETON), mean_out.dtype.element_ty))
    tl.store(std_out + g, launch.rounded(group_math.std_of(count, m2, UNBIASED, SINGLETON, eps), std_out.dtype.element_ty))


# Rows are gathered one by one: of each a number of order and one of scores, in every pass.
_INDEX = {"order": "i64", "offsets": "i64"}
_PASS = ("order", "scores") * 4  # 4 rows a thread
_HEAD = ("offsets", "offsets", "order", "scores")
_PLAN = Plan(loads=(), stores=(), row_loads=_HEAD + _PASS * 2, row_stores=("mean_out", "std_out"), registers=(64, 64))
_STD = {"UNBIASED": True, "SINGLETON": "raw", "OMIT": False}
VARIANTS += variants(group_mean_std_fwd_kernel, GROUP, _PLAN, _STD, **_INDEX)


@launch.kernel
def group_mean_std_bwd_kernel(
    grad_mean, grad_std, scores, scores_stride: tl.int64, order, offsets, d_scores, eps: tl.float64,
    UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, OMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, mean, _baseline, m2, _weight = group_math.group_moments(scores, scores_stride, None, 0, order, first, last, OMIT, BLOCK)
    slope = group_math.std_slope(count, m2, UNBIASED, eps)
    through_mean = moments_math.widened(tl.load(grad_mean + g), tl.float64) / count
    if SINGLETON == "raw":
        through_mean = tl.where(count <= 1, 0.0, through_mean)
    through_std = moments_math.widened(tl.load(grad_std + g), tl.float64)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        s, there = group_math.there_of(scores, scores_stride, rows, inside, OMIT)
        found = through_mean + through_std * tl.where(slope == 0, 0.0, ((s - shift) - mean) * slope)
        if OMIT:
            found = tl.where(there, found, 0.0)
        tl.store(d_scores + rows, launch.rounded(found, d_scores.dtype.element_ty), mask=inside)
        i += BLOCK


_PLAN = Plan(loads=(), stores=(), row_loads=("grad_mean", "grad_std", *_HEAD, *_PASS * 3), row_stores=("d_scores",) * 4, registers=(64, 64))
VARIANTS += variants(group_mean_std_bwd_kernel, GROUP, _PLAN, _STD, **_INDEX)


@launch.kernel
def group_normalize_fwd_kernel(
    scores, scores_stride: tl.int64, lengths, lengths_stride: tl.int64, order, offsets, out, eps: tl.float64,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, OMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, _mean, baseline, m2, _weight = group_math.group_moments(
        scores, scores_stride, lengths, lengths_stride, order, first, last, OMIT, BLOCK
    )
    shift, baseline, factor = group_math.group_scale(count, shift, baseline, m2, BASELINE, SCALE, UNBIASED, eps, SINGLETON)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        s, there = group_math.there_of(scores, scores_stride, rows, inside, OMIT)
        y = ((s - shift) - baseline) * factor
        if OMIT:
            y = tl.where(there, y, s)
        tl.store(out + rows, launch.rounded(y, out.dtype.element_ty), mask=inside)
        i += BLOCK


_PLAN = Plan(loads=(), stores=(), row_loads=_HEAD + _PASS * 3, row_stores=("out",) * 4, registers=(64, 64))
_GRPO = {"BASELINE": "mean", "SCALE": True, **_STD}
VARIANTS += variants(group_normalize_fwd_kernel, GROUP, _PLAN, _GRPO, **_INDEX)
_PLAN = _PLAN._replace(row_loads=_HEAD + _PASS * 3 + ("lengths",) * 4)
_OPO = {"BASELINE": "length_weighted", "SCALE": False, **_STD}
VARIANTS += variants(group_normalize_fwd_kernel, GROUP, _PLAN, _OPO, lengths="i64", **_INDEX)


@launch.kernel
def group_normalize_bwd_kernel(
    grad, scores, scores_stride: tl.int64, lengths, lengths_stride: tl.int64, order, offsets, d_scores, eps: tl.float64,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, OMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q stretch (c - weight sum(c) / sum(weight)) - q^2 sum(c stretch (s - baseline)) d std, q = 1 / (std + eps)."""
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, mean, baseline, m2, whole = group_math.group_moments(
        scores, scores_stride, lengths, lengths_stride, order, first, last, OMIT, BLOCK
    )
    stretch = group_math.stretch_of(count, BASELINE)
    d, e = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        s, inside = group_math.there_of(scores, scores_stride, rows, inside, OMIT)
        c = group_math.numbers(grad, 1, rows, inside)
        d += tl.sum(c, 0)
        e += tl.sum(tl.where(inside, c * stretch * ((s - shift) - baseline), 0.0), 0)
        i += BLOCK
    q = group_math.inverse_scale(count, m2, SCALE, UNBIASED, eps)
    slope = group_math.std_slope(count, m2, UNBIASED, 0.0)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        s, there = group_math.there_of(scores, scores_stride, rows, inside, OMIT)
        c = group_math.numbers(grad, 1, rows, inside)
        weight = tl.full((), 1, tl.float64)
        if lengths is not None:
            weight = group_math.numbers(lengths, lengths_stride, rows, inside)
        y = q * stretch * (c - weight / whole * d)
        if SCALE:
            y = y - q * q * e * tl.where(slope == 0, 0.0, ((s - shift) - mean) * slope)
        y = tl.where(count <= 1, c * q if SINGLETON == "raw" else 0.0, y)
        if OMIT:
            y = tl.where(there, y, 0.0)
        tl.store(d_scores + rows, launch.rounded(y, d_scores.dtype.element_ty), mask=inside)
        i += BLOCK


_PLAN = Plan(loads=(), stores=(), row_loads=_HEAD + _PASS * 4 + ("grad",) * 8, row_stores=("d_scores",) * 4, registers=(64, 64))
VARIANTS += variants(group_normalize_bwd_kernel, GROUP, _PLAN, _GRPO, **_INDEX)


# ---- launchers ------------------------------------------------------------------------------------------------------
def group_mean_std_fwd(
    scores: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool,
    mean: Tensor | None,
    std: Tensor | None,
) -> None:
    if mean is not None:
        options = {"UNBIASED": unbiased, "SINGLETON": singleton, "OMIT": omit}
        args = (scores, scores.stride(0), order, offsets, mean, std, eps)
        launch.once(group_mean_std_fwd_kernel, mean.shape[0], GROUP, *args, **options)


def group_mean_std_bwd(
    grad_mean: Tensor,
    grad_std: Tensor,
    scores: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool,
    d_scores: Tensor | None,
) -> None:
    if d_scores is not None:
        options = {"UNBIASED": unbiased, "SINGLETON": singleton, "OMIT": omit}
        args = (grad_mean, grad_std, scores, scores.stride(0), order, offsets, d_scores, eps)
        launch.once(group_mean_std_bwd_kernel, grad_mean.shape[0], GROUP, *args, **options)


def group_normalize_fwd(
    scores: Tensor,
    lengths: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    baseline: str,
    scale: bool,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool,
    out: Tensor | None,
) -> None:
    if out is not None:
        options = {"BASELINE": baseline, "SCALE": scale, "UNBIASED": unbiased, "SINGLETON": singleton, "OMIT": omit}
        weights = (lengths, 0 if lengths is None else lengths.stride(0))
        args = (scores, scores.stride(0), *weights, order, offsets, out, eps)
        launch.once(group_normalize_fwd_kernel, offsets.shape[0] - 1, GROUP, *args, **options)


def group_normalize_bwd(
    grad: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    baseline: str,
    scale: bool,
    unbiased: bool,
    eps: float,
    singleton: str,
    omit: bool,
    d_scores: Tensor | None,
) -> None:
    if d_scores is not None:
        options = {"BASELINE": baseline, "SCALE": scale, "UNBIASED": unbiased, "SINGLETON": singleton, "OMIT": omit}
        weights = (lengths, 0 if lengths is None else lengths.stride(0))
        args = (grad, scores, scores.stride(0), *weights, order, offsets, d_scores, eps)
        launch.once(group_normalize_bwd_kernel, offsets.shape[0] - 1, GROUP, *args, **options)
