# SPDX-License-Identifier: Apache-2.0
"""Discounted returns, right to left, under each mask rule, with KL shaping and whitening. The adjoints: scan_bwd.py."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import chunks, launch, math, moments_math, scan_whiten
from rlkern.kernels.launch import SCAN, Plan, Variant, variants
from rlkern.kernels.scan import keep, options, reward_of, valid_of

VARIANTS: list[Variant] = []  # what tools/sass_check.py compiles
_NONE = {"KL": "none", "BOUNDED": True}
_SKIP, _ZERO, _RESET, _TURN = ({"RULE": rule, **_NONE} for rule in ("skip", "zero", "reset", "turn"))


@triton.jit
def last_of_turn(mask, stride, start, first, T, valid, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """Valid tokens with none after them in their row's run; the first token of the block to the right is read again."""
    after = first + valid.shape[0]
    if mask is not None:
        there = tl.load(launch.start_of(mask, stride, start, after, INNER, ALIGNED), mask=after < T, other=0) != 0
    else:
        there = after < T
    return valid & (chunks.behind(valid.to(tl.int32), there.to(tl.int32), True) == 0)


@triton.jit
def returns_block(
    tensors, strides, start, first, T, inside, carry, gamma, shaping,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A block's valid tokens, returns and products of decays, and what enters the next."""
    valid = valid_of(tensors[1], strides[1], start, first, inside, INNER[1], ALIGNED)
    reward = reward_of(tensors, strides, start, first, inside, valid, shaping, RULE, KL, BOUNDED, A, INNER, ALIGNED)
    live = inside
    if RULE == "skip" or RULE == "reset":
        live = valid
    elif RULE == "turn":
        live = last_of_turn(tensors[1], strides[1], start, first, T, valid, INNER[1], ALIGNED)
    c = tl.where(live, gamma, 1.0)
    if RULE == "reset":
        c = tl.where(inside & (valid == 0), 0.0, c)
    y, c = chunks.scan(c, tl.where(live, reward, 0.0), carry, True, RULE == "reset")
    out = y
    if RULE == "reset":  # a masked token shows its return, and cuts the trace
        out = tl.where(valid, y, tl.fma(gamma, chunks.behind(y, carry, True), reward))
    elif RULE == "skip" or RULE == "turn":
        out = tl.where(valid, y, 0.0)
    return valid, out, c, chunks.leaving(y, True)


@launch.kernel
def discounted_returns_fwd_kernel(
    rewards, mask, old_log_prob, ref_log_prob, returns,
    rewards_stride: tl.int64, mask_stride: tl.int64, old_log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64,
    returns_stride: tl.int64, T: tl.int64, cu_seqlens, entering, partials, entering_stride: tl.int64, programs: tl.int64,
    entering_given: tl.int32, parts: tl.int64, span: tl.int64, gamma: tl.float64, kl_coef: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, _row, start, T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    tensors = (rewards, mask, old_log_prob, ref_log_prob)
    strides = (rewards_stride, mask_stride, old_log_prob_stride, ref_log_prob_stride)
    shaping = (kl_coef, ratio_low, ratio_high, value_low, value_high)
    carry = chunks.entering_of(entering, entering_stride, program, entering_given, A)
    count = tl.full((), 0.0, tl.float64)
    mean, m2 = count, count
    first = begin + (end - begin - 1 + BLOCK) // BLOCK * BLOCK - BLOCK
    while first >= begin:
        inside = launch.within(first, end, ALIGNED, BLOCK)
        valid, y, _c, carry = returns_block(
            tensors, strides, start, first, T, inside, carry, math.constant(gamma, A), shaping, RULE, KL, BOUNDED, A, INNER, ALIGNED
        )
        launch.store(returns, returns_stride, start, first, y, inside, ALIGNED)
        if partials is not None:
            n, mu, s = scan_whiten.of_block(y, valid)
            count, mean, m2 = moments_math.merge(count, mean, m2, n, mu, s)
        first -= BLOCK
    if partials is not None:
        keep(partials, program, programs, count, mean, m2)


_TOKENS, _MASKS = ("rewards", "mask"), {"mask": "i1", "entering": "fp32"}
_PLAN = Plan(_TOKENS, ("returns",), (104, 160), row_loads=("entering",))
_TURN_PLAN = Plan(_TOKENS, ("returns",), (88, 160), row_loads=("entering", "mask"))
_WHITEN = Plan(_TOKENS, ("returns",), (88, 160), row_loads=("entering",), row_stores=("partials",) * 3)
VARIANTS += variants(discounted_returns_fwd_kernel, SCAN, _PLAN, _SKIP, _ZERO, _RESET, **_MASKS)
VARIANTS += variants(discounted_returns_fwd_kernel, SCAN, _TURN_PLAN, _TURN, **_MASKS)
VARIANTS += variants(discounted_returns_fwd_kernel, SCAN, _WHITEN, _SKIP, **_MASKS, partials="fp64")


@launch.kernel
def discounted_returns_local_kernel(
    rewards, mask, old_log_prob, ref_log_prob,
    rewards_stride: tl.int64, mask_stride: tl.int64, old_log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64,
    T: tl.int64, cu_seqlens, maps, programs: tl.int64, parts: tl.int64, span: tl.int64, gamma: tl.float64, kl_coef: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The map of a part: the product of its decays, and its sum."""
    program, _row, start, T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    tensors = (rewards, mask, old_log_prob, ref_log_prob)
    strides = (rewards_stride, mask_stride, old_log_prob_stride, ref_log_prob_stride)
    shaping = (kl_coef, ratio_low, ratio_high, value_low, value_high)
    total = tl.full((), 0.0, A)
    product = total + 1.0
    first = begin + (end - begin - 1 + BLOCK) // BLOCK * BLOCK - BLOCK
    while first >= begin:
        inside = launch.within(first, end, ALIGNED, BLOCK)
        _valid, _y, c, total = returns_block(
            tensors, strides, start, first, T, inside, total, math.constant(gamma, A), shaping, RULE, KL, BOUNDED, A, INNER, ALIGNED
        )
        product = chunks.joined(product, chunks.leaving(c, True), RULE == "reset")
        first -= BLOCK
    tl.store(maps + program, product)
    tl.store(maps + programs + program, total)


_PLAN = Plan(_TOKENS, (), (64, 96), row_stores=("maps",) * 2)
VARIANTS += variants(discounted_returns_local_kernel, SCAN, _PLAN, _SKIP, mask="i1", maps="fp32")


# ---- launcher -------------------------------------------------------------------------------------------------------
def discounted_returns_fwd(
    rewards: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    old_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    kl_coef: float,
    kl: str,
    kl_range: list[float],
    whiten: list[bool] | None,
    eps: float,
    advantages: Tensor | None,
    returns: Tensor | None,
) -> Any:
    if returns is None:
        return 0.0
    tensors = (rewards, mask, old_log_prob, ref_log_prob, returns)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    parts, span = chunks.parts_of(layout, cu_seqlens)
    A, n = launch.arithmetic(rewards, mask), layout.B * parts
    numbers = (n, parts, span, gamma, kl_coef, *kl_range)
    choice = {"A": A, **options(masked, kl, kl_range, old_log_prob is not None)}
    entering = chunks.start(rewards, bootstrap, A)
    if parts > 1:
        maps = chunks.empty(rewards, A, 2, n)
        inputs = layout._replace(strides=layout.strides[:4], inner=layout.inner[:4])
        launch.over_parts(discounted_returns_local_kernel, inputs, parts, tensors[:4], cu_seqlens, maps, *numbers, **choice)
        entering = chunks.entering(maps, parts, entering, A, CUTS=masked == "reset", REVERSE=True)
    partials = None if whiten is None else chunks.empty(rewards, tl.float64, 3, n)
    starts = (entering.x, partials, entering.stride, n, entering.given)
    launch.over_parts(discounted_returns_fwd_kernel, layout, parts, tensors, cu_seqlens, *starts, *numbers[1:], **choice)
    if partials is None or whiten is None or advantages is None:
        return 0.0
    return scan_whiten.whiten(partials, returns, mask, advantages, whiten, eps, A)
