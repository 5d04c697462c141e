# SPDX-License-Identifier: Apache-2.0
"""KL per token, its gradient, and the KL reward."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import launch, math
from rlkern.kernels.launch import ROW, TOKENS, Plan, Variant, variants

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
_K1, _K3 = {"KL": "k1", "BOUNDED": False}, {"KL": "k3", "BOUNDED": True}


# ---- twins of csrc/math/kl.h ----------------------------------------------------------------------------------------
@triton.jit
def kl_raw(d, KL: tl.constexpr, BOUNDED: tl.constexpr):
    """d = ref_log_prob - log_prob. k1: -d; abs: |d|; k2: d^2 / 2; k3: exp(d) - 1 - d."""
    if KL == "k1":
        return 0.0 - d  # no -0 at 0
    elif KL == "abs":
        return tl.where(d < 0.0, -d, d)
    elif KL == "k2":
        return 0.5 * d * d
    elif BOUNDED:
        return math.exp_minus_1_minus_bounded(d)
    else:
        return math.exp_minus_1_minus(d)


@triton.jit
def kl_raw_grad(d, KL: tl.constexpr, BOUNDED: tl.constexpr):
    """d/dlog_prob = -d/dd; a NaN stays one."""
    if KL == "k1":
        return tl.where(d != d, d, 1.0)
    elif KL == "abs":
        return tl.where(d < 0.0, 1.0, tl.where(d > 0.0, -1.0, d))  # 0 at 0
    elif KL == "k2":
        return -d
    elif BOUNDED:
        return -math.expm1_bounded(d)
    else:
        return -math.expm1_of(d)


@triton.jit
def kl_value(log_prob, ref_log_prob, ratio_low, ratio_high, value_low, value_high, KL: tl.constexpr, BOUNDED: tl.constexpr):
    d = math.clamped(ref_log_prob - log_prob, ratio_low, ratio_high)
    return math.clamped(kl_raw(d, KL, BOUNDED), value_low, value_high)


@triton.jit
def importance_weight(log_prob, old_log_prob, most):
    w = math.exp_of(log_prob - old_log_prob)
    return tl.where(w > most, most, w)


@triton.jit
def kl_weighted_value(
    log_prob, ref_log_prob, old_log_prob, most, ratio_low, ratio_high, value_low, value_high, KL: tl.constexpr, BOUNDED: tl.constexpr
):
    """w * KL with the importance weight w = min(exp(log_prob - old_log_prob), most), before the value's clamp."""
    d = math.clamped(ref_log_prob - log_prob, ratio_low, ratio_high)
    return math.clamped(importance_weight(log_prob, old_log_prob, most) * kl_raw(d, KL, BOUNDED), value_low, value_high)


