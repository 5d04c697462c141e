# SPDX-License-Identifier: Apache-2.0
"""What the frameworks compute, as plain torch: the formulas which `rlkern verify` and `rlkern bench` compare with.

A loop over tokens is a loop here and a dict over prompts is a dict: these are the answers' definition and the slow path's
cost. Every function follows the dtype of its inputs, so float64 inputs give the exact answer. Masks may have any dtype.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    return (torch.where(mask != 0, values, 0.0) * mask).sum(axis)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    return masked_sum(values, mask, axis) / (mask.sum(axis) + 1e-8)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    if not unbiased:
        return variance
    count = mask.sum().to(torch.promote_types(values.dtype, torch.float32))
    return variance * (count / (count - 1))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """verl's: statistics over the mask, output everywhere."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


def masked_normalize(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """OpenRLHF's: each row by its own mean and population variance, masked positions 0."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = (values - (values * mask).sum(-1, keepdim=True) / count) * mask
    return centred * torch.rsqrt(((centred**2).sum(-1, keepdim=True) / count).clamp(min=eps))


# ---- scans ----------------------------------------------------------------------------------------------------------
def arithmetic(mask: Tensor) -> Tensor:
    """The mask as something that `1 - mask` works on."""
    return mask.to(torch.int64) if mask.dtype is torch.bool else mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, masked: str | None = "skip") -> tuple[Tensor, Tensor]:
    """(advantages, returns). "skip" carries over masked tokens (verl), "zero" treats them as zeros (OpenRLHF)."""
    if masked == "zero":
        rewards, values = rewards * mask, values * mask
    keep = arithmetic(mask) if masked == "skip" else None
    next_value: Any = 0.0
    advantage: Any = 0.0
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        fresh = delta + gamma * lam * advantage
        if keep is None:
            next_value, advantage = values[:, t], fresh
        else:
            next_value = keep[:, t] * values[:, t] + (1 - keep[:, t]) * next_value
            advantage = keep[:, t] * fresh + (1 - keep[:, t]) * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def gae_whitened(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """verl's compute_gae_advantage_return: advantages whitened over the mask, returns not."""
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(advantages, mask), returns


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float, masked: str | None = "skip") -> Tensor:
    """c = r + gamma c from the right; `masked` says what a masked token does to c (see rlkern.discounted_returns)."""
    m = arithmetic(mask)
    carry: Any = 0.0
    columns = []
    for t in reversed(range(rewards.shape[1])):
        m_t = m[:, t]
        if masked == "turn":
            last = m_t if t + 1 == rewards.shape[1] else m_t * (1 - m[:, t + 1])
            carry = last * (rewards[:, t] + gamma * carry) + (1 - last) * carry
            columns.append(carry * m_t)
        elif masked == "skip":
            fresh = rewards[:, t] + gamma * carry
            columns.append(fresh * m_t)
            carry = fresh * m_t + carry * (1 - m_t)
        elif masked == "reset":
            fresh = rewards[:, t] + gamma * carry
            columns.append(fresh)
            carry = fresh * m_t
        else:
            carry = (rewards[:, t] * m_t if masked == "zero" else rewards[:, t]) + gamma * carry
            columns.append(carry)
    return torch.stack(columns[::-1], dim=1)


def affine_scan(decay: Tensor, x: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1}."""
    carry: Any = 0.0
    columns = []
    for t in reversed(range(x.shape[1])):
        carry = x[:, t] + decay[:, t] * carry
        columns.append(carry)
    return torch.stack(columns[::-1], dim=1)


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """verl >= 0.9: masked tokens are skipped."""
    returns = discounted_returns(rewards, mask, gamma)
    return masked_whiten(returns, mask) * mask, returns


# ---- groups ---------------------------------------------------------------------------------------------------------
def rows_by_label(index: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for row, label in enumerate(index):
        groups.setdefault(label, []).append(row)
    return groups


def group_mean_std(scores: Tensor, index: Iterable[Hashable], eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Per group in order of first appearance; a group of one has mean 0 and std 1, the variance has a floor."""
    means, stds = [], []
    for rows in rows_by_label(index).values():
        group, alone = scores[rows], len(rows) == 1
        means.append(torch.zeros_like(group[0]) if alone else group.mean())
        stds.append(torch.ones_like(group[0]) if alone else group.var().clamp(min=eps).sqrt())
    return torch.stack(means), torch.stack(stds)


