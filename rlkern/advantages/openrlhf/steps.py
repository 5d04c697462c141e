# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF's steps: rewards of rows, shaped in their group, clipped and placed with the KL at tokens, summed to go, normalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern import check, scan
from rlkern.advantages.rows import grouped, per_row
from rlkern.group import group_normalize
from rlkern.kl import shape_rewards
from rlkern.types import Advantages
from rlkern.whiten import masked_whiten

CLIP = (-10.0, 10.0)


def rewards_of(op: str, rewards: Tensor) -> Tensor:
    """In float32 at least."""
    found = per_row(op, "rewards", rewards)
    return found.to(torch.promote_types(found.dtype, torch.float32))  # type: ignore[no-any-return]


def placed(
    op: str, rewards: Tensor, action_mask: Tensor, kl: Tensor | None, kl_coef: float, clip: tuple[float, float] | None, cu: Tensor | None
) -> Tensor:
    """-kl_coef kl_t, plus the row's clipped reward at its last valid token: a k1 penalty against a reference of 0."""
    check.batch(op, "action_mask", action_mask, cu)
    if action_mask.dim() != (2 if cu is None else 1):
        raise check.fail(op, "action_mask", "be (B, T)", check.describe(action_mask), "One row a response; packed rows need cu_seqlens.")
    check.tensors(op, action_mask, action_mask=action_mask, kl=kl)
    check.per_row(op, "rewards", rewards, check.rows_of(action_mask, check.lengths(op, cu, action_mask)), action_mask)
    kl_coef = check.number(op, "kl_coef", kl_coef)
    if kl is None:
        if kl_coef > 0:
            raise check.fail(op, "kl", "be a tensor like action_mask", "None with a kl_coef", "Leave kl_coef at 0 for rewards alone.")
        kl = torch.zeros((), dtype=rewards.dtype, device=action_mask.device).expand(action_mask.shape)
    zero = torch.zeros((), dtype=kl.dtype, device=kl.device).expand(kl.shape)
    ranges: dict[str, Any] = {"log_ratio_range": None, "value_range": None, "reward_clip": clip}
    return shape_rewards(rewards, kl.detach(), zero, action_mask, kl_coef=max(kl_coef, 0.0), kl_penalty="k1", cu_seqlens=cu, **ranges)


def returns_of(token_rewards: Tensor, action_mask: Tensor, gamma: float, cu: Tensor | None) -> Tensor:
    return scan.discounted_returns(token_rewards, action_mask, gamma=gamma, masked="zero", cu_seqlens=cu)


def normalized(advantages: Tensor, action_mask: Tensor, no_std_norm: bool) -> Tensor:
    return masked_whiten(advantages, action_mask, unbiased=False, eps_mode="floor", scale_by_std=not no_std_norm)


def by_group(
    op: str,
    rewards: Tensor,
    index: Any,
    n_samples_per_prompt: int | None,
    baseline: Any = "mean",
    **scale: Any,
) -> Tensor:
    """Shaped in groups of two rows or more; a label of one row gives 0."""
    found = rewards_of(op, rewards)
    group = grouped(op, found, index, n_samples_per_prompt, "n_samples_per_prompt", 2)
    options: dict[str, Any] = {"scale_by_std": False, "singleton": "zero"} | scale
    return group_normalize(found, group, baseline=baseline, **options)


def outcome(
    op: str, shaped: Tensor, action_mask: Tensor, kl: Tensor | None, kl_coef: float, clip: tuple[float, float] | None, cu: Tensor | None
) -> Advantages:
    returns = returns_of(placed(op, shaped, action_mask, kl, kl_coef, clip, cu), action_mask, 1.0, cu)
    return Advantages(returns.clone(), returns)