@triton.jit
def kl_weighted_grads(
    log_prob, ref_log_prob, old_log_prob, most, ratio_low, ratio_high, value_low, value_high,
    KL: tl.constexpr, BOUNDED: tl.constexpr, STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Of log_prob and of ref_log_prob. The weight passes gradient where `most` does not bite; of a straight-through form it
    is a factor alone."""
    raw = ref_log_prob - log_prob
    free = math.exp_of(log_prob - old_log_prob)
    w = tl.where(free > most, most, free)
    if STRAIGHT:
        return w * -raw, w * raw
    else:
        d = math.clamped(raw, ratio_low, ratio_high)
        kl, slope = kl_raw(d, KL, BOUNDED), kl_raw_grad(d, KL, BOUNDED)
        value = w * kl
        both = slope + kl
        if KL == "k3":
            both = -d  # 1 - exp(d) and exp(d) - 1 - d together, without the cancellation
        both = tl.where(free > most, slope, both)
        outside = (raw < ratio_low) | (raw > ratio_high) | (value < value_low) | (value > value_high)
        return tl.where(outside, 0.0, w * both), tl.where(outside, 0.0, w * -slope)


@triton.jit
def kl_grad(
    log_prob, ref_log_prob, ratio_low, ratio_high, value_low, value_high, KL: tl.constexpr, BOUNDED: tl.constexpr, STRAIGHT: tl.constexpr
):
    """A clamp passes gradient on its closed interval. A straight-through form has the gradient of k2 everywhere."""
    raw = ref_log_prob - log_prob
    if STRAIGHT:
        return -raw
    else:
        d = math.clamped(raw, ratio_low, ratio_high)
        value = kl_raw(d, KL, BOUNDED)
        outside = (raw < ratio_low) | (raw > ratio_high) | (value < value_low) | (value > value_high)
        return tl.where(outside, 0.0, kl_raw_grad(d, KL, BOUNDED))


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def bounds(ratio_low, ratio_high, value_low, value_high, A: tl.constexpr):
    low, high = math.constant(ratio_low, A), math.constant(ratio_high, A)
    return low, high, math.constant(value_low, A), math.constant(value_high, A)


@launch.kernel
def kl_penalty_fwd_kernel(
    log_prob, ref_log_prob, old_log_prob, value,
    log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64, old_log_prob_stride: tl.int64, value_stride: tl.int64,
    T: tl.int64, blocks: tl.int32,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64, weight_max: tl.float64,
    KL: tl.constexpr, BOUNDED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    x = launch.load(log_prob, log_prob_stride, row, first, inside, INNER[0], ALIGNED).to(A)
    ref = launch.load(ref_log_prob, ref_log_prob_stride, row, first, inside, INNER[1], ALIGNED).to(A)
    low, high, least, most = bounds(ratio_low, ratio_high, value_low, value_high, A)
    if old_log_prob is not None:
        old = launch.load(old_log_prob, old_log_prob_stride, row, first, inside, INNER[2], ALIGNED).to(A)
        kl = kl_weighted_value(x, ref, old, math.constant(weight_max, A), low, high, least, most, KL, BOUNDED)
    else:
        kl = kl_value(x, ref, low, high, least, most, KL, BOUNDED)
    launch.store(value, value_stride, row, first, kl, inside, ALIGNED)


_PLAN = Plan(loads=("log_prob", "ref_log_prob"), stores=("value",), registers=(40, 40))
VARIANTS += variants(kl_penalty_fwd_kernel, TOKENS, _PLAN, _K1, _K3)
_PLAN = Plan(loads=("log_prob", "ref_log_prob", "old_log_prob"), stores=("value",), registers=(56, 56))
VARIANTS += variants(kl_penalty_fwd_kernel, TOKENS, _PLAN, _K3)


@launch.kernel
def kl_penalty_bwd_kernel(
    grad, log_prob, ref_log_prob, old_log_prob, d_log_prob, d_ref_log_prob,
    grad_stride: tl.int64, log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64, old_log_prob_stride: tl.int64,
    d_log_prob_stride: tl.int64, d_ref_log_prob_stride: tl.int64, T: tl.int64, blocks: tl.int32,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64, weight_max: tl.float64,
    KL: tl.constexpr, BOUNDED: tl.constexpr, STRAIGHT: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    g = launch.load(grad, grad_stride, row, first, inside, INNER[0], ALIGNED).to(A)
    x = launch.load(log_prob, log_prob_stride, row, first, inside, INNER[1], ALIGNED).to(A)
    ref = launch.load(ref_log_prob, ref_log_prob_stride, row, first, inside, INNER[2], ALIGNED).to(A)
    low, high, least, most = bounds(ratio_low, ratio_high, value_low, value_high, A)
    if old_log_prob is not None:
        old = launch.load(old_log_prob, old_log_prob_stride, row, first, inside, INNER[3], ALIGNED).to(A)
        slope, ref_slope = kl_weighted_grads(x, ref, old, math.constant(weight_max, A), low, high, least, most, KL, BOUNDED, STRAIGHT)
        d, d_ref = g * slope, g * ref_slope
    else:
        d = g * kl_grad(x, ref, low, high, least, most, KL, BOUNDED, STRAIGHT)
        d_ref = -d
    if d_log_prob is not None:
        launch.store(d_log_prob, d_log_prob_stride, row, first, d, inside, ALIGNED)
    if d_ref_log_prob is not None:
        launch.store(d_ref_log_prob, d_ref_log_prob_stride, row, first, d_ref, inside, ALIGNED)


_PLAN = Plan(loads=("grad", "log_prob", "ref_log_prob"), stores=("d_log_prob",), registers=(64, 72))
VARIANTS += variants(kl_penalty_bwd_kernel, TOKENS, _PLAN, {**_K3, "STRAIGHT": False})
_PLAN = Plan(loads=("grad", "log_prob", "ref_log_prob", "old_log_prob"), stores=("d_log_prob",), registers=(80, 88))
VARIANTS += variants(kl_penalty_bwd_kernel, TOKENS, _PLAN, {**_K3, "STRAIGHT": False}, {**_K3, "STRAIGHT": True})


@launch.kernel
def shape_rewards_fwd_kernel(
    old_log_prob, ref_log_prob, mask, out, rewards,
    old_log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64, rewards_stride: tl.int64,
    T: tl.int64, blocks: tl.int32, kl_coef: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    KL: tl.constexpr, BOUNDED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rewards a token."""
    row, first, inside = launch.block_of(T, blocks, ALIGNED, BLOCK)
    old = launch.load(old_log_prob, old_log_prob_stride, row, first, inside, INNER[0], ALIGNED).to(A)
    ref = launch.load(ref_log_prob, ref_log_prob_stride, row, first, inside, INNER[1], ALIGNED).to(A)
    valid = launch.load(mask, mask_stride, row, first, inside, INNER[2], ALIGNED) != 0
    x = launch.load(rewards, rewards_stride, row, first, inside, INNER[4], ALIGNED).to(A)
    low, high, least, most = bounds(ratio_low, ratio_high, value_low, value_high, A)
    kl = kl_value(old, ref, low, high, least, most, KL, BOUNDED)
    x = tl.where(valid, x - math.constant(kl_coef, A) * kl, x)
    launch.store(out, out_stride, row, first, x, inside, ALIGNED)


_PLAN = Plan(loads=("old_log_prob", "ref_log_prob", "mask", "rewards"), stores=("out",), registers=(64, 64))
VARIANTS += variants(shape_rewards_fwd_kernel, TOKENS, _PLAN, _K1, _K3, mask="i1")


@triton.jit
def last_valid(mask, stride, start, T, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The last valid token of a row; its last token where there is none."""
    first = (T - 1) // BLOCK * BLOCK
    found = T - T - 1
    while (first >= 0) & (found < 0):
        inside = launch.within(first, T, ALIGNED, BLOCK)
        valid = (launch.load(mask, stride, start, first, inside, INNER, ALIGNED) != 0) & inside  # one value a row is loaded as one
        last = tl.max(tl.where(valid, tl.arange(0, BLOCK), -1), 0)
        found = tl.where(last < 0, found, first + last)
        first -= BLOCK
    return tl.where(found < 0, T - 1, found)


@launch.kernel
def placed_rewards_fwd_kernel(
    old_log_prob, ref_log_prob, mask, out,
    old_log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64, mask_stride: tl.int64, out_stride: tl.int64,
    T: tl.int64, cu_seqlens, scores, scores_stride: tl.int64, kl_coef: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    KL: tl.constexpr, BOUNDED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A reward a row, at its last valid token: the end of the mask is read twice."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    last = last_valid(mask, mask_stride, start, T, INNER[2], ALIGNED, BLOCK)
    score = tl.load(scores + row * scores_stride).to(A)
    score = math.clamped(score, math.constant(clip_low, A), math.constant(clip_high, A))
    low, high, least, most = bounds(ratio_low, ratio_high, value_low, value_high, A)
    first = T - T
    while first < T:
        inside = launch.within(first, T, ALIGNED, BLOCK)
        old = launch.load(old_log_prob, old_log_prob_stride, start, first, inside, INNER[0], ALIGNED).to(A)
        ref = launch.load(ref_log_prob, ref_log_prob_stride, start, first, inside, INNER[1], ALIGNED).to(A)
        valid = launch.load(mask, mask_stride, start, first, inside, INNER[2], ALIGNED) != 0
        kl = kl_value(old, ref, low, high, least, most, KL, BOUNDED)
        x = tl.where(tl.arange(0, BLOCK) == last - first, score, 0.0)
        x = tl.where(valid, x - math.constant(kl_coef, A) * kl, x)
        launch.store(out, out_stride, start, first, x, inside, ALIGNED)
        first += BLOCK


_PLAN = Plan(loads=("mask", "old_log_prob", "ref_log_prob", "mask"), stores=("out",), row_loads=("scores",), registers=(80, 144))
VARIANTS += variants(placed_rewards_fwd_kernel, ROW, _PLAN, _K1, _K3, mask="i1")


@launch.kernel
def shape_rewards_bwd_kernel(
    grad, mask, grad_stride: tl.int64, mask_stride: tl.int64, T: tl.int64, cu_seqlens,
    scores, d_scores, scores_stride: tl.int64, d_scores_stride: tl.int64, clip_low: tl.float64, clip_high: tl.float64,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cotangent where the score went; 0 where the clip moved it, or the row has no token."""
    row, start, T = launch.row_of(T, cu_seqlens, ALIGNED)
    last = last_valid(mask, mask_stride, start, T, INNER[1], ALIGNED, BLOCK)
    score = tl.load(scores + row * scores_stride).to(A)
    moved = (score < math.constant(clip_low, A)) | (score > math.constant(clip_high, A))
    g = tl.load(launch.start_of(grad, grad_stride, start, last, INNER[0], ALIGNED), mask=T > 0, other=0).to(A)
    d = tl.where(moved, 0.0, g)
    tl.store(d_scores + row * d_scores_stride, launch.rounded(d, d_scores.dtype.element_ty))


_PLAN = Plan(loads=("mask",), stores=(), row_loads=("scores", "grad"), row_stores=("d_scores",), registers=(40, 48))
VARIANTS += variants(shape_rewards_bwd_kernel, ROW, _PLAN, {}, mask="i1")


# ---- launchers ------------------------------------------------------------------------------------------------------
def options(kl: str, kl_range: list[float]) -> dict[str, Any]:
    """BOUNDED: no exponential leaves the normal range."""
    return {"KL": kl.removesuffix("+"), "BOUNDED": kl_range[0] >= -80 and kl_range[1] <= 80}


def kl_penalty_fwd(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    old_log_prob: Tensor | None,
    kl: str,
    kl_range: list[float],
    weight_max: float,
    value: Tensor | None,
) -> None:
    tensors = (log_prob, ref_log_prob, old_log_prob, value)
    choice = {"A": launch.arithmetic(*tensors), **options(kl, kl_range)}
    launch.over_tokens(kl_penalty_fwd_kernel, launch.rows(tensors, flat=True), tensors, *kl_range, weight_max, **choice)


def kl_penalty_bwd(
    grad: Tensor,
    log_prob: Tensor,
    ref_log_prob: Tensor,
    old_log_prob: Tensor | None,
    kl: str,
    kl_range: list[float],
    weight_max: float,
    needs: list[bool],
    d_log_prob: Tensor | None,
    d_ref_log_prob: Tensor | None,
) -> None:
    tensors = (grad, log_prob, ref_log_prob, old_log_prob, d_log_prob, d_ref_log_prob)
    choice = {"STRAIGHT": kl.endswith("+"), "A": launch.arithmetic(*tensors), **options(kl, kl_range)}
    launch.over_tokens(kl_penalty_bwd_kernel, launch.rows(tensors, flat=True), tensors, *kl_range, weight_max, **choice)


def shape_rewards_fwd(
    rewards: Tensor | None,
    scores: Tensor | None,
    old_log_prob: Tensor,
    ref_log_prob: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl: str,
    kl_range: list[float],
    clip: list[float],
    out: Tensor | None,
) -> None:
    given = rewards if rewards is not None else scores
    tensors = (old_log_prob, ref_log_prob, mask, out)
    choice = {"A": launch.arithmetic(given, *tensors), **options(kl, kl_range)}
    if rewards is not None:
        tokens = (*tensors, rewards)
        launch.over_tokens(shape_rewards_fwd_kernel, launch.rows(tokens, flat=True), tokens, kl_coef, *kl_range, **choice)
    elif scores is not None:
        layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
        rest = (scores, scores.stride(0), kl_coef, *clip, *kl_range)
        launch.over_rows(placed_rewards_fwd_kernel, layout, tensors, cu_seqlens, *rest, **choice)


def shape_rewards_bwd(
    grad: Tensor, scores: Tensor, mask: Tensor, cu_seqlens: Tensor | None, clip: list[float], d_scores: Tensor | None
) -> None:
    if d_scores is None:
        return
    tensors = (grad, mask)
    rest = (scores, d_scores, scores.stride(0), d_scores.stride(0), *clip)
    A = launch.arithmetic(grad, scores)
    launch.over_rows(shape_rewards_bwd_kernel, launch.rows(tensors, cu_seqlens=cu_seqlens), tensors, cu_seqlens, *rest, A=A)
