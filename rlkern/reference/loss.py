# SPDX-License-Identifier: Apache-2.0
"""Policy loss and value loss in plain torch: per-token terms, each value next to its derivative, then the aggregation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkern.reference.kl import kl_grad, kl_smooth, kl_value, wide

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# ---- one token ------------------------------------------------------------------------------------------------------
def policy_terms(log_ratio: Tensor, advantages: Tensor, clip: list[float]) -> Terms:
    """(loss, d loss / d log_prob, clamped log-ratio, clipped, clipped by the dual clip); clip = (low, high, cap, clamp)."""
    low, high, cap, clamp = clip
    x = log_ratio.clamp(-clamp, clamp)
    ratio = x.exp()
    plain, clipped_term = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    clipped = clipped_term > plain
    worse = torch.maximum(plain, clipped_term)
    most, negative = -advantages * cap, advantages < 0
    lower = (worse > most) & negative
    loss = torch.where(lower, most, worse)
    grad = torch.where((worse == most) & negative, 0.5 * plain, plain)
    blocked = clipped | lower | (log_ratio.abs() > clamp)
    return loss, torch.where(blocked, torch.zeros_like(grad), grad), x, clipped, lower


def huber(error: Tensor, delta: float) -> Tensor:
    """error^2 / 2 up to an error of size delta, its tangent beyond."""
    half = 0.5 * error.square()
    return half if delta == math.inf else torch.where(error.abs() > delta, delta * (error.abs() - 0.5 * delta), half)


def value_terms(vpreds: Tensor, returns: Tensor, values: Tensor | None, clip: float, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d vpreds, clipped); without values half the squared error, or Huber's."""
    error = vpreds - returns
    slope = error.clamp(-delta, delta)
    if values is None:
        return huber(error, delta), slope, torch.zeros_like(error, dtype=torch.bool)
    inside = torch.maximum(torch.minimum(vpreds, values + clip), values - clip)
    plain, clipped_term = error.square(), (inside - returns).square()
    clipped, moved = clipped_term > plain, inside != vpreds
    grad = torch.where((clipped_term == plain) & moved, 0.5 * slope, slope)
    grad = torch.where(clipped & moved, torch.zeros_like(grad), grad)
    loss = torch.maximum(huber(error, delta), huber(inside - returns, delta))
    return loss, torch.where(loss.isnan(), loss, grad), clipped


