# SPDX-License-Identifier: Apache-2.0
"""GAE, right to left, with KL shaping and whitening; and what discounted_returns.py shares. The adjoints: scan_bwd.py."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlkern.kernels import chunks, kl, launch, math, moments_math, scan_whiten
from rlkern.kernels.launch import SCAN, Plan, Variant, variants

VARIANTS: list[Variant] = [*chunks.VARIANTS, *scan_whiten.VARIANTS]  # what tools/sass_check.py compiles


# ---- tokens as the recurrences read them ----------------------------------------------------------------------------
@triton.jit
def valid_of(mask, stride, start, first, inside, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    if mask is not None:
        return (launch.load(mask, stride, start, first, inside, INNER, ALIGNED) != 0) & inside
    else:
        return inside


@triton.jit
def reward_of(
    tensors, strides, start, first, inside, valid, shaping,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr, A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """0 at masked tokens under "zero", less the KL penalty at valid ones. tensors: rewards, mask, old and ref log-probs, ..."""
    x = launch.load(tensors[0], strides[0], start, first, inside, INNER[0], ALIGNED).to(A)
    if RULE == "zero":
        x = tl.where(valid, x, 0.0)
    if KL != "none":
        kl_coef, low, high, least, most = shaping
        old = launch.load(tensors[2], strides[2], start, first, inside, INNER[2], ALIGNED).to(A)
        ref = launch.load(tensors[3], strides[3], start, first, inside, INNER[3], ALIGNED).to(A)
        low, high, least, most = kl.bounds(low, high, least, most, A)
        penalty = math.constant(kl_coef, A) * kl.kl_value(old, ref, low, high, least, most, KL, BOUNDED)
        x = tl.where(valid, x - penalty, x)
    return x


# ---- GAE ------------------------------------------------------------------------------------------------------------
@triton.jit
def gae_block(
    tensors, strides, start, first, inside, next_value, advantage, known, gamma, decay, shaping,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr, LOCAL: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A block's valid tokens, values, advantages and products of decays; then what enters the next: value, advantage, is there
    a live token yet? LOCAL: what enters the part is not known; its last live token then has a decay of 1 and no next value, so
    that the part's map applies to gamma V' + gamma lam A'."""
    valid = valid_of(tensors[1], strides[1], start, first, inside, INNER[1], ALIGNED)
    v = launch.load(tensors[4], strides[4], start, first, inside, INNER[4], ALIGNED).to(A)
    if RULE == "zero":
        v = tl.where(valid, v, 0.0)
    live, found = inside, inside.to(tl.int32)
    seen = tl.where(inside, v, next_value)
    if RULE == "skip":
        live = valid
        if INNER[4] == 0:
            v = tl.where(inside, v, 0.0)  # one value a row was loaded as one
        seen, found = chunks.latest(v, live, next_value, True)
    reward = reward_of(tensors, strides, start, first, inside, valid, shaping, RULE, KL, BOUNDED, A, INNER, ALIGNED)
    delta = tl.fma(gamma, chunks.behind(seen, next_value, True), reward) - v
    c = tl.where(live, decay, 1.0)
    if LOCAL:
        found = found | known
        c = tl.where(chunks.behind(found, known, True) != 0, c, 1.0)
        known = chunks.leaving(found, True)
    y, c = chunks.scan(c, tl.where(live, delta, 0.0), advantage, True, False)
    return valid, v, y, c, chunks.leaving(seen, True), chunks.leaving(y, True), known


