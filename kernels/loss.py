# SPDX-License-Identifier: Apache-2.0
"""Policy loss: the value, the gradient already scaled by the aggregation, and the metrics from one read of each input."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import aggregation, launch, math
from rlkern.kernels.aggregation import Layout, in_lanes, largest_in_lanes, leave, merged, none, valid_tokens
from rlkern.kernels.kl import bounds, kl_grad, kl_value, options
from rlkern.kernels.launch import SWEEP, TOKENS, Plan, Variant, variants

VARIANTS: list[Variant] = [*aggregation.VARIANTS]
# tokens, sequences, clipped, clipped_lower, neg_log_ratio, pg_loss, kl_loss, entropy_loss, nonfinite; then the log-ratio's
# maximum and its size's
LAYOUT: Layout = (11, 5, 8, 9)


# ---- twin of csrc/math/loss.h ---------------------------------------------------------------------------------------
@triton.jit
def policy_token(log_ratio, advantage, low, high, cap, clamp, BOUNDED: tl.constexpr):
    """l = max(-A r, -A clip(r)), for A < 0 at most -A cap; r = exp(x), x = the clamped log-ratio: -A times the r that wins.
    x, l, gradient, clipped, lower: the gradient is l where r itself wins, half of it where the dual clip ties, 0 elsewhere;
    clipped: the clipped term is the larger one; lower: the dual clip."""
    gain, harm = advantage > 0, advantage < 0
    x = math.clamped(log_ratio, 0.0 - clamp, clamp)
    if BOUNDED:
        r = math.exp_bounded(x)
    else:
        r = math.exp_of(x)
    best = math.clamped(r, tl.where(harm, low, float("-inf")), tl.where(harm, cap, tl.where(gain, high, float("inf"))))
    loss = -advantage * best
    blocked = (best < r) | (best > r) | (x < log_ratio) | (x > log_ratio)
    grad = tl.where(blocked, 0.0, tl.where((r == cap) & harm, 0.5 * loss, loss))
    return x, loss, grad, ((r > high) & gain) | ((r < low) & harm), (r > cap) & harm


# ---- forward --------------------------------------------------------------------------------------------------------
@triton.jit
def value_of_row(x, stride, row, there, INNER: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """Read once, where a row holds one value; a row without a token may hold none."""
    if x is not None and INNER == 0:
        return tl.full((BLOCK,), tl.load(x + row * stride, mask=there, other=0).to(A), A)
    else:
        return tl.full((), 0, A)


@triton.jit
def operand(x, of_row, stride, start, first, inside, INNER: tl.constexpr, ALIGNED: tl.constexpr, A: tl.constexpr):
    if INNER == 0:
        return of_row
    else:
        return launch.load(x, stride, start, first, inside, INNER, ALIGNED).to(A)


@triton.jit
def largest(far, most, raw, valid, ALIGNED: tl.constexpr):
    """The size of a log-ratio and a log-ratio at their largest; NaN is left out."""
    shown = raw == raw
    far = math.maximum(far, largest_in_lanes(tl.where(shown, tl.abs(raw), 0.0), ALIGNED))
    return far, math.maximum(most, largest_in_lanes(tl.where(valid & shown, raw, float("-inf")), ALIGNED))


@triton.jit
def leave_policy(parts, tokens, clipped, lower, x, loss, kl, bonus, bad, most, far):
    leave(parts, 0, tl.sum(tokens, 0))
    leave(parts, 2, tl.sum(clipped, 0))
    leave(parts, 3, tl.sum(lower, 0))
    leave(parts, 4, 0.0 - tl.sum(x, 0))
    leave(parts, 5, tl.sum(loss, 0))
    leave(parts, 6, tl.sum(kl, 0))
    leave(parts, 7, tl.sum(bonus, 0))
    leave(parts, 8, tl.sum(bad, 0))
    leave(parts, 9, tl.max(most, 0))
    leave(parts, 10, tl.max(far, 0))


@launch.kernel
def policy_loss_fwd_kernel(
    log_prob, old_log_prob, advantages, mask, weights, ref_log_prob, entropy, d_log_prob, d_entropy,
    log_prob_stride: tl.int64, old_log_prob_stride: tl.int64, advantages_stride: tl.int64, mask_stride: tl.int64,
    weights_stride: tl.int64, ref_log_prob_stride: tl.int64, entropy_stride: tl.int64,
    d_log_prob_stride: tl.int64, d_entropy_stride: tl.int64, T: tl.int64, cu_seqlens, chunks: tl.int32, parts,
    row_counts, local, counts, dp_size: tl.float64, tokens: tl.float64, sequences: tl.float64, norm: tl.float64,
    low: tl.float64, high: tl.float64, cap: tl.float64, clamp: tl.float64, kl_coef: tl.float64, entropy_coeff: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    MODE: tl.constexpr, FROM: tl.constexpr, EXP_BOUNDED: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr, STRAIGHT: tl.constexpr,
    KL_GRAD: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, T, first, end = aggregation.chunk_of(T, cu_seqlens, chunks, ALIGNED, BLOCK)
    low, high, cap, clamp = bounds(low, high, cap, clamp, A)
    if KL != "none":
        ratio_low, ratio_high, value_low, value_high = bounds(ratio_low, ratio_high, value_low, value_high, A)
    if d_log_prob is not None or d_entropy is not None:
        g = aggregation.grad_weight(row, chunks, row_counts, local, counts, dp_size, tokens, sequences, norm, MODE, FROM).to(A)
        d_bonus = (math.constant(0 - entropy_coeff, tl.float64) * g).to(A)
    row_advantage = value_of_row(advantages, advantages_stride, row, first < end, INNER[2], A, BLOCK)
    row_w = value_of_row(weights, weights_stride, row, first < end, INNER[4], A, BLOCK)
    found, clips, lowers, bads = none(tl.int32), none(tl.int32), none(tl.int32), none(tl.int32)
    xs, losses, kls, bonuses = none(tl.float64), none(tl.float64), none(tl.float64), none(tl.float64)
    far, most = none(A), none(A) - float("inf")
    while first < end:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = valid_tokens(mask, mask_stride, start, first, inside, INNER[3], ALIGNED)
        lp = launch.load(log_prob, log_prob_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        old = launch.load(old_log_prob, old_log_prob_stride, start, first, inside, INNER[1], ALIGNED).to(A)
        advantage = operand(advantages, row_advantage, advantages_stride, start, first, inside, INNER[2], ALIGNED, A)
        raw = tl.where(valid, lp - old, 0.0)  # r = 1 where masked: no clip counts it
        x, loss, d, clipped, lower = policy_token(raw, advantage, low, high, cap, clamp, EXP_BOUNDED)
        if weights is not None:
            w = operand(weights, row_w, weights_stride, start, first, inside, INNER[4], ALIGNED, A)
            loss, d = loss * w, d * w
        if KL != "none":
            ref = launch.load(ref_log_prob, ref_log_prob_stride, start, first, inside, INNER[5], ALIGNED).to(A)
            kl = kl_value(lp, ref, ratio_low, ratio_high, value_low, value_high, KL, BOUNDED)
            kls += in_lanes(tl.where(valid, kl, 0.0), ALIGNED)
        if KL_GRAD:
            d += math.constant(kl_coef, A) * kl_grad(lp, ref, ratio_low, ratio_high, value_low, value_high, KL, BOUNDED, STRAIGHT)
        if entropy is not None:
            bonus = launch.load(entropy, entropy_stride, start, first, inside, INNER[6], ALIGNED)
            bonuses += in_lanes(tl.where(valid, bonus, 0.0), ALIGNED)
        if d_log_prob is not None:
            launch.store(d_log_prob, d_log_prob_stride, start, first, tl.where(valid, d * g, 0.0), inside, ALIGNED)
        if d_entropy is not None:
            launch.store(d_entropy, d_entropy_stride, start, first, tl.where(valid, d_bonus, 0.0), inside, ALIGNED)
        loss = tl.where(valid, loss, 0.0)
        found, clips, lowers = found + in_lanes(valid, ALIGNED), clips + in_lanes(clipped, ALIGNED), lowers + in_lanes(lower, ALIGNED)
        bads, xs, losses = bads + in_lanes(loss - loss != 0, ALIGNED), xs + in_lanes(x, ALIGNED), losses + in_lanes(loss, ALIGNED)
        far, most = largest(far, most, raw, valid, ALIGNED)
        first += BLOCK
    leave_policy(parts, found, clips, lowers, xs, losses, kls, bonuses, bads, most, far)


@launch.kernel
def policy_results_kernel(
    parts, rows: tl.int64, chunks: tl.int64, loss, sums, maxes,
    counts, dp_size: tl.float64, tokens: tl.float64, sequences: tl.float64, norm: tl.float64,
    clamp: tl.float64, kl_coef: tl.float64, entropy_coeff: tl.float64, HAS_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    MODE: tl.constexpr, FROM: tl.constexpr, LAYOUT: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    begun = aggregation.start_merge(parts, 0, rows, chunks, MODE, LAYOUT, STAGED)
    n = merged(begun, 0, LAYOUT, STAGED)
    b = merged(begun, 1, LAYOUT, STAGED)
    scale = aggregation.agg_scale(counts, dp_size, tokens, sequences, norm, n, b, MODE, FROM)
    pg = merged(begun, 5, LAYOUT, STAGED) * scale
    kl = merged(begun, 6, LAYOUT, STAGED) * scale
    bonus = merged(begun, 7, LAYOUT, STAGED) * scale
    total = pg
    if HAS_KL:
        total = tl.where(kl_coef != 0, total + math.constant(kl_coef, tl.float64) * kl, total)
    if HAS_ENTROPY:
        total = tl.where(entropy_coeff != 0, total - math.constant(entropy_coeff, tl.float64) * bonus, total)
    tl.store(loss, launch.rounded(total, loss.dtype.element_ty))
    tl.store(sums, n)
    tl.store(sums + 1, b)
    for field in tl.static_range(2, 5):
        tl.store(sums + field, merged(begun, field, LAYOUT, STAGED))
    tl.store(sums + 5, pg)
    tl.store(sums + 6, kl if HAS_KL else 0.0)
    tl.store(sums + 7, bonus if HAS_ENTROPY else 0.0)
    tl.store(sums + 8, merged(begun, 8, LAYOUT, STAGED))
    most = merged(begun, 9, LAYOUT, STAGED)
    most = math.clamped(most, float("-inf"), math.constant(clamp, tl.float64))
    tl.store(maxes, tl.where(n > 0, math.exp_of(most), 0.0))
    far = merged(begun, 10, LAYOUT, STAGED)
    tl.store(maxes + 1, tl.where(n > 0, far, 0.0))  # no row leaves -inf


# ---- backward: the gradient times the loss's cotangent ----------------------------------------------------------------
@launch.kernel
def scale_fwd_kernel(
    x, out, x_stride: tl.int64, out_stride: tl.int64, T: tl.int64, blocks: tl.int32, factor,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """0 stays 0 whatever the factor is."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    v = launch.load(x, x_stride, row, first, inside, INNER[0], ALIGNED).to(A)
    launch.store(out, out_stride, row, first, tl.where(v == 0, v, v * tl.load(factor).to(A)), inside, ALIGNED)