def select(valid: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x at valid tokens in `dtype`, 0 elsewhere."""
    return torch.where(valid, x.to(dtype), torch.zeros((), dtype=dtype, device=x.device))


# ---- aggregation ----------------------------------------------------------------------------------------------------
def wide_on(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type != "mps" else torch.float32


def row_ids(x: Tensor, cu: Tensor | None) -> Tensor | None:
    if cu is None:
        return None
    return torch.repeat_interleave(torch.arange(cu.shape[0] - 1, device=x.device), cu.diff(), output_size=x.shape[0])


def row_sums(x: Tensor, ids: Tensor | None, cu: Tensor | None) -> Tensor:
    """(rows,) in the wide type."""
    dtype = wide_on(x.device)
    if ids is not None and cu is not None:
        return torch.zeros(cu.shape[0] - 1, dtype=dtype, device=x.device).index_add(0, ids, x.to(dtype))
    return x.sum(-1, dtype=dtype).reshape(-1)


def agg_weights(mode: str, n: Tensor, numbers: list[float], counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(row weights, scale): the loss is scale * sum over rows of row_weight * row_sum.

    `numbers` = dp_size, batch_num_tokens, global_batch_size, loss_scale_factor; NaN is the local count of valid tokens or
    of non-empty rows in `n`, -infinity is in the tensor `counts`.
    """

    def number(i: int, local: Tensor) -> Tensor:
        if numbers[i] == -math.inf and counts is not None:
            return counts[i].to(n.dtype)
        return local if math.isnan(numbers[i]) else torch.full_like(local, numbers[i])

    tokens, sequences = n.sum(), (n > 0).to(n.dtype).sum()
    ones, scale = torch.ones_like(n), number(0, tokens)
    if mode == "token-mean":
        return ones, scale / number(1, tokens)
    if mode == "token-sum":
        return ones, scale
    scale = scale / number(2, sequences)
    if mode == "seq-mean-token-sum-norm":
        return ones, scale / number(3, tokens)
    return (1 / n.clamp(min=1) if mode == "seq-mean-token-mean" else ones), scale


def spread(per_row: Tensor, like: Tensor, ids: Tensor | None) -> Tensor:
    """One value a row, at each of its tokens."""
    return per_row[ids] if ids is not None else per_row.reshape(*like.shape[:-1], 1).expand_as(like)


# ---- raw ops --------------------------------------------------------------------------------------------------------
class PolicyOperands(NamedTuple):
    """What a policy loss reads: each operand per token in the arithmetic dtype, 0 at masked tokens."""

    ids: Tensor | None
    valid: Tensor
    dtype: torch.dtype
    log_prob: Tensor
    log_ratio: Tensor
    advantages: Tensor
    weights: Tensor | None
    ref_log_prob: Tensor | None
    entropy: Tensor | None


def policy_operands(log_prob: Tensor, entropy: Tensor | None, others: Sequence[Any]) -> PolicyOperands:
    """`others`: old_log_prob, advantages, their row form, mask, weights, their row form, ref_log_prob, counts, cu_seqlens."""
    old, adv, adv_row, mask, w, w_row, ref, _, cu = others
    ids, valid = row_ids(log_prob, cu), mask != 0
    adv = adv if adv is not None else spread(adv_row, log_prob, ids)
    w = w if w is not None or w_row is None else spread(w_row, log_prob, ids)
    dtype = wide(old, log_prob, adv, w, ref, entropy)
    lp, old_lp, a = (select(valid, x, dtype) for x in (log_prob, old, adv))
    rest = [None if x is None else select(valid, x, dtype) for x in (w, ref, entropy)]
    return PolicyOperands(ids, valid, dtype, lp, lp - old_lp, a, *rest)


def policy_loss(
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
) -> Terms:
    """The raw op `_policy_loss_fwd`: (loss, sums, maxes, d_log_prob, d_entropy)."""
    cu = cu_seqlens
    others = (old_log_prob, advantages, advantages_row, mask, weights, weights_row, ref_log_prob, counts, cu)
    o = policy_operands(log_prob, entropy, others)
    value, grad, x, clipped, lower = policy_terms(o.log_ratio, o.advantages, clip)
    if o.weights is not None:
        value, grad = value * o.weights, grad * o.weights
    n = row_sums(o.valid, o.ids, cu)
    row_weight, scale = agg_weights(mode, n, numbers, counts)

    def aggregated(x: Tensor) -> Tensor:
        return (row_sums(select(o.valid, x, o.dtype), o.ids, cu) * row_weight).sum() * scale

    pg_loss = total = aggregated(value)
    kl_loss = entropy_loss = torch.zeros_like(total)
    if o.ref_log_prob is not None:
        args = (o.log_prob, o.ref_log_prob, kl, kl_range)
        kl_loss = aggregated(kl_value(*args))
        if coefs[0] != 0:
            total, grad = total + coefs[0] * kl_loss, grad + coefs[0] * kl_grad(*args)
    if o.entropy is not None:
        entropy_loss = aggregated(o.entropy)
        total = total - coefs[1] * entropy_loss if coefs[1] != 0 else total
    found = (o.valid, n > 0, clipped & o.valid, lower & o.valid, -row_sums(x, o.ids, cu))
    bad = (~value.isfinite() & o.valid).sum()
    sums = torch.stack([v.to(n.dtype) for v in (*[f.sum() for f in found], pg_loss, kl_loss, entropy_loss, bad)])
    g = spread(row_weight * scale, value, o.ids)
    d_log_prob = scattered(grad * g, o.valid, log_prob, needs[0], needs[2])
    of = log_prob if entropy is None else entropy
    d_entropy = scattered(-coefs[1] * g, o.valid, of, needs[1] and entropy is not None, needs[2])
    return total.to(loss_dtype), sums, policy_maxes(o.log_ratio, o.valid, clip[3], n.dtype), d_log_prob, d_entropy


def scattered(gradient: Tensor, valid: Tensor, of: Tensor, need: bool, keep_wide: bool) -> Tensor:
    """The gradient at valid tokens, 0 elsewhere, in the dtype of a gradient of `of`; empty where not needed."""
    dtype = dtype_of_grad(of.dtype, keep_wide)
    return torch.where(valid, gradient, torch.zeros_like(gradient)).to(dtype) if need else of.new_empty(0, dtype=dtype)


def policy_maxes(raw: Tensor, valid: Tensor, clamp: float, dtype: torch.dtype) -> Tensor:
    seen = valid & ~raw.isnan()
    if raw.numel() == 0:
        return torch.zeros(2, dtype=dtype, device=raw.device)
    most = torch.where(seen, raw, -math.inf).amax().to(dtype).clamp(max=clamp)
    return torch.stack([most.exp(), torch.where(seen, raw.abs(), torch.zeros_like(raw)).amax().to(dtype)])


def dtype_of_grad(dtype: torch.dtype, keep_wide: bool) -> torch.dtype:
    return torch.float32 if keep_wide and dtype.itemsize == 2 else dtype


def policy_loss_smooth(log_prob: Tensor, entropy: Tensor | None, others: Sequence[Any], settings: Sequence[Any]) -> Tensor:
    """The loss as autograd may differentiate it twice, in log_prob and entropy; "+" estimators stand by k2."""
    clip, mode, numbers, kl, kl_range, (kl_coef, entropy_coeff), _ = settings
    counts, cu = others[-2:]
    o = policy_operands(log_prob, entropy, others)
    value = policy_terms(o.log_ratio, o.advantages, clip)[0]
    value = value if o.weights is None else value * o.weights
    if o.ref_log_prob is not None and kl_coef != 0:
        value = value + kl_coef * kl_smooth(o.log_prob, o.ref_log_prob, kl, kl_range)
    if o.entropy is not None:
        value = value - entropy_coeff * o.entropy
    row_weight, scale = agg_weights(mode, row_sums(o.valid, o.ids, cu), numbers, counts)
    return (row_sums(select(o.valid, value, o.dtype), o.ids, cu) * row_weight).sum() * scale


def value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor | None,
    mask: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: float,
    delta: float,
    mode: str,
    numbers: list[float],
    loss_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw op `_value_loss_fwd`: (loss, sums, maxes, d_vpreds)."""
    ids, valid, dtype = row_ids(vpreds, cu_seqlens), mask != 0, wide(vpreds, returns, values)
    v, r = select(valid, vpreds, dtype), select(valid, returns, dtype)
    value, grad, clipped = value_terms(v, r, None if values is None else select(valid, values, dtype), clip, delta)
    n = row_sums(valid, ids, cu_seqlens)
    row_weight, scale = agg_weights(mode, n, numbers, counts)
    value = select(valid, value, dtype)
    loss = (row_sums(value, ids, cu_seqlens) * row_weight).sum() * scale
    predictions, bad = row_sums(v, ids, cu_seqlens).sum(), (~value.isfinite()).sum()
    sums = torch.stack([v.to(n.dtype) for v in (n.sum(), (n > 0).sum(), (clipped & valid).sum(), predictions, loss, bad)])
    error = (v - r).abs().nan_to_num(nan=0.0, posinf=math.inf)
    maxes = (error.amax() if error.numel() else error.sum()).to(n.dtype).reshape(1)
    g = spread(row_weight * scale, value, ids)
    return loss.to(loss_dtype), sums, maxes, scattered(grad * g, valid, vpreds, *needs)


def value_loss_smooth(vpreds: Tensor, others: Sequence[Any], settings: Sequence[Any]) -> Tensor:
    """The loss as autograd may differentiate it twice."""
    returns, values, mask, counts, cu = others
    clip, delta, mode, numbers, _ = settings
    ids, valid, dtype = row_ids(vpreds, cu), mask != 0, wide(vpreds, returns, values)
    v, r = select(valid, vpreds, dtype), select(valid, returns, dtype)
    value = value_terms(v, r, None if values is None else select(valid, values, dtype), clip, delta)[0]
    row_weight, scale = agg_weights(mode, row_sums(valid, ids, cu), numbers, counts)
    return (row_sums(select(valid, value, dtype), ids, cu) * row_weight).sum() * scale


def scale(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """The raw op `_scale_fwd`: x * factor in the dtype of `like`; 0 stays 0 whatever the factor is."""
    return torch.where(x == 0, x, x * factor).to(like.dtype)
