# SPDX-License-Identifier: Apache-2.0
"""Rollout correction: a program a row sums up what the table holds and writes what a token decides; what a row decides is
written by a second launch, from the table."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, math
from rlkern.kernels.aggregation import in_lanes, largest_in_lanes, none
from rlkern.kernels.launch import SWEEP, Plan, Variant, variants

VARIANTS: list[Variant] = []
SAFETY = tl.constexpr(20.0)  # verl's bound on a log-ratio before the exponential
# The lines of the table, as in rlkern/reference/correction.py: 15, then 8 for each of k1, k2, k3, then 8 of the probabilities.
KEPT, RATIO, WEIGHT, BY_K, EACH, PROBABILITY = (tl.constexpr(x) for x in (6, 7, 8, 15, 8, 39))


# ---- twin of csrc/math/correction.h ---------------------------------------------------------------------------------
@triton.jit
def correction_weight(ratio, low, high, ICEPOP: tl.constexpr):
    """Truncated at high, where a NaN stays; IcePop: 0 outside [low, high], a NaN too."""
    if ICEPOP:
        return tl.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    else:
        return tl.where(ratio > high, high, ratio)


@triton.jit
def divergence(q, K: tl.constexpr):
    """k1 = -q, k2 = q^2 / 2, k3 = exp(q) - 1 - q; |q| <= 20."""
    if K == 1:
        return 0.0 - q
    elif K == 2:
        return 0.5 * q * q
    else:
        return math.exp_minus_1_minus_bounded(q)


@triton.jit
def token_keeps(q, low, high, K: tl.constexpr):
    v = divergence(q, K)
    return (v >= math.constant(low, q.dtype)) & (v <= math.constant(high, q.dtype))


@triton.jit
def mask_block(mask, stride, start, first, inside, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """The mask's values, 0 where there is no token."""
    x = launch.load(mask, stride, start, first, inside, INNER, ALIGNED)
    return tl.where(inside, x, 0) if INNER == 0 else x


# ---- one row --------------------------------------------------------------------------------------------------------
@triton.jit
def no_sums(A: tl.constexpr):
    """Of one divergence: sum, maximum, -minimum; of an option token_k*: the clamped sum and squares, how many lie above, below, within."""
    low = none(A) - float("inf")
    return none(tl.float64), low, low, none(tl.float64), none(tl.float64), none(tl.int32), none(tl.int32), none(tl.int32)


@triton.jit
def most_of(x, valid, ALIGNED: tl.constexpr):
    """A NaN is left out: the sum has it."""
    return largest_in_lanes(tl.where(valid & (x == x), x, float("-inf")), ALIGNED)


@triton.jit
def add_sums(sums, q, valid, keep, low, high, K: tl.constexpr, OF: tl.constexpr, ALIGNED: tl.constexpr):
    """OF: 0 nobody asks, 1 a row's option does, 2 a token's option does, which `keep` takes in."""
    total, most, least, inside, squares, above, below, within = sums
    if OF > 0:
        v = divergence(q, K)
        total += in_lanes(v, ALIGNED)  # 0 where masked
        most, least = math.maximum(most, most_of(v, valid, ALIGNED)), math.maximum(least, most_of(0.0 - v, valid, ALIGNED))
        if OF == 2:
            low, high = math.constant(low, q.dtype), math.constant(high, q.dtype)
            c = tl.where(valid, math.clamped(v, low, high), 0.0).to(tl.float64)
            inside, squares = inside + in_lanes(c, ALIGNED), squares + in_lanes(c * c, ALIGNED)
            above, below = above + in_lanes(valid & (v > high), ALIGNED), below + in_lanes(valid & (v < low), ALIGNED)
            stays = (v >= low) & (v <= high)
            within += in_lanes(valid & stays, ALIGNED)
            keep = keep & stays
    return (total, most, least, inside, squares, above, below, within), keep


@triton.jit
def put(table, rows, row, FIELD: tl.constexpr, value):
    tl.store(table + (FIELD * rows + row), value.to(tl.float64))


@triton.jit
def extremes(most, least, ON: tl.constexpr):
    """(maximum, minimum) in float64, from lanes of maxima and of the maxima of what is negated; 0 where nobody asked."""
    if ON:
        return tl.max(most, 0).to(tl.float64), 0.0 - tl.max(least, 0).to(tl.float64)
    else:
        zero = tl.full((), 0, tl.float64)
        return zero, zero