def rloo(rewards: Tensor, mask: Tensor, index: Iterable[Hashable]) -> Tensor:
    scores = rewards.sum(-1)
    advantages = scores.clone()
    for rows in rows_by_label(index).values():
        k = len(rows)
        if k > 1:
            mean = scores[rows].mean()
            for row in rows:
                advantages[row] = scores[row] * k / (k - 1) - mean * k / (k - 1)
    return advantages.unsqueeze(-1) * mask


def opo(rewards: Tensor, mask: Tensor, index: Iterable[Hashable]) -> Tensor:
    """The baseline is the group's mean weighted by response length."""
    scores, lengths = rewards.sum(-1), mask.sum(-1)
    advantages = scores.clone()
    for rows in rows_by_label(index).values():
        if len(rows) > 1:
            baseline = (lengths[rows] * scores[rows]).sum() / lengths[rows].sum()
            for row in rows:
                advantages[row] = scores[row] - baseline
    return advantages.unsqueeze(-1) * mask


def remax(rewards: Tensor, baselines: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    returns = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    return returns - baselines.unsqueeze(-1) * mask, returns


# ---- KL and losses --------------------------------------------------------------------------------------------------
def kl_penalty(log_prob: Tensor, ref_log_prob: Tensor, name: str) -> Tensor:
    difference = log_prob - ref_log_prob
    square = 0.5 * difference.square()
    plain = name.removesuffix("+")
    if plain in ("kl", "k1"):
        value = difference
    elif plain == "abs":
        value = difference.abs()
    elif plain in ("mse", "k2"):
        value = square
    else:
        d = (-difference).clamp(-20, 20)
        value = (d.exp() - d - 1).clamp(-10, 10)
    return value if plain == name else square - square.detach() + value.detach()


def shape_rewards(scores: Tensor, old: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, kl: str = "kl") -> Tensor:
    return scores - kl_coef * (kl_penalty(old, ref, kl) * mask)


def aggregate(loss: Tensor, mask: Tensor, mode: str) -> Tensor:
    """One micro-batch that is the whole batch: the counts are its own."""
    if mode == "token-mean":
        return masked_sum(loss, mask) / mask.sum()
    if mode == "token-sum":
        return masked_sum(loss, mask)
    lengths = mask.sum(-1)
    per_row = (loss * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        per_row = per_row / (lengths + 1e-8)
    mean = masked_sum(per_row, (lengths > 0).to(torch.float32)) / (lengths > 0).sum()
    return mean / loss.shape[-1] if mode == "seq-mean-token-sum-norm" else mean


def _flags(held: Tensor, like: Tensor) -> Tensor:
    """Truths as numbers: float32 as in verl, float64 where the exact answer is wanted."""
    return held.to(torch.promote_types(like.dtype, torch.float32))


def policy_loss(
    old: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, mode: str = "token-mean", clip: float = 0.2
) -> tuple[Tensor, dict[str, Any]]:
    """verl's vanilla loss: clipped ratio, dual clip at 3, log-ratio clamp at 20; one host sync a metric."""
    x = (log_prob - old).clamp(-20.0, 20.0)
    ratio = x.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    upper = torch.maximum(plain, clipped)
    bound = -advantages * 3.0
    lower = torch.minimum(upper, bound)
    loss = aggregate(torch.where(advantages < 0, lower, upper), mask, mode)
    over = (upper > bound) * (advantages < 0)
    metrics = {
        "actor/pg_clipfrac": masked_mean(_flags(clipped > plain, plain), mask).item(),
        "actor/ppo_kl": masked_mean(-x, mask).detach().item(),
        "actor/pg_clipfrac_lower": masked_mean(_flags(over, plain), mask).item(),
    }
    return loss, metrics


def value_loss(
    vpreds: Tensor, returns: Tensor, values: Tensor, mask: Tensor, clip: float = 0.5, mode: str = "token-mean"
) -> tuple[Tensor, Tensor]:
    inside = torch.minimum(torch.maximum(vpreds, values - clip), values + clip)
    plain, clipped = (vpreds - returns) ** 2, (inside - returns) ** 2
    loss = 0.5 * aggregate(torch.maximum(plain, clipped), mask, mode)
    return loss, masked_mean(_flags(clipped > plain, plain), mask)
