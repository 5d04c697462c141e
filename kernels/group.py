# SPDX-License-Identifier: Apache-2.0
"""Group statistics over scores, and outcome advantages: row sums, their groups, one value broadcast over each row's mask.

A program a group walks its rows in order, in float64. `order` and `offsets` are what rlkern.group_index made: nothing here can
judge them, and other numbers read or write outside their tensors.
"""

import torch
import triton.language as tl
from torch import Tensor

from rlkern.kernels import group_math, launch, moments_math, whiten
from rlkern.kernels.launch import GROUP, NARROW, ROW, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles


# ---- kernels --------------------------------------------------------------------------------------------------------
@launch.kernel
def group_mean_std_fwd_kernel(
    scores, scores_stride: tl.int64, order, offsets, mean_out, std_out, eps: tl.float64,
    UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, mean, _baseline, m2, _weight = group_math.group_moments(scores, scores_stride, None, 0, order, first, last, BLOCK)
    tl.store(mean_out + g, launch.rounded(group_math.mean_of(count, shift, mean, SINGLETON), mean_out.dtype.element_ty))
    tl.store(std_out + g, launch.rounded(group_math.std_of(count, m2, UNBIASED, SINGLETON, eps), std_out.dtype.element_ty))


# Rows are gathered one by one: of each a number of order and one of scores, in every pass.
_INDEX = {"order": "i64", "offsets": "i64"}
_PASS = ("order", "scores") * 4  # 4 rows a thread
_HEAD = ("offsets", "offsets", "order", "scores")
_PLAN = Plan(loads=(), stores=(), row_loads=_HEAD + _PASS * 2, row_stores=("mean_out", "std_out"), registers=(64, 64))
_STD = {"UNBIASED": True, "SINGLETON": "raw"}
VARIANTS += variants(group_mean_std_fwd_kernel, GROUP, _PLAN, _STD, **_INDEX)


@launch.kernel
def group_mean_std_bwd_kernel(
    grad_mean, grad_std, scores, scores_stride: tl.int64, order, offsets, d_scores, eps: tl.float64,
    UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, mean, _baseline, m2, _weight = group_math.group_moments(scores, scores_stride, None, 0, order, first, last, BLOCK)
    slope = group_math.std_slope(count, m2, UNBIASED, eps)
    through_mean = moments_math.widened(tl.load(grad_mean + g), tl.float64) / count
    if SINGLETON == "raw":
        through_mean = tl.where(count <= 1, 0.0, through_mean)
    through_std = moments_math.widened(tl.load(grad_std + g), tl.float64)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        d = tl.where(slope == 0, 0.0, ((group_math.numbers(scores, scores_stride, rows, inside) - shift) - mean) * slope)
        tl.store(d_scores + rows, launch.rounded(through_mean + through_std * d, d_scores.dtype.element_ty), mask=inside)
        i += BLOCK


_PLAN = Plan(loads=(), stores=(), row_loads=("grad_mean", "grad_std", *_HEAD, *_PASS * 3), row_stores=("d_scores",) * 4, registers=(64, 64))
VARIANTS += variants(group_mean_std_bwd_kernel, GROUP, _PLAN, _STD, **_INDEX)


@launch.kernel
def group_normalize_fwd_kernel(
    scores, scores_stride: tl.int64, lengths, lengths_stride: tl.int64, order, offsets, out, eps: tl.float64,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, _mean, baseline, m2, _weight = group_math.group_moments(
        scores, scores_stride, lengths, lengths_stride, order, first, last, BLOCK
    )
    shift, baseline, factor = group_math.group_scale(count, shift, baseline, m2, BASELINE, SCALE, UNBIASED, eps, SINGLETON)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        y = ((group_math.numbers(scores, scores_stride, rows, inside) - shift) - baseline) * factor
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
    BASELINE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, SINGLETON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q stretch (c - weight sum(c) / sum(weight)) - q^2 sum(c stretch (s - baseline)) d std, q = 1 / (std + eps)."""
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, shift, mean, baseline, m2, whole = group_math.group_moments(
        scores, scores_stride, lengths, lengths_stride, order, first, last, BLOCK
    )
    stretch = group_math.stretch_of(count, BASELINE)
    d, e = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        c = group_math.numbers(grad, 1, rows, inside)
        d += tl.sum(c, 0)
        distance = (group_math.numbers(scores, scores_stride, rows, inside) - shift) - baseline
        e += tl.sum(tl.where(inside, c * stretch * distance, 0.0), 0)
        i += BLOCK
    q = group_math.inverse_scale(count, m2, SCALE, UNBIASED, eps)
    slope = group_math.std_slope(count, m2, UNBIASED, 0.0)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        c = group_math.numbers(grad, 1, rows, inside)
        weight = tl.full((), 1, tl.float64)
        if lengths is not None:
            weight = group_math.numbers(lengths, lengths_stride, rows, inside)
        y = q * stretch * (c - weight / whole * d)
        if SCALE:
            deviation = (group_math.numbers(scores, scores_stride, rows, inside) - shift) - mean
            y = y - q * q * e * tl.where(slope == 0, 0.0, deviation * slope)
        y = tl.where(count <= 1, c * q if SINGLETON == "raw" else 0.0, y)
        tl.store(d_scores + rows, launch.rounded(y, d_scores.dtype.element_ty), mask=inside)
        i += BLOCK


_PLAN = Plan(loads=(), stores=(), row_loads=_HEAD + _PASS * 4 + ("grad",) * 8, row_stores=("d_scores",) * 4, registers=(64, 64))
VARIANTS += variants(group_normalize_bwd_kernel, GROUP, _PLAN, _GRPO, **_INDEX)


# ---- outcome advantages ---------------------------------------------------------------------------------------------
@launch.kernel
def group_scores_kernel(
    rewards, mask, rewards_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens, scores, counts,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the rewards, and number of valid tokens where a mask is given."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    sum, count = tl.full((), 0, tl.float64), T - T
    first = T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        sum += tl.sum(moments_math.weights_of(rewards, rewards_stride, start, first, inside, tl.float64, INNER[0], ALIGNED), 0)
        if mask is not None:
            valid = launch.load(mask, mask_stride, start, first, inside, INNER[1], ALIGNED) != 0
            count += tl.sum(tl.where(inside, tl.where(valid, 1, 0), 0), 0)
        first += BLOCK
    tl.store(scores + row, sum)
    if mask is not None:
        tl.store(counts + row, count.to(tl.float64))


_PLAN = Plan(loads=("rewards",), stores=(), row_stores=("scores",), registers=(64, 64))
VARIANTS += variants(group_scores_kernel, NARROW, _PLAN, {}, scores="fp64")
_PLAN = _PLAN._replace(loads=("rewards", "mask"), row_stores=("scores", "counts"))
VARIANTS += variants(group_scores_kernel, NARROW, _PLAN, {}, mask="i64", scores="fp64", counts="fp64")


@launch.kernel
def group_advantage_fwd_kernel(
    mask, out, mask_stride: tl.int64, out_stride: tl.int64, T: tl.int64, cu_seqlens, row_values,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    value = tl.load(row_values + row)
    first = T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = launch.load(mask, mask_stride, start, first, inside, INNER[0], ALIGNED) != 0
        launch.store(out, out_stride, start, first, tl.where(valid, value, 0.0), inside, ALIGNED)
        first += BLOCK


_PLAN = Plan(loads=("mask",), stores=("out",), row_loads=("row_values",), registers=(64, 64))
VARIANTS += variants(group_advantage_fwd_kernel, ROW, _PLAN, {}, mask="i64", row_values="fp64")


# ---- launchers ------------------------------------------------------------------------------------------------------
def group_mean_std_fwd(
    scores: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    unbiased: bool,
    eps: float,
    singleton: str,
    mean: Tensor | None,
    std: Tensor | None,
) -> None:
    if mean is not None:
        options = {"UNBIASED": unbiased, "SINGLETON": singleton}
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
    d_scores: Tensor | None,
) -> None:
    if d_scores is not None:
        options = {"UNBIASED": unbiased, "SINGLETON": singleton}
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
    out: Tensor | None,
) -> None:
    if out is not None:
        options = {"BASELINE": baseline, "SCALE": scale, "UNBIASED": unbiased, "SINGLETON": singleton}
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
    d_scores: Tensor | None,
) -> None:
    if d_scores is not None:
        options = {"BASELINE": baseline, "SCALE": scale, "UNBIASED": unbiased, "SINGLETON": singleton}
        weights = (lengths, 0 if lengths is None else lengths.stride(0))
        args = (grad, scores, scores.stride(0), *weights, order, offsets, d_scores, eps)
        launch.once(group_normalize_bwd_kernel, offsets.shape[0] - 1, GROUP, *args, **options)


def group_advantage_fwd(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,
    baseline: str,
    scale: bool,
    eps: float,
    singleton: str,
    flags: list[bool] | None,
    whiten_eps: float,
    out: Tensor | None,
) -> Tensor | float:
    """The count of a whitened batch, for the CPU's judge. A row's valid tokens are equal: its value, weighted by their number."""
    rows = ids.shape[0]
    scores, counts, values = torch.empty((3, rows), dtype=torch.float64, device=ids.device).unbind(0)
    weighted = baseline == "length_weighted"
    tensors = (token_level_rewards, response_mask if weighted or flags is not None else None)
    launch.over_rows(group_scores_kernel, launch.rows(tensors, cu_seqlens=cu_seqlens), tensors, cu_seqlens, scores, counts, block=NARROW)
    lengths = counts if weighted else None
    group_normalize_fwd(scores, lengths, ids, order, offsets, baseline, scale, True, eps, singleton, values if rows else None)
    count: Tensor | float = 0.0
    if flags is not None:
        whitened = torch.empty_like(values)
        count = whiten.masked_whiten_fwd(values, counts, None, flags, whiten_eps, False, whitened if rows else None, None)
        values = whitened
    if out is not None:
        tokens = (response_mask, out)
        launch.over_rows(group_advantage_fwd_kernel, launch.rows(tokens, cu_seqlens=cu_seqlens), tokens, cu_seqlens, values)
    return count
