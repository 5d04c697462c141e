# SPDX-License-Identifier: Apache-2.0
"""Importance weights behind a gate: a program a row sums up what the table holds and writes what a token decides; the weights
of tokens that a row decides are written by a second launch, from the table."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, math
from rlkern.kernels.aggregation import in_lanes, none
from rlkern.kernels.correction import mask_block, put
from rlkern.kernels.launch import SWEEP, Plan, Variant, variants

VARIANTS: list[Variant] = []


# ---- twin of csrc/math/correction.h ---------------------------------------------------------------------------------
@triton.jit
def gate_probability(log_prob):
    return math.clamped(math.exp_of(log_prob), math.constant(1e-6, log_prob.dtype), math.constant(1 - 1e-6, log_prob.dtype))


@triton.jit
def gate_term(old, rollout, q, GATING: tl.constexpr):
    """The log-ratio, or the divergence of two events, "this token" and "another"."""
    if GATING == "ratio":
        return q
    else:
        p, other = gate_probability(rollout), gate_probability(old)
        if GATING == "tv":
            return tl.abs(p - other)
        else:
            x, y = p.to(tl.float64), other.to(tl.float64)
            value = x * tl.log(x / y) + (1.0 - x) * tl.log((1.0 - x) / (1.0 - y))
            return tl.where(value < 0, 0.0, value).to(q.dtype)  # rounding makes none negative


@triton.jit
def is_filtered(s, low, high, CLIP: tl.constexpr):
    return ((s < low) | (s > high)) if CLIP else (((s >= low) & (s <= high)) == 0)


@triton.jit
def gated(w, filtered, low, high, CLIP: tl.constexpr, NAN: tl.constexpr):
    w = math.clamped(w, low, high) if CLIP else tl.where(filtered, 0.0, w)
    return tl.where(w - w == 0, w, 0.0) if NAN == "drop" else w


@triton.jit
def log_probs_of(
    old_log_prob, rollout_log_prob, old_stride, rollout_stride, start, first, inside, valid,
    NAN: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Both log-probs and their difference, 0 where masked; NAN "one": a NaN difference is 0 too."""
    old = tl.where(valid, launch.load(old_log_prob, old_stride, start, first, inside, INNER[0], ALIGNED).to(A), 0.0)
    rollout = tl.where(valid, launch.load(rollout_log_prob, rollout_stride, start, first, inside, INNER[1], ALIGNED).to(A), 0.0)
    q = old - rollout
    if NAN == "one":
        there = q == q
        return tl.where(there, old, 0.0), tl.where(there, rollout, 0.0), tl.where(there, q, 0.0)
    else:
        return old, rollout, q