@triton.jit
def leave_sums(table, rows, row, sums, K: tl.constexpr, OF: tl.constexpr):
    total, most, least, inside, squares, above, below, within = sums
    AT: tl.constexpr = BY_K + (K - 1) * EACH
    whole = tl.sum(total, 0)
    top, bottom = extremes(most, least, OF > 0)
    put(table, rows, row, AT, whole)
    put(table, rows, row, AT + 1, top)
    put(table, rows, row, AT + 2, bottom)
    put(table, rows, row, AT + 3, tl.sum(inside, 0))
    put(table, rows, row, AT + 4, tl.sum(squares, 0))
    put(table, rows, row, AT + 5, tl.sum(above, 0))
    put(table, rows, row, AT + 6, tl.sum(below, 0))
    put(table, rows, row, AT + 7, tl.sum(within, 0))
    return whole, top


@triton.jit
def row_stays(stays, s, low, high, ON: tl.constexpr, A: tl.constexpr):
    """Rounded once, to the arithmetic's type, before it meets its limits; a NaN stays by none."""
    if ON:
        s = s.to(A)
        return stays & (s >= math.constant(low, A)) & (s <= math.constant(high, A))
    else:
        return stays


@triton.jit
def rows_stay(s, limits, ON1: tl.constexpr, ON2: tl.constexpr, ON3: tl.constexpr, A: tl.constexpr):
    """For k1, k2, k3: their sums, or their means."""
    stays = row_stays(s[0] == s[0], s[0], limits[0], limits[1], ON1, A) if ON1 else tl.full((), True, tl.int1)
    return row_stays(row_stays(stays, s[1], 0.0, limits[2], ON2, A), s[2], 0.0, limits[3], ON3, A)


@triton.jit
def mean_of(x, n):
    return x / tl.where(n > 0, n, 1.0)


@triton.jit
def most_or_nan(sum, most, n):
    return tl.where(sum == sum, tl.where(n > 0, most, 0.0), sum)