# ---- plans ----------------------------------------------------------------------------------------------------------
_CHOICE = {"MODE": "token-mean", "FROM": (0, 0, 0, 0), "EXP_BOUNDED": True, "KL": "none", "KL_GRAD": False}
_COUNTED = {"MODE": "seq-mean-token-mean", "FROM": (0, 0, 1, 0)}  # the mask counted beforehand: the row's chunks, and two numbers
_TERMS = {**_COUNTED, "EXP_BOUNDED": False, "KL": "k3", "BOUNDED": True, "STRAIGHT": False, "KL_GRAD": True}
_LEFT, _TYPES = ("parts",) * 10, {"mask": "i64", "parts": "fp64"}

# The loop's loads: each input once.
_PLAN = Plan(("log_prob", "old_log_prob", "advantages", "mask"), ("d_log_prob",), (72, 80), (), _LEFT)
VARIANTS += variants(policy_loss_fwd_kernel, SWEEP, _PLAN, _CHOICE, **_TYPES)
_PLAN = _PLAN._replace(row_loads=("row_counts", "local"))
VARIANTS += variants(policy_loss_fwd_kernel, SWEEP, _PLAN, {**_CHOICE, **_COUNTED}, **_TYPES, row_counts="fp64", local="fp64")
_PLAN = Plan(
    ("log_prob", "old_log_prob", "mask", "ref_log_prob", "entropy"), ("d_log_prob", "d_entropy"), (112, 112),
    ("advantages", "weights", "row_counts", "local"), _LEFT,
)  # fmt: skip
_ROWS = {"INNER": (1, 1, 0, 1, 0, 1, 1, 1, 1)}
VARIANTS += variants(policy_loss_fwd_kernel, SWEEP, _PLAN, {**_TERMS, **_ROWS}, **_TYPES, row_counts="fp64", local="fp64")