# ---- one row --------------------------------------------------------------------------------------------------------
@launch.kernel
def importance_weights_fwd_kernel(
    old_log_prob, rollout_log_prob, mask, weights,
    old_log_prob_stride: tl.int64, rollout_log_prob_stride: tl.int64, mask_stride: tl.int64, weights_stride: tl.int64,
    T: tl.int64, cu_seqlens, of_rows, table, rows: tl.int64, low: tl.float64, high: tl.float64, padding: tl.float64,
    GATING: tl.constexpr, UNIT: tl.constexpr, CLIP: tl.constexpr, NAN: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights: None where a row decides. of_rows: a weight a row, or None."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    first = T - T
    low, high = math.constant(low, A), math.constant(high, A)
    tokens, outside, log_ratios, terms = none(tl.int32), none(tl.int32), none(tl.float64), none(tl.float64)
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = mask_block(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) != 0
        old, rollout, q = log_probs_of(
            old_log_prob, rollout_log_prob, old_log_prob_stride, rollout_log_prob_stride, start, first, inside, valid,
            NAN, A, INNER, ALIGNED,
        )  # fmt: skip
        term = gate_term(old, rollout, q, GATING)
        tokens, log_ratios = tokens + in_lanes(valid, ALIGNED), log_ratios + in_lanes(q, ALIGNED)
        terms += in_lanes(tl.where(valid, term, 0.0), ALIGNED)
        if UNIT == "token":
            w = math.exp_of(q)
            filtered = is_filtered(w if GATING == "ratio" else term, low, high, CLIP)
            outside += in_lanes(valid & filtered, ALIGNED)
            w = tl.where(valid, gated(w, filtered, low, high, CLIP, NAN), math.constant(padding, A))
            launch.store(weights, weights_stride, start, first, w, inside, ALIGNED)
        first += BLOCK
    n, total = tl.sum(tokens, 0).to(tl.float64), tl.sum(terms, 0)
    s = (total / n if UNIT == "mean" else total).to(A)  # NaN where a mean has no token
    put(table, rows, row, 0, n)
    put(table, rows, row, 1, tl.sum(log_ratios, 0))
    put(table, rows, row, 2, s)
    w = math.exp_of(s) if GATING == "ratio" else s
    filtered = is_filtered(w, low, high, CLIP)
    put(table, rows, row, 3, tl.sum(outside, 0) if UNIT == "token" else filtered)
    if of_rows is not None:
        tl.store(of_rows + row, launch.rounded(gated(w, filtered, low, high, CLIP, NAN), of_rows.dtype.element_ty))


@launch.kernel
def row_filters_kernel(
    old_log_prob, rollout_log_prob, mask, weights,
    old_log_prob_stride: tl.int64, rollout_log_prob_stride: tl.int64, mask_stride: tl.int64, weights_stride: tl.int64,
    T: tl.int64, cu_seqlens, table, rows: tl.int64, padding: tl.float64,
    NAN: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens' own weights, 0 in rows that are filtered."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    first = T - T
    lost = tl.load(table + (3 * rows + row))
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = mask_block(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) != 0
        _old, _rollout, q = log_probs_of(
            old_log_prob, rollout_log_prob, old_log_prob_stride, rollout_log_prob_stride, start, first, inside, valid,
            NAN, A, INNER, ALIGNED,
        )  # fmt: skip
        w = gated(math.exp_of(q), tl.where(valid, lost, 0.0) != 0, q, q, False, NAN)
        launch.store(weights, weights_stride, start, first, tl.where(valid, w, math.constant(padding, A)), inside, ALIGNED)
        first += BLOCK


_INPUTS, _TYPES = ("old_log_prob", "rollout_log_prob", "mask"), {"mask": "i64", "table": "fp64"}
_CHOICE = {"GATING": "ratio", "UNIT": "token", "CLIP": True, "NAN": "show"}
_PLAN = Plan(_INPUTS, ("weights",), (72, 72), (), ("table",) * 4)
VARIANTS += variants(importance_weights_fwd_kernel, SWEEP, _PLAN, _CHOICE, **_TYPES)
_CHOICE = {"GATING": "ratio", "UNIT": "mean", "CLIP": False, "NAN": "one"}
VARIANTS += variants(importance_weights_fwd_kernel, SWEEP, _PLAN._replace(stores=()), _CHOICE, **_TYPES)
_PLAN = Plan(_INPUTS, ("weights",), (56, 56), ("table",), ())
VARIANTS += variants(row_filters_kernel, SWEEP, _PLAN, {"NAN": "one"}, **_TYPES)


# ---- launcher -------------------------------------------------------------------------------------------------------
def importance_weights_fwd(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    gating: str,
    unit: str,
    per_row: bool,
    clip: bool,
    bounds: list[float],
    nan: str,
    padding: float,
    weights_dtype: torch.dtype,
    weights: Tensor | None,
    table: Tensor | None,
) -> None:
    if table is None:
        return
    by_token, rows = unit == "token", table.shape[1]
    choice: dict[str, Any] = {"NAN": nan, "A": launch.arithmetic(old_log_prob, rollout_log_prob)}
    tensors = (old_log_prob, rollout_log_prob, mask, weights if by_token else None)
    rest = (weights if per_row else None, table, rows, *bounds, padding)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    gate = {"GATING": gating, "UNIT": unit, "CLIP": clip}
    launch.over_rows(importance_weights_fwd_kernel, layout, tensors, cu_seqlens, *rest, block=SWEEP, **gate, **choice)
    if by_token or per_row or weights is None:
        return
    tensors = (*tensors[:3], weights)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    launch.over_rows(row_filters_kernel, layout, tensors, cu_seqlens, table, rows, padding, block=SWEEP, **choice)