@launch.kernel
def rollout_correction_fwd_kernel(
    old_log_prob, rollout_log_prob, mask, weights, modified,
    old_log_prob_stride: tl.int64, rollout_log_prob_stride: tl.int64, mask_stride: tl.int64, weights_stride: tl.int64,
    modified_stride: tl.int64, T: tl.int64, cu_seqlens, table, rows: tl.int64, low: tl.float64, high: tl.float64,
    token1_low: tl.float64, token1: tl.float64, token2: tl.float64, token3: tl.float64, sum1_low: tl.float64, sum1: tl.float64,
    sum2: tl.float64, sum3: tl.float64, mean1_low: tl.float64, mean1: tl.float64, mean2: tl.float64, mean3: tl.float64,
    max2: tl.float64, max3: tl.float64,
    LEVEL: tl.constexpr, ICEPOP: tl.constexpr, OF: tl.constexpr, ON: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OF: for k1, k2, k3, see add_sums. ON: the rows' options, in the order of the limits. weights, modified: None where a row decides."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    first = T - T
    tokens, kept, above, below = none(tl.int32), none(tl.int32), none(tl.int32), none(tl.int32)
    olds, rollouts, k3s = none(tl.float64), none(tl.float64), none(tl.float64)
    ds, dds, ws, wws, squares = none(tl.float64), none(tl.float64), none(tl.float64), none(tl.float64), none(tl.float64)
    most, least = none(A) - float("inf"), none(A) - float("inf")
    by1, by2, by3 = no_sums(A), no_sums(A), no_sums(A)
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        own = mask_block(mask, mask_stride, start, first, inside, INNER[2], ALIGNED)
        valid = own != 0
        old = tl.where(valid, launch.load(old_log_prob, old_log_prob_stride, start, first, inside, INNER[0], ALIGNED).to(A), 0.0)
        rollout = tl.where(
            valid, launch.load(rollout_log_prob, rollout_log_prob_stride, start, first, inside, INNER[1], ALIGNED).to(A), 0.0
        )
        raw = old - rollout
        q = math.clamped(raw, -SAFETY, SAFETY)
        ratio, keep = math.exp_bounded(q), valid
        d = ratio.to(tl.float64) - 1.0
        tokens, olds, rollouts = tokens + in_lanes(valid, ALIGNED), olds + in_lanes(old, ALIGNED), rollouts + in_lanes(rollout, ALIGNED)
        k3s += in_lanes(math.exp_minus_1_minus(raw), ALIGNED)
        ds, dds = ds + in_lanes(d, ALIGNED), dds + in_lanes(d * d, ALIGNED)
        if LEVEL == "token":
            lower, upper = math.constant(low, A), math.constant(high, A)
            w = tl.where(valid, correction_weight(ratio, lower, upper, ICEPOP), 0.0)
            d, d0 = tl.where(valid, w.to(tl.float64) - 1.0, 0.0), w.to(tl.float64)
            ws, wws, squares = ws + in_lanes(d, ALIGNED), wws + in_lanes(d * d, ALIGNED), squares + in_lanes(d0 * d0, ALIGNED)
            above, below = above + in_lanes(valid & (ratio > upper), ALIGNED), below + in_lanes(valid & (ratio < lower), ALIGNED)
            most, least = math.maximum(most, most_of(w, valid, ALIGNED)), math.maximum(least, most_of(0.0 - w, valid, ALIGNED))
            launch.store(weights, weights_stride, start, first, w, inside, ALIGNED)
        by1, keep = add_sums(by1, q, valid, keep, token1_low, token1, 1, OF[0], ALIGNED)
        by2, keep = add_sums(by2, q, valid, keep, 0.0, token2, 2, OF[1], ALIGNED)
        by3, keep = add_sums(by3, q, valid, keep, 0.0, token3, 3, OF[2], ALIGNED)
        kept += in_lanes(keep, ALIGNED)
        if modified is not None:
            launch.store(modified, modified_stride, start, first, tl.where(keep, own, 0), inside, ALIGNED)
        first += BLOCK
    n, olds, rollouts = tl.sum(tokens, 0).to(tl.float64), tl.sum(olds, 0), tl.sum(rollouts, 0)
    leave_row(table, rows, row, n, olds, rollouts, k3s, ds, dds, (ws, wws, squares), above, below, most, least, LEVEL)
    sum_1, _most = leave_sums(table, rows, row, by1, 1, OF[0])
    sum_2, max_2 = leave_sums(table, rows, row, by2, 2, OF[1])
    sum_3, max_3 = leave_sums(table, rows, row, by3, 3, OF[2])
    sums, means = (sum_1, sum_2, sum_3), (mean_of(sum_1, n), mean_of(sum_2, n), mean_of(sum_3, n))
    stays = rows_stay(sums, (sum1_low, sum1, sum2, sum3), ON[0], ON[1], ON[2], A)
    stays = stays & rows_stay(means, (mean1_low, mean1, mean2, mean3), ON[3], ON[4], ON[5], A)
    stays = row_stays(stays, most_or_nan(sum_2, max_2, n), 0.0, max2, ON[6], A)
    stays = row_stays(stays, most_or_nan(sum_3, max_3, n), 0.0, max3, ON[7], A)
    put(table, rows, row, KEPT, tl.where(stays, tl.sum(kept, 0), 0))
    of_row = math.exp_bounded(math.clamped((olds - rollouts).to(A), -SAFETY, SAFETY)) if LEVEL == "sequence" else n - n
    put(table, rows, row, RATIO, of_row)


@triton.jit
def leave_row(table, rows, row, n, olds, rollouts, k3s, ds, dds, of_weights, above, below, most, least, LEVEL: tl.constexpr):
    put(table, rows, row, 0, n)
    put(table, rows, row, 1, olds)
    put(table, rows, row, 2, rollouts)
    put(table, rows, row, 3, tl.sum(k3s, 0))
    put(table, rows, row, 4, tl.sum(ds, 0))
    put(table, rows, row, 5, tl.sum(dds, 0))
    put(table, rows, row, WEIGHT, tl.sum(of_weights[0], 0))
    put(table, rows, row, WEIGHT + 1, tl.sum(of_weights[1], 0))
    put(table, rows, row, WEIGHT + 2, tl.sum(above, 0))
    put(table, rows, row, WEIGHT + 3, tl.sum(below, 0))
    top, bottom = extremes(most, least, LEVEL == "token")
    put(table, rows, row, WEIGHT + 4, top)
    put(table, rows, row, WEIGHT + 5, bottom)
    put(table, rows, row, WEIGHT + 6, tl.sum(of_weights[2], 0))


@launch.kernel
def probabilities_kernel(
    old_log_prob, rollout_log_prob, mask, old_log_prob_stride: tl.int64, rollout_log_prob_stride: tl.int64, mask_stride: tl.int64,
    T: tl.int64, cu_seqlens, table, rows: tl.int64,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The probabilities themselves, side by side."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    first = T - T
    ps, rs, pps, rrs = none(tl.float64), none(tl.float64), none(tl.float64), none(tl.float64)
    prs, gaps, gap2s, most = none(tl.float64), none(tl.float64), none(tl.float64), none(A) - float("inf")
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = mask_block(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) != 0
        old = launch.load(old_log_prob, old_log_prob_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        rollout = launch.load(rollout_log_prob, rollout_log_prob_stride, start, first, inside, INNER[1], ALIGNED).to(A)
        p, r = tl.where(valid, math.exp_of(old), 0.0), tl.where(valid, math.exp_of(rollout), 0.0)
        gap = tl.abs(p - r)
        most = math.maximum(most, most_of(gap, valid, ALIGNED))
        p, r, gap = p.to(tl.float64), r.to(tl.float64), gap.to(tl.float64)
        ps, rs, gaps = ps + in_lanes(p, ALIGNED), rs + in_lanes(r, ALIGNED), gaps + in_lanes(gap, ALIGNED)
        pps, rrs, prs = pps + in_lanes(p * p, ALIGNED), rrs + in_lanes(r * r, ALIGNED), prs + in_lanes(p * r, ALIGNED)
        gap2s += in_lanes(gap * gap, ALIGNED)
        first += BLOCK
    put(table, rows, row, PROBABILITY, tl.sum(ps, 0))
    put(table, rows, row, PROBABILITY + 1, tl.sum(rs, 0))
    put(table, rows, row, PROBABILITY + 2, tl.sum(pps, 0))
    put(table, rows, row, PROBABILITY + 3, tl.sum(rrs, 0))
    put(table, rows, row, PROBABILITY + 4, tl.sum(prs, 0))
    put(table, rows, row, PROBABILITY + 5, tl.sum(gaps, 0))
    put(table, rows, row, PROBABILITY + 6, tl.sum(gap2s, 0))
    put(table, rows, row, PROBABILITY + 7, tl.max(most, 0))


# ---- what a row decides ---------------------------------------------------------------------------------------------
@launch.kernel
def row_decides_kernel(
    old_log_prob, rollout_log_prob, mask, weights, modified,
    old_log_prob_stride: tl.int64, rollout_log_prob_stride: tl.int64, mask_stride: tl.int64, weights_stride: tl.int64,
    modified_stride: tl.int64, T: tl.int64, cu_seqlens, table, rows: tl.int64, low: tl.float64, high: tl.float64,
    token1_low: tl.float64, token1: tl.float64, token2: tl.float64, token3: tl.float64,
    ICEPOP: tl.constexpr, OF: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of sequences, and the mask where an option of rows is on: a row that keeps no token keeps none."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    first = T - T
    kept = tl.load(table + (KEPT * rows + row))
    ratio = tl.load(table + (RATIO * rows + row)).to(A)
    w = correction_weight(ratio, math.constant(low, A), math.constant(high, A), ICEPOP)
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        own = mask_block(mask, mask_stride, start, first, inside, INNER[2], ALIGNED)
        valid = own != 0
        if weights is not None:
            launch.store(weights, weights_stride, start, first, tl.where(valid, w, 0.0), inside, ALIGNED)
        if modified is not None:
            keep = tl.where(valid, kept, 0.0) > 0
            if OF[0] == 2 or OF[1] == 2 or OF[2] == 2:
                old = launch.load(old_log_prob, old_log_prob_stride, start, first, inside, INNER[0], ALIGNED).to(A)
                rollout = launch.load(rollout_log_prob, rollout_log_prob_stride, start, first, inside, INNER[1], ALIGNED).to(A)
                q = math.clamped(tl.where(valid, old - rollout, 0.0), -SAFETY, SAFETY)
                if OF[0] == 2:
                    keep = keep & token_keeps(q, token1_low, token1, 1)
                if OF[1] == 2:
                    keep = keep & token_keeps(q, 0.0, token2, 2)
                if OF[2] == 2:
                    keep = keep & token_keeps(q, 0.0, token3, 3)
            launch.store(modified, modified_stride, start, first, tl.where(keep, own, 0), inside, ALIGNED)
        first += BLOCK


_TYPES, _OFF = {"mask": "i64", "modified": "i64", "table": "fp64"}, (False,) * 8
_INPUTS = ("old_log_prob", "rollout_log_prob", "mask")
_CHOICE = {"LEVEL": "token", "ICEPOP": False, "OF": (2, 0, 0), "ON": _OFF}
_PLAN = Plan(_INPUTS, ("weights", "modified"), (128, 128), (), ("table",) * PROBABILITY.value)
VARIANTS += variants(rollout_correction_fwd_kernel, SWEEP, _PLAN, _CHOICE, **_TYPES)
_PLAN, _EARLY = _PLAN._replace(stores=()), {"mask": "i64", "table": "fp64"}
_CHOICE = {"LEVEL": "sequence", "ICEPOP": False, "OF": (0, 0, 1), "ON": (*_OFF[:5], True, *_OFF[:2])}
VARIANTS += variants(rollout_correction_fwd_kernel, SWEEP, _PLAN, _CHOICE, **_EARLY)
_PLAN = Plan(_INPUTS, (), (96, 96), (), ("table",) * 8)
VARIANTS += variants(probabilities_kernel, SWEEP, _PLAN, {}, **_EARLY)
_PLAN = Plan(("mask",), ("weights", "modified"), (64, 64), ("table", "table"), ())
VARIANTS += variants(row_decides_kernel, SWEEP, _PLAN, {"ICEPOP": False, "OF": (0, 0, 1)}, **_TYPES)


# ---- launcher -------------------------------------------------------------------------------------------------------
_ROWS = ("seq_sum_k1", "seq_sum_k2", "seq_sum_k3", "seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3")


def rollout_correction_fwd(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    level: str,
    icepop: bool,
    is_range: list[float],
    options: str,
    limits: list[float],
    probabilities: bool,
    weights_dtype: torch.dtype,
    weights: Tensor | None,
    modified: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    if table is None:
        return torch.zeros(())
    given = {name: limits[2 * i : 2 * i + 2] for i, name in enumerate(options.split(",") if options else ())}
    numbers = []
    for name in (*(f"token_k{k}" for k in (1, 2, 3)), *_ROWS):
        low, high = given.get(name, (0.0, 0.0))
        numbers += [low, high] if name.endswith("k1") else [high]
    of = tuple(2 if f"token_k{k}" in given else 1 if any(name.endswith(f"k{k}") for name in given) else 0 for k in (1, 2, 3))
    on = tuple(name in given for name in _ROWS)
    choice: dict[str, Any] = {"ICEPOP": icepop, "OF": of, "A": launch.arithmetic(old_log_prob, rollout_log_prob)}
    late = (weights if level == "sequence" else None, modified if any(on) else None)
    early = (weights if level == "token" else None, None if any(on) else modified)
    for outs, kernel, rest, more in (
        (early, rollout_correction_fwd_kernel, numbers, {"LEVEL": level, "ON": on}),
        (late, row_decides_kernel, numbers[:4], {}),
    ):
        if kernel is row_decides_kernel and outs == (None, None):
            continue
        tensors = (old_log_prob, rollout_log_prob, mask, *outs)
        layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
        args = (table, table.shape[1], *is_range, *rest)
        launch.over_rows(kernel, layout, tensors, cu_seqlens, *args, block=SWEEP, **choice, **more)
    if probabilities:
        read = (old_log_prob, rollout_log_prob, mask)
        layout = launch.rows(read, cu_seqlens=cu_seqlens)
        launch.over_rows(probabilities_kernel, layout, read, cu_seqlens, table, table.shape[1], block=SWEEP, A=choice["A"])
    else:
        table[PROBABILITY.value :].zero_()
    return table[0].sum()
