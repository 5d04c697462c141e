# SPDX-License-Identifier: Apache-2.0
"""KL estimators in plain torch, each value next to its derivative, and the KL reward."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def kl_value(log_prob: Tensor, ref_log_prob: Tensor, kl: str, kl_range: list[float], weight: Tensor | None = None) -> Tensor:
    """d = ref - log_prob, clamped; k1: -d, abs: |d|, k2: d^2 / 2, k3: exp(d) - 1 - d; times the weight; the value clamped."""
    ratio_low, ratio_high, value_low, value_high = kl_range
    d = (ref_log_prob - log_prob).clamp(ratio_low, ratio_high)
    value = _raw(d, kl.removesuffix("+"))
    return (value if weight is None else weight * value).clamp(value_low, value_high)


def kl_grad(log_prob: Tensor, ref_log_prob: Tensor, kl: str, kl_range: list[float]) -> Tensor:
    """d kl_value / d log_prob; a clamp passes it on its closed interval, "+" takes k2's everywhere. A NaN shows."""
    raw = ref_log_prob - log_prob
    if kl.endswith("+"):
        return -raw
    d = raw.clamp(*kl_range[:2])
    grad = _raw_grad(d, kl)
    return torch.where(_outside(raw, _raw(d, kl), kl_range), torch.zeros_like(grad), grad)


def importance_weight(log_prob: Tensor, old_log_prob: Tensor, weight_max: float) -> Tensor:
    return (log_prob - old_log_prob).exp().clamp(max=weight_max)


def weighted_grads(
    log_prob: Tensor, ref_log_prob: Tensor, old_log_prob: Tensor, kl: str, kl_range: list[float], weight_max: float
) -> tuple[Tensor, Tensor]:
    """d (weight * value) / d log_prob and d ref_log_prob; the weight has a gradient up to weight_max. "+": weight * k2's."""
    raw, w = ref_log_prob - log_prob, importance_weight(log_prob, old_log_prob, weight_max)
    if kl.endswith("+"):
        return w * -raw, w * raw
    d = raw.clamp(*kl_range[:2])
    value, slope = _raw(d, kl), _raw_grad(d, kl)
    both = -d if kl == "k3" else slope + value  # k3: 1 - exp(d) and exp(d) - 1 - d together, without the cancellation
    both = torch.where((log_prob - old_log_prob).exp() > weight_max, slope, both)
    outside, zero = _outside(raw, w * value, kl_range), torch.zeros_like(w)
    return torch.where(outside, zero, w * both), torch.where(outside, zero, w * -slope)


def kl_smooth(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    kl: str,
    kl_range: list[float],
    old_log_prob: Tensor | None = None,
    weight_max: float = math.inf,
) -> Tensor:
    """What autograd may differentiate twice in place of the value: the value itself, for "+" k2, its weight detached."""
    weight = None if old_log_prob is None else importance_weight(log_prob, old_log_prob, weight_max)
    if kl.endswith("+"):
        value = 0.5 * (log_prob - ref_log_prob).square()
        return value if weight is None else weight.detach() * value
    if weight is not None:
        raw = ref_log_prob - log_prob
        weight = torch.where((raw < kl_range[0]) | (raw > kl_range[1]), weight.detach(), weight)
    return kl_value(log_prob, ref_log_prob, kl, kl_range, weight)


def _outside(raw: Tensor, value: Tensor, kl_range: list[float]) -> Tensor:
    return (raw < kl_range[0]) | (raw > kl_range[1]) | (value < kl_range[2]) | (value > kl_range[3])


def _raw_grad(d: Tensor, name: str) -> Tensor:
    grad = torch.ones_like(d) if name == "k1" else -d.sign() if name == "abs" else -d if name == "k2" else -torch.expm1(d)
    return torch.where(d.isnan(), d, grad)


def _raw(d: Tensor, name: str) -> Tensor:
    if name == "k3":
        return tail_of_exp(d)
    return 0.0 - d if name == "k1" else d.abs() if name == "abs" else 0.5 * d * d


