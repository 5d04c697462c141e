# SPDX-License-Identifier: Apache-2.0
"""The variants of the policy loss. Where the ratio or a weight is the row's, a first kernel sums what they need; where the
gradient goes through the row, a last one spreads it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import aggregation, launch, math
from rlkern.kernels.aggregation import CHUNKS, Chunked, in_lanes, leave, none, valid_tokens
from rlkern.kernels.kl import bounds, kl_grad, kl_value, options
from rlkern.kernels.launch import SWEEP, Plan, Variant, variants
from rlkern.kernels.loss import LAYOUT, largest, leave_policy, operand, policy_results_kernel, value_of_row
from rlkern.kernels.policy_math import LOG_TINY, geo_mean_part, variant_token, vespo_weight

VARIANTS: list[Variant] = []
STATS = tl.constexpr(4)  # of a row: valid tokens, log-ratios, advantages, logs of weights
OF_ROWS = ("vespo", "geo_mean")


# ---- the row's own numbers ----------------------------------------------------------------------------------------------
@launch.kernel
def policy_rows_kernel(
    log_prob, old_log_prob, advantages, mask, weights,
    log_prob_stride: tl.int64, old_log_prob_stride: tl.int64, advantages_stride: tl.int64, mask_stride: tl.int64, weights_stride: tl.int64,
    T: tl.int64, cu_seqlens, chunks: tl.int32, parts, log_low: tl.float64, log_high: tl.float64,
    KIND: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T, first, end = aggregation.chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    none_, low, high = math.constant(0, A), math.constant(log_low, A), math.constant(log_high, A)
    c = (none_, none_, none_, none_, low, high)
    row_advantage = value_of_row(advantages, advantages_stride, row, first < end, INNER[2], A, BLOCK)
    row_w = value_of_row(weights, weights_stride, row, first < end, INNER[4], A, BLOCK)
    found, xs, gains, logs = none(tl.int32), none(tl.float64), none(tl.float64), none(tl.float64)
    if KIND == "vespo" and weights is not None and INNER[4] == 0:  # one weight a row counts once
        once = (first < end) & (tl.program_id(0) % chunks == 0)
        of_row = math.clamped(math.log_of(tl.max(row_w, 0).to(tl.float64)), LOG_TINY, 20.0)
        logs += tl.where((tl.arange(0, logs.shape[0]) == 0) & once, of_row, 0.0)
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = valid_tokens(mask, mask_stride, start, first, inside, INNER[3], ALIGNED)
        lp = launch.load(log_prob, log_prob_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        raw = tl.where(valid, lp - launch.load(old_log_prob, old_log_prob_stride, start, first, inside, INNER[1], ALIGNED).to(A), 0.0)
        if KIND == "vespo":
            raw = math.clamped(raw, -20.0, 20.0)
            if weights is not None and INNER[4] == 1:  # masked tokens too
                w = launch.load(weights, weights_stride, start, first, inside, INNER[4], ALIGNED).to(A)
                logs += in_lanes(tl.where(inside, math.clamped(math.log_of(w), LOG_TINY, 20.0), 0.0), ALIGNED)
        if KIND == "geo_mean":
            a = tl.where(valid, operand(advantages, row_advantage, advantages_stride, start, first, inside, INNER[2], ALIGNED, A), 0.0)
            raw = tl.where(valid, geo_mean_part(raw, a, c), 0.0)
            gains += in_lanes(a, ALIGNED)
            if weights is not None:
                w = operand(weights, row_w, weights_stride, start, first, inside, INNER[4], ALIGNED, A)
                logs += in_lanes(tl.where(valid, math.log_of(w + 1e-10), 0.0), ALIGNED)
        found, xs = found + in_lanes(valid, ALIGNED), xs + in_lanes(raw, ALIGNED)
        first += BLOCK
    leave(parts, 0, tl.sum(found, 0))
    leave(parts, 1, tl.sum(xs, 0))
    leave(parts, 2, tl.sum(gains, 0))
    leave(parts, 3, tl.sum(logs, 0))


@triton.jit
def total_of_row(parts, FIELD: tl.constexpr, row, chunks):
    chunk = tl.arange(0, CHUNKS)
    columns = parts + (FIELD * tl.num_programs(0).to(tl.int64) + row * chunks) + chunk
    return tl.sum(tl.load(columns, mask=chunk < chunks, other=0), 0)


@triton.jit
def row_numbers(parts, row, chunks, clamp, o0, o1, o2, o3, KIND: tl.constexpr, LEVEL: tl.constexpr):
    """(valid tokens, the log of the ratio, 1 where its clamp blocks it, the weights of vespo or the loss of geo-mean)."""
    n = total_of_row(parts, 0, row, chunks)
    x = total_of_row(parts, 1, row, chunks)
    count = tl.where(n > 0, n, 1.0)
    blocked, gain, harm = x - x, x - x, x - x
    if KIND == "vespo":
        x = math.clamped(x + total_of_row(parts, 3, row, chunks), LOG_TINY, 20.0)
        gain = vespo_weight(x, math.constant(o0, tl.float64), math.constant(o1, tl.float64))
        harm = vespo_weight(x, math.constant(o2, tl.float64), math.constant(o3, tl.float64))
    elif KIND == "geo_mean":
        gain = math.exp_of(x / count) * math.exp_of(total_of_row(parts, 3, row, chunks) / count)
        gain = -total_of_row(parts, 2, row, chunks) / count * gain
    else:
        if LEVEL == "sequence":
            x = x / count
        limit = math.constant(clamp, tl.float64)
        blocked = tl.where(x > limit, 1.0, 0.0)
        x = tl.where(x > limit, limit, x)
    return count, x, blocked, gain, harm


# ---- a block of tokens --------------------------------------------------------------------------------------------------
@triton.jit
def step(seen, tensors, of_row, c, kl_coef, kl_range, KIND: tl.constexpr, LEVEL: tl.constexpr, BY_RATIO: tl.constexpr,
         KL: tl.constexpr, BOUNDED: tl.constexpr, STRAIGHT: tl.constexpr, KL_GRAD: tl.constexpr):  # fmt: skip
    """loss, its derivative by log_prob and by the log of the ratio, KL, log-ratio, what the metrics report of it, clipped, lower."""
    lp, old, a, w, ref, marked, behave = seen
    THROUGH: tl.constexpr = KIND == "clip" or KIND == "kl_cov" or KIND == "sapo"
    raw = lp - old
    x = math.clamped(raw, 0.0 - c[3], c[3])
    blocked, level, own_x = (x < raw) | (x > raw), x, x
    if LEVEL != "token":
        nothing = tl.zeros_like(raw)
        level, own_x, r, blocked = nothing + of_row[0], raw, nothing + of_row[1], nothing + of_row[2] != 0
    else:
        r = math.exp_of(x)
    penalty = tl.zeros_like(lp)
    if KIND == "kl_cov":
        own_x = 0.0 - tl.abs(raw)
        if tensors[5] is not None:
            penalty = tl.where(marked, c[6], 0.0)
    loss, grad, clipped, lower = variant_token(level, r, lp, old, a, penalty, of_row[3], of_row[4], c, KIND)
    if THROUGH:
        grad = tl.where(blocked, 0.0, grad)
    if KIND == "clip" and tensors[5] is not None:  # clip-cov: these tokens leave the loss
        loss, grad, clipped = tl.where(marked, 0.0, loss), tl.where(marked, 0.0, grad), marked
    if tensors[3] is not None:
        loss, grad = loss * w, grad * w
    if tensors[6] is not None:
        b = math.exp_of(old - behave)
        b = tl.where(b > c[7], 0.0, b)
        loss, grad = loss * b, grad * b
    own, through, kl = grad, tl.zeros_like(grad), tl.zeros_like(grad)
    if THROUGH:
        own, through = tl.zeros_like(grad), grad
    if KL != "none":
        kl = kl_value(lp, ref, kl_range[0], kl_range[1], kl_range[2], kl_range[3], KL, BOUNDED)
        if BY_RATIO:
            kl = kl * r
    if KL_GRAD:
        slope = kl_grad(lp, ref, kl_range[0], kl_range[1], kl_range[2], kl_range[3], KL, BOUNDED, STRAIGHT)
        if BY_RATIO:
            slope = slope * r
            through += tl.where(blocked, 0.0, kl_coef * kl)
        own += kl_coef * slope
    return loss, own, through, kl, raw, own_x, clipped, lower


@triton.jit
def read_valid(x, of_row, stride, start, first, inside, valid, INNER: tl.constexpr, ALIGNED: tl.constexpr, A: tl.constexpr):
    """0 where masked; of one value a row, that."""
    return tl.where(valid, operand(x, of_row, stride, start, first, inside, INNER, ALIGNED, A), 0.0)


@triton.jit
def tokens_of(tensors, strides, row_advantage, row_w, at, INNER: tl.constexpr, ALIGNED: tl.constexpr, A: tl.constexpr):
    """What `step` takes of a block; whatever where a tensor is absent."""
    start, first, inside, valid = at
    lp = read_valid(tensors[0], row_w, strides[0], start, first, inside, valid, INNER[0], ALIGNED, A)
    old = read_valid(tensors[1], row_w, strides[1], start, first, inside, valid, INNER[1], ALIGNED, A)
    a = read_valid(tensors[2], row_advantage, strides[2], start, first, inside, valid, INNER[2], ALIGNED, A)
    w, ref, marked, b = lp, lp, valid, lp
    if tensors[3] is not None:
        w = operand(tensors[3], row_w, strides[3], start, first, inside, INNER[4], ALIGNED, A)
    if tensors[4] is not None:
        ref = launch.load(tensors[4], strides[4], start, first, inside, INNER[5], ALIGNED).to(A)
    if tensors[5] is not None:
        marked = valid & (launch.load(tensors[5], strides[5], start, first, inside, INNER[7], ALIGNED) != 0)
    if tensors[6] is not None:
        b = launch.load(tensors[6], strides[6], start, first, inside, INNER[8], ALIGNED).to(A)
    return lp, old, a, w, ref, marked, b


@triton.jit
def add(found, clips, lowers, valid, clipped, lower, ALIGNED: tl.constexpr):
    return found + in_lanes(valid, ALIGNED), clips + in_lanes(clipped & valid, ALIGNED), lowers + in_lanes(lower & valid, ALIGNED)


@triton.jit
def given_of_row(stats, row, chunks, clamp, o0, o1, o2, o3, KIND: tl.constexpr, LEVEL: tl.constexpr, A: tl.constexpr):
    """The row's own numbers as `step` takes them, and its valid tokens; nothing without `stats`."""
    if stats is None:
        nothing = math.constant(0, A)
        return 1.0, (nothing, nothing, nothing, nothing, nothing)
    else:
        count, x, blocked, gain, harm = row_numbers(stats, row, chunks, clamp, o0, o1, o2, o3, KIND, LEVEL)
        return count, (x.to(A), math.exp_of(x).to(A), blocked.to(A), gain.to(A), harm.to(A))