@launch.kernel
def gae_fwd_kernel(
    rewards, mask, old_log_prob, ref_log_prob, values, advantages, returns,
    rewards_stride: tl.int64, mask_stride: tl.int64, old_log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64,
    values_stride: tl.int64, advantages_stride: tl.int64, returns_stride: tl.int64, T: tl.int64, cu_seqlens,
    next_values, entering, partials, lam, value_stride: tl.int64, lam_stride: tl.int64, programs: tl.int64,
    value_given: tl.int32, entering_given: tl.int32, parts: tl.int64, span: tl.int64,
    gamma: tl.float64, decay: tl.float64, kl_coef: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, row, start, _T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    tensors = (rewards, mask, old_log_prob, ref_log_prob, values)
    strides = (rewards_stride, mask_stride, old_log_prob_stride, ref_log_prob_stride, values_stride)
    shaping = (kl_coef, ratio_low, ratio_high, value_low, value_high)
    gamma, decay = chunks.decays(gamma, decay, lam, lam_stride, row, A)
    next_value = chunks.entering_of(next_values, value_stride, program, value_given, A)
    advantage = chunks.entering_of(entering, 1, program, entering_given, A)
    count = tl.full((), 0.0, tl.float64)
    mean, m2 = count, count
    first = begin + (end - begin - 1 + BLOCK) // BLOCK * BLOCK - BLOCK
    while first >= begin:
        inside = launch.within(first, end, ALIGNED, BLOCK)
        valid, v, y, _c, next_value, advantage, _known = gae_block(
            tensors, strides, start, first, inside, next_value, advantage, 0, gamma, decay, shaping,
            RULE, KL, BOUNDED, False, A, INNER, ALIGNED,
        )  # fmt: skip
        launch.store(advantages, advantages_stride, start, first, y, inside, ALIGNED)
        launch.store(returns, returns_stride, start, first, y + v, inside, ALIGNED)
        if partials is not None:
            n, mu, s = scan_whiten.of_block(y, valid)
            count, mean, m2 = moments_math.merge(count, mean, m2, n, mu, s)
        first -= BLOCK
    if partials is not None:
        keep(partials, program, programs, count, mean, m2)


@triton.jit
def keep(partials, program, programs, a, b, c):
    tl.store(partials + program, a)
    tl.store(partials + programs + program, b)
    tl.store(partials + 2 * programs + program, c)


# The loop over a row has one block's accesses in its code.
_TOKENS, _OUT, _ENTERING = ("rewards", "mask", "values"), ("advantages", "returns"), ("next_values", "entering")
_MASKS = {"mask": "i1", "next_values": "fp32", "entering": "fp32"}
_PLAN = Plan(_TOKENS, _OUT, (108, 160), row_loads=_ENTERING)  # sm_100 takes 106; others 96
_KL = Plan((*_TOKENS, "old_log_prob", "ref_log_prob"), _OUT, (120, 160), row_loads=_ENTERING)
_WHITEN = Plan(_TOKENS, _OUT, (120, 168), row_loads=_ENTERING, row_stores=("partials",) * 3)
_NONE = {"KL": "none", "BOUNDED": True}
_SKIP, _ZERO = {"RULE": "skip", **_NONE}, {"RULE": "zero", **_NONE}
_K3 = {"RULE": "skip", "KL": "k3", "BOUNDED": True}
VARIANTS += variants(gae_fwd_kernel, SCAN, _PLAN, _SKIP, _ZERO, **_MASKS)
VARIANTS += variants(gae_fwd_kernel, SCAN, _KL, _K3, **_MASKS)
VARIANTS += variants(gae_fwd_kernel, SCAN, _WHITEN, _SKIP, **_MASKS, partials="fp64")


@launch.kernel
def gae_local_kernel(
    rewards, mask, old_log_prob, ref_log_prob, values,
    rewards_stride: tl.int64, mask_stride: tl.int64, old_log_prob_stride: tl.int64, ref_log_prob_stride: tl.int64,
    values_stride: tl.int64, T: tl.int64, cu_seqlens, maps, lam, lam_stride: tl.int64, programs: tl.int64, parts: tl.int64, span: tl.int64,
    gamma: tl.float64, decay: tl.float64, kl_coef: tl.float64,
    ratio_low: tl.float64, ratio_high: tl.float64, value_low: tl.float64, value_high: tl.float64,
    RULE: tl.constexpr, KL: tl.constexpr, BOUNDED: tl.constexpr,
    A: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The map of a part: the product of its decays, its sum, its first live value, and is there a live token?"""
    program, row, start, _T, begin, end = chunks.part_of(T, cu_seqlens, parts, span, ALIGNED)
    tensors = (rewards, mask, old_log_prob, ref_log_prob, values)
    strides = (rewards_stride, mask_stride, old_log_prob_stride, ref_log_prob_stride, values_stride)
    shaping = (kl_coef, ratio_low, ratio_high, value_low, value_high)
    gamma, decay = chunks.decays(gamma, decay, lam, lam_stride, row, A)
    value = tl.full((), 0.0, A)
    total, product, known = value, value + 1.0, tl.full((), 0, tl.int32)
    first = begin + (end - begin - 1 + BLOCK) // BLOCK * BLOCK - BLOCK
    while first >= begin:
        inside = launch.within(first, end, ALIGNED, BLOCK)
        _valid, _v, _y, c, value, total, known = gae_block(
            tensors, strides, start, first, inside, value, total, known, gamma, decay, shaping,
            RULE, KL, BOUNDED, True, A, INNER, ALIGNED,
        )  # fmt: skip
        product *= chunks.leaving(c, True)
        first -= BLOCK
    keep(maps, program, programs, product, total, value)
    tl.store(maps + 3 * programs + program, known.to(A))


_PLAN = Plan(_TOKENS, (), (96, 128), row_stores=("maps",) * 4)
VARIANTS += variants(gae_local_kernel, SCAN, _PLAN, _SKIP, mask="i1", maps="fp32")


# ---- launcher -------------------------------------------------------------------------------------------------------
def options(masked: str, kl_penalty: str, kl_range: list[float], shaped: bool) -> dict[str, Any]:
    return {"RULE": masked, **(kl.options(kl_penalty, kl_range) if shaped else {"KL": "none", "BOUNDED": True})}


def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    lam_row: Tensor | None,
    old_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    gamma: float,
    lam: float,
    kl_coef: float,
    kl: str,
    kl_range: list[float],
    whiten: list[bool] | None,
    eps: float,
    advantages: Tensor | None,
    returns: Tensor | None,
) -> Any:
    if advantages is None or returns is None:
        return 0.0
    tensors = (rewards, mask, old_log_prob, ref_log_prob, values, advantages, returns)
    layout = launch.rows(tensors, cu_seqlens=cu_seqlens)
    parts, span = chunks.parts_of(layout, cu_seqlens)
    A, n = launch.arithmetic(rewards, values, mask), layout.B * parts
    numbers = (gamma, gamma * lam, kl_coef, *kl_range)
    choice = {"A": A, **options(masked, kl, kl_range, old_log_prob is not None)}
    per_row = (lam_row, 0 if lam_row is None else lam_row.stride(0), n)
    next_values, entering = chunks.start(values, bootstrap, A), chunks.start(values, None, A)
    if parts > 1:
        maps = chunks.empty(values, A, 4, n)
        inputs = layout._replace(strides=layout.strides[:5], inner=layout.inner[:5])
        launch.over_parts(gae_local_kernel, inputs, parts, tensors[:5], cu_seqlens, maps, *per_row, parts, span, *numbers, **choice)
        next_values, entering = chunks.gae_entering(maps, parts, lam_row, next_values, (gamma, gamma * lam), A)
    partials = None if whiten is None else chunks.empty(values, tl.float64, 3, n)
    starts = (next_values.x, entering.x, partials, lam_row, next_values.stride, *per_row[1:], next_values.given, entering.given)
    launch.over_parts(gae_fwd_kernel, layout, parts, tensors, cu_seqlens, *starts, parts, span, *numbers, **choice)
    if partials is None or whiten is None:
        return 0.0
    return scan_whiten.whiten(partials, advantages, mask, advantages, whiten, eps, A)
