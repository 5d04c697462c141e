# SPDX-License-Identifier: Apache-2.0
"""Outcome advantages between their two sweeps, one float64 a row: what a group makes of its scores."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import group_math, launch, moments_math
from rlkern.kernels.group import group_normalize_fwd
from rlkern.kernels.launch import GROUP, PARTS, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles


# ---- pass@k: twin of BestTwo in csrc/math/group.h -------------------------------------------------------------------
@triton.jit
def largest(scores, order, first, last, but, BLOCK: tl.constexpr):
    """The largest score of a group without row `but`, its first row, and whether one is NaN; NaN is larger than all."""
    best, row, nans = tl.full((), float("-inf"), tl.float64), tl.full((), -1, tl.int64), tl.full((), 0, tl.int32)
    found = nans
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        s = group_math.numbers(scores, 1, rows, inside)
        nans += tl.sum((inside & (s != s)).to(tl.int32), 0)
        s = tl.where(inside & (rows != but), tl.where(s != s, float("inf"), s), float("-inf"))
        most = tl.max(s, 0)
        place = tl.min(tl.where((s == most) & inside & (rows != but), i + tl.arange(0, BLOCK), last), 0)
        better = (most > best) | ((found == 0) & (place < last))
        found += (place < last).to(tl.int32)
        row = tl.where(better, tl.load(order + place, mask=place < last, other=0), row)
        best = tl.where(better, most, best)
        i += BLOCK
    return best, row, nans


@launch.kernel
def group_lead_kernel(scores, order, offsets, values, eps: tl.float64, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(0)
    first, last = tl.load(offsets + g), tl.load(offsets + g + 1)
    count, _shift, _mean, _baseline, m2, _weight = group_math.group_moments(scores, 1, None, 0, order, first, last, False, BLOCK)
    best, winner, nans = largest(scores, order, first, last, -1, BLOCK)
    second, _row, _nans = largest(scores, order, first, last, winner, BLOCK)
    lead = (best - second) * group_math.inverse_scale(count, m2, SCALE, True, eps)
    lead = tl.where((nans > 0) | (count <= 1), float("nan"), lead)
    i = first
    while i < last:
        rows, inside = group_math.rows_at(order, i, last, BLOCK)
        tl.store(values + rows, tl.where(rows == winner, lead, 0.0), mask=inside)
        i += BLOCK


_INDEX = {"order": "i64", "offsets": "i64"}
_HEAD = ("offsets", "offsets", "order", "scores")
_PLAN = Plan((), (), (80, 80), row_loads=_HEAD + ("order", "scores") * 16 + ("order",) * 6, row_stores=("values",) * 4)
VARIANTS += variants(group_lead_kernel, GROUP, _PLAN, {"SCALE": True}, scores="fp64", values="fp64", **_INDEX)[:1]


# ---- GDPO -----------------------------------------------------------------------------------------------------------
@launch.kernel
def group_weigh_kernel(parts, weights, weights_stride: tl.int64, values, rows: tl.int64, K: tl.int64, BLOCK: tl.constexpr):
    """The weighted sum of K numbers a row, those of a component side by side."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    k = K - K
    while k < K:
        weight = moments_math.widened(tl.load(weights + k * weights_stride), tl.float64)
        total += weight * tl.load(parts + k * rows + row, mask=row < rows, other=0)
        k += 1
    tl.store(values + row, total, mask=row < rows)


_PLAN = Plan((), (), (64, 64), row_loads=("weights",) * 8 + ("parts",) * 32, row_stores=("values",) * 4)  # eight components at once
VARIANTS += variants(group_weigh_kernel, GROUP, _PLAN, {}, parts="fp64", weights="fp32", values="fp64")[:1]


# ---- GPG ------------------------------------------------------------------------------------------------------------
@launch.kernel
def group_stretch_kernel(scores, values, rows: tl.int64, f_norm: tl.float64, BLOCK: tl.constexpr):
    """One program: values times rows / (scores that are not 0) / f_norm."""
    nonzero = tl.full((), 0, tl.int32)
    first = rows - rows
    while first < rows:
        row = first + tl.arange(0, BLOCK)
        nonzero += tl.sum((tl.load(scores + row, mask=row < rows, other=0) != 0).to(tl.int32), 0)
        first += BLOCK
    factor = rows.to(tl.float64) / tl.maximum(nonzero, 1).to(tl.float64) / f_norm
    first = rows - rows
    while first < rows:
        row = first + tl.arange(0, BLOCK)
        tl.store(values + row, tl.load(values + row, mask=row < rows, other=0) * factor, mask=row < rows)
        first += BLOCK


_PLAN = Plan((), (), (40, 40), row_loads=("scores",) * 4 + ("values",) * 28, row_stores=("values",) * 28)  # seven blocks, unrolled
VARIANTS += variants(group_stretch_kernel, PARTS, _PLAN, {}, scores="fp64", values="fp64")[:1]


# ---- launcher -------------------------------------------------------------------------------------------------------
def values_of(
    scores: Tensor, lengths: Tensor | None, index: Any, eps: float, singleton: str, component_scores: Tensor | None,
    component_weights: Tensor | None, f_norm: float,
) -> Tensor:  # fmt: skip
    """One float64 a row of sums `scores`, or of component scores (B, K)."""
    ids, order, offsets, baseline, scale = index
    values, rows = torch.empty_like(scores), scores.shape[0]
    rest = (ids, order, offsets, baseline, scale, True, eps, singleton, False)
    if rows == 0:
        return values
    if component_scores is not None and component_weights is not None:
        parts = torch.empty((component_scores.shape[1], rows), dtype=torch.float64, device=scores.device)
        for score, part in zip(component_scores.unbind(1), parts, strict=True):
            group_normalize_fwd(score, None, *rest, part)
        numbers = (component_weights, component_weights.stride(0), values, rows, parts.shape[0])
        launch.once(group_weigh_kernel, triton.cdiv(rows, GROUP.size), GROUP, parts, *numbers)
    elif baseline == "second_best":
        launch.once(group_lead_kernel, offsets.shape[0] - 1, GROUP, scores, order, offsets, values, eps, SCALE=scale)
    else:
        group_normalize_fwd(scores, lengths, *rest, values)
    if f_norm:
        launch.once(group_stretch_kernel, 1, PARTS, scores, values, rows, f_norm)
    return values