def tail_of_exp(d: Tensor) -> Tensor:
    """exp(d) - 1 - d; near 0 by its series, where the difference would cancel. Infinite at both infinities."""
    near = d.abs() < 0.02
    s = torch.where(near, d, torch.zeros((), dtype=d.dtype, device=d.device))
    series = s * s * (0.5 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s * (1 / 720 + s * (1 / 5040 + s / 40320))))))
    return torch.where(near, series, torch.where(d == math.inf, d, torch.expm1(d) - d))


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The arithmetic dtype: float64 if any operand is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def kl_penalty(
    log_prob: Tensor, ref_log_prob: Tensor, old_log_prob: Tensor | None, kl: str, kl_range: list[float], weight_max: float
) -> Tensor:
    """The raw op `_kl_penalty_fwd`."""
    given = [x for x in (log_prob, ref_log_prob, old_log_prob) if x is not None]
    dtype = wide(*given)
    log_prob, ref_log_prob, *old = (x.to(dtype) for x in given)
    weight = importance_weight(log_prob, old[0], weight_max) if old else None
    value = kl_value(log_prob, ref_log_prob, kl, kl_range, weight)
    return value.to(functools.reduce(torch.promote_types, (x.dtype for x in given)))


def kl_penalty_bwd(
    grad: Tensor,
    log_prob: Tensor,
    ref_log_prob: Tensor,
    old_log_prob: Tensor | None,
    kl: str,
    kl_range: list[float],
    weight_max: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The raw op `_kl_penalty_bwd`: (d_log_prob, d_ref_log_prob), empty where not needed."""
    dtype = wide(grad, log_prob, ref_log_prob, old_log_prob)
    x, ref, g = log_prob.to(dtype), ref_log_prob.to(dtype), grad.to(dtype)
    if old_log_prob is None:
        d = g * kl_grad(x, ref, kl, kl_range)
        d_ref = -d
    else:
        d, d_ref = (g * slope for slope in weighted_grads(x, ref, old_log_prob.to(dtype), kl, kl_range, weight_max))
    d_log_prob = d.to(log_prob.dtype) if needs[0] else log_prob.new_empty(0)
    return d_log_prob, d_ref.to(ref_log_prob.dtype) if needs[1] else ref_log_prob.new_empty(0)


def last_valid(mask: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each row: where its last valid token sits in the flattened mask (its last token where it has none), and whether
    the row has a token at all."""
    n = mask.numel()
    at = torch.arange(n, device=mask.device)
    ends = torch.arange(1, mask.shape[0] + 1, device=mask.device) * mask.shape[-1] if cu is None else cu[1:]
    lengths = torch.full_like(ends, mask.shape[-1]) if cu is None else cu[1:] - cu[:-1]
    row = torch.searchsorted(ends, at, right=True)
    found = torch.where(mask.reshape(-1) != 0, at, -1)
    last = torch.full_like(ends, -1).scatter_reduce(0, row, found, "amax")
    return torch.where(last < 0, ends - 1, last).clamp(0, max(n - 1, 0)), lengths > 0


def shape_rewards(
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
) -> Tensor:
    """The raw op `_shape_rewards_fwd`; rewards a token, or scores a row."""
    given = rewards if rewards is not None else scores
    dtype, valid = wide(given, old_log_prob, ref_log_prob, mask), mask != 0
    out_dtype = torch.promote_types(torch.promote_types(given.dtype, old_log_prob.dtype), ref_log_prob.dtype)  # type: ignore[union-attr]
    if mask.is_floating_point():
        out_dtype = torch.promote_types(out_dtype, mask.dtype)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    if rewards is not None:
        placed = rewards.to(dtype)
    else:
        placed = torch.zeros(mask.numel(), dtype=dtype, device=mask.device)
        if mask.numel():
            at, there = last_valid(mask, cu_seqlens)
            clipped = torch.where(there, scores.to(dtype).clamp(*clip), zero)  # type: ignore[union-attr]
            placed = placed.index_add(0, at, clipped)
        placed = placed.view(mask.shape)
    old, ref = (torch.where(valid, x.to(dtype), zero) for x in (old_log_prob, ref_log_prob))
    return torch.where(valid, placed - kl_coef * kl_value(old, ref, kl, kl_range), placed).to(out_dtype)


def shape_rewards_bwd(grad: Tensor, scores: Tensor, mask: Tensor, cu_seqlens: Tensor | None, clip: list[float]) -> Tensor:
    """The raw op `_shape_rewards_bwd`, for scores: the cotangent where the score went, 0 where the clip moved it."""
    if mask.numel() == 0:
        return torch.zeros_like(scores)
    at, there = last_valid(mask, cu_seqlens)
    found = grad.reshape(-1)[at]
    moved = (scores < clip[0]) | (scores > clip[1]) | ~there
    return torch.where(moved, torch.zeros_like(found), found).to(scores.dtype)