_PLAN = Plan((), (), (128, 128), (), ("loss",) + ("sums",) * 9 + ("maxes",) * 2)
_CHOICE = {**_COUNTED, "HAS_KL": True, "HAS_ENTROPY": True}
VARIANTS += aggregation.merge_variants(policy_results_kernel, LAYOUT, _PLAN, _CHOICE, sums="fp64", maxes="fp64")

_PLAN = Plan(loads=("x",), stores=("out",), row_loads=("factor",), registers=(32, 32))
VARIANTS += variants(scale_fwd_kernel, TOKENS, _PLAN, {}, factor="fp32")


# ---- launchers ------------------------------------------------------------------------------------------------------
def policy_loss_fwd(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor | None,
    advantages_row: Tensor | None,
    mask: Tensor,
    weights: Tensor | None,
    weights_row: Tensor | None,
    ref_log_prob: Tensor | None,
    entropy: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
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
    tokens = (log_prob, old_log_prob, advantages, mask, weights, ref_log_prob, entropy, d_log_prob, d_entropy)
    at = aggregation.chunked(tokens, cu_seqlens, of_rows)
    agg = aggregation.aggregation(mode, numbers, counts)
    row_counts = local = None
    if (d_log_prob is not None or d_entropy is not None) and agg.counts_first():
        row_counts, local = aggregation.count_first(at, agg, 3, mask)
    low, high, cap, clamp = clip
    terms: dict[str, Any] = {"KL": "none", "BOUNDED": False, "STRAIGHT": False, "KL_GRAD": False}
    if ref_log_prob is not None:
        terms = {**options(kl, kl_range), "STRAIGHT": kl.endswith("+"), "KL_GRAD": coefs[0] != 0}
    A = launch.arithmetic(*tokens[:3], advantages_row, *tokens[4:7], weights_row)
    tensors = [of_rows.get(i, x) for i, x in enumerate(tokens)]
    rest = (row_counts, local, *agg.rest, 1 - low, 1 + high, cap, clamp, *coefs, *kl_range)
    choice = {**agg.choice, **terms, "EXP_BOUNDED": clamp <= 80, "A": A}  # 80: the exponential stays in the normal range
    parts = aggregation.over_chunks(policy_loss_fwd_kernel, SWEEP, at, tensors, LAYOUT[0], *rest, **choice)
    given: dict[str, Any] = {"HAS_KL": ref_log_prob is not None, "HAS_ENTROPY": entropy is not None}
    aggregation.finish(policy_results_kernel, at, parts, LAYOUT, loss, sums, maxes, *agg.rest, clamp, *coefs, **agg.choice, **given)


def scale_fwd(x: Tensor, factor: Tensor, like: Tensor, out: Tensor | None) -> None:
    if out is not None:
        tensors = (x, out)
        launch.over_tokens(scale_fwd_kernel, launch.rows(tensors, flat=True), tensors, factor, A=launch.arithmetic(x, factor))