@launch.kernel
def policy_variant_fwd_kernel(
    log_prob, old_log_prob, advantages, mask, weights, ref_log_prob, entropy, selected, behave, d_log_prob, d_entropy,
    log_prob_stride: tl.int64, old_log_prob_stride: tl.int64, advantages_stride: tl.int64, mask_stride: tl.int64, weights_stride: tl.int64,
    ref_log_prob_stride: tl.int64, entropy_stride: tl.int64, selected_stride: tl.int64, behave_stride: tl.int64,
    d_log_prob_stride: tl.int64, d_entropy_stride: tl.int64, T: tl.int64, cu_seqlens, chunks: tl.int32, parts, row_counts, local, counts,
    dp_size: tl.float64, tokens: tl.float64, sequences: tl.float64, norm: tl.float64,
    stats, shared, low: tl.float64, high: tl.float64, cap: tl.float64, clamp: tl.float64, log_low: tl.float64, log_high: tl.float64,
    o0: tl.float64, o1: tl.float64, o2: tl.float64, o3: tl.float64, kl_coef: tl.float64, entropy_coeff: tl.float64, ratio_low: tl.float64,
    ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64, MODE: tl.constexpr, FROM: tl.constexpr, KIND: tl.constexpr,
    LEVEL: tl.constexpr, BY_RATIO: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr, STRAIGHT: tl.constexpr, KL_GRAD: tl.constexpr,
    SPREAD: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without `shared`: everything. With it, first (SPREAD False) all but d_log_prob, and in it each chunk's share of what goes
    through the row's ratio; then (SPREAD) d_log_prob alone."""
    row, start, T, first, end = aggregation.chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    c = bounds(low, high, cap, clamp, A) + bounds(log_low, log_high, o0, o1, A)
    kl_range = bounds(ratio_low, ratio_high, value_low, value_high, A)
    coef = math.constant(kl_coef, A)
    count, of_row = given_of_row(stats, row, chunks, clamp, o0, o1, o2, o3, KIND, LEVEL, A)
    if d_log_prob is not None or d_entropy is not None:
        wide = aggregation.grad_weight(row, chunks, row_counts, local, counts, dp_size, tokens, sequences, norm, MODE, FROM)
        g, d_bonus = wide.to(A), (math.constant(0 - entropy_coeff, tl.float64) * wide).to(A)
    if SPREAD:
        part = (total_of_row(shared, 0, row, chunks) * wide / (count if LEVEL == "sequence" else 1.0)).to(A)
    row_advantage = value_of_row(advantages, advantages_stride, row, first < end, INNER[2], A, BLOCK)
    row_w = value_of_row(weights, weights_stride, row, first < end, INNER[4], A, BLOCK)
    found, clips, lowers, bads = none(tl.int32), none(tl.int32), none(tl.int32), none(tl.int32)
    xs, losses, kls, bonuses, throughs = none(tl.float64), none(tl.float64), none(tl.float64), none(tl.float64), none(tl.float64)
    far, most = none(A), none(A) - float("inf")
    tensors = (log_prob, old_log_prob, advantages, weights, ref_log_prob, selected, behave)
    strides = (log_prob_stride, old_log_prob_stride, advantages_stride, weights_stride, ref_log_prob_stride, selected_stride, behave_stride)
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = valid_tokens(mask, mask_stride, start, first, inside, INNER[3], ALIGNED)
        at = (start, first, inside, valid)
        seen = tokens_of(tensors, strides, row_advantage, row_w, at, INNER, ALIGNED, A)
        loss, own, through, kl, raw, x, clipped, lower = step(
            seen, tensors, of_row, c, coef, kl_range, KIND, LEVEL, BY_RATIO, KL, BOUNDED, STRAIGHT, KL_GRAD
        )
        if SPREAD:
            launch.store(d_log_prob, d_log_prob_stride, start, first, tl.where(valid, part + own * g, 0.0), inside, ALIGNED)
        else:
            if shared is not None:
                throughs += in_lanes(tl.where(valid, through, 0.0), ALIGNED)
            elif d_log_prob is not None:
                launch.store(d_log_prob, d_log_prob_stride, start, first, tl.where(valid, (own + through) * g, 0.0), inside, ALIGNED)
            if d_entropy is not None:
                launch.store(d_entropy, d_entropy_stride, start, first, tl.where(valid, d_bonus, 0.0), inside, ALIGNED)
            if entropy is not None:
                bonuses += in_lanes(read_valid(entropy, row_w, entropy_stride, start, first, inside, valid, INNER[6], ALIGNED, A), ALIGNED)
            loss = tl.where(valid, loss, 0.0)
            found, clips, lowers = add(found, clips, lowers, valid, clipped, lower, ALIGNED)
            bads, losses = bads + in_lanes(loss - loss != 0, ALIGNED), losses + in_lanes(loss, ALIGNED)
            xs, kls = xs + in_lanes(x, ALIGNED), kls + in_lanes(tl.where(valid, kl, 0.0), ALIGNED)
            far, most = largest(far, most, raw, valid, ALIGNED)
        first += BLOCK
    if not SPREAD:
        leave_policy(parts, found, clips, lowers, xs, losses, kls, bonuses, bads, most, far)
        if shared is not None:
            leave(shared, 0, tl.sum(throughs, 0))


# ---- plans ----------------------------------------------------------------------------------------------------------
_TYPES, _LEFT = {"mask": "i64", "parts": "fp64"}, ("parts",) * 10
_CHOICE = {
    "MODE": "token-mean", "FROM": (0, 0, 0, 0), "LEVEL": "token", "BY_RATIO": False, "KL": "none", "BOUNDED": True, "STRAIGHT": False,
    "KL_GRAD": False, "SPREAD": False,
}  # fmt: skip
_PLAN = Plan(("log_prob", "old_log_prob", "advantages", "mask"), ("d_log_prob",), (96, 112), (), _LEFT)
for _kind in ("clip", "sapo", "cispo", "dppo_kl", "dro"):
    VARIANTS += variants(policy_variant_fwd_kernel, SWEEP, _PLAN, {**_CHOICE, "KIND": _kind}, **_TYPES)
_PLAN = Plan(("log_prob", "old_log_prob", "advantages", "mask"), (), (96, 112), ("stats",) * 2, (*_LEFT, "shared"))
_ROW = {**_CHOICE, "KIND": "clip", "LEVEL": "sequence"}
VARIANTS += variants(policy_variant_fwd_kernel, SWEEP, _PLAN, _ROW, **_TYPES, stats="fp64", shared="fp64")
_PLAN = Plan(("log_prob", "old_log_prob", "mask"), (), (64, 72), (), ("parts",) * 4)
VARIANTS += variants(policy_rows_kernel, SWEEP, _PLAN, {"KIND": "clip"}, **_TYPES)


# ---- launchers ------------------------------------------------------------------------------------------------------
def policy_variant_fwd(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor | None,
    advantages_row: Tensor | None,
    mask: Tensor,
    weights: Tensor | None,
    weights_row: Tensor | None,
    ref_log_prob: Tensor | None,
    entropy: Tensor | None,
    selected: Tensor | None,
    behave: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    level: str,
    flags: list[bool],
    clip: list[float],
    mode: str,
    numbers: list[float],
    kl: str,
    kl_range: list[float],
    coefs: list[float],
    loss_dtype: torch.dtype,
    needs: list[bool],
    loss: Tensor,
    sums: Tensor,
    maxes: Tensor,
    d_log_prob: Tensor | None,
    d_entropy: Tensor | None,
) -> None:
    of_rows = {i: x for i, x in ((2, advantages_row), (4, weights_row)) if x is not None}
    tokens = (log_prob, old_log_prob, advantages, mask, weights, ref_log_prob, entropy, selected, behave, d_log_prob, d_entropy)
    at = aggregation.chunked(tokens, cu_seqlens, of_rows)
    tensors = [of_rows.get(i, x) for i, x in enumerate(tokens)]
    agg = aggregation.aggregation(mode, numbers, counts)
    low, high, cap, clamp, *own = clip
    A = launch.arithmetic(*tokens[:3], advantages_row, *tokens[4:7], weights_row, behave)
    stats = shared = row_counts = local = None
    if level != "token" or kind in OF_ROWS:
        rows = at._replace(rows=at.rows._replace(strides=at.rows.strides[:5], inner=at.rows.inner[:5]))
        stats = aggregation.over_chunks(policy_rows_kernel, SWEEP, rows, tensors[:5], STATS.value, low, high, KIND=kind, A=A)
    if (d_log_prob is not None or d_entropy is not None) and agg.counts_first():
        row_counts, local = aggregation.count_first(at, agg, 3, mask)
    by_ratio = flags[1] and ref_log_prob is not None
    if level != "token" and flags[0] and (kind in ("clip", "kl_cov", "sapo") or by_ratio) and d_log_prob is not None:
        shared = torch.empty((1, at.rows.B * at.chunks), dtype=torch.float64, device=log_prob.device)
    terms: dict[str, Any] = {"KL": "none", "BOUNDED": False, "STRAIGHT": False, "KL_GRAD": False}
    if ref_log_prob is not None:
        terms = {**options(kl, kl_range), "STRAIGHT": kl.endswith("+"), "KL_GRAD": coefs[0] != 0}
    if kind in OF_ROWS:  # in the row's own numbers, and nowhere else
        tensors[4] = None
    rest = (row_counts, local, *agg.rest, stats, shared, 1 - low, 1 + high, cap, clamp, low, high, *own, *coefs, *kl_range)
    choice = {**agg.choice, **terms, "KIND": kind, "LEVEL": level, "BY_RATIO": by_ratio, "A": A}
    parts = aggregation.over_chunks(policy_variant_fwd_kernel, SWEEP, at, tensors, LAYOUT[0], *rest, **choice, SPREAD=False)
    if shared is not None:
        _spread(at, tensors, rest, choice)
    given: dict[str, Any] = {"HAS_KL": ref_log_prob is not None, "HAS_ENTROPY": entropy is not None}
    found = (loss, sums, maxes, *agg.rest, clamp if level == "token" else float("inf"), *coefs)
    aggregation.finish(policy_results_kernel, at, parts, LAYOUT, *found, **agg.choice, **given)


def _spread(at: Chunked, tensors: list[Tensor | None], rest: tuple[Any, ...], choice: dict[str, Any]) -> None:
    args = (at.rows, tensors, at.cu_seqlens, at.chunks, None, *rest)
    launch.over(at.rows.B * at.chunks, SWEEP, policy_variant_fwd_kernel, *args, **choice, SPREAD=True)
