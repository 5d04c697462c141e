# SPDX-License-Identifier: Apache-2.0
"""NeMo-RL's estimators: a leave-one-out baseline with the deviation of the others, GDPO, GAE with a lambda a row. No autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkern import check, scan
from rlkern.advantages.outcome import components
from rlkern.advantages.rows import all_in_one, grouped, per_row
from rlkern.group import group_normalize
from rlkern.reference.others import mean_std_of_others
from rlkern.types import Advantages, GroupIndex
from rlkern.whiten import masked_whiten

__all__ = ["gae", "gdpo", "grpo"]

_EPS = 1e-6


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _normalized(scores: Tensor, group: GroupIndex, leave_one_out: bool, scale: bool) -> Tensor:
    if not leave_one_out:
        return group_normalize(scores, group, eps=_EPS, scale_by_std=scale, singleton="zero")
    mean, std = mean_std_of_others(scores, group)
    found = scores - mean
    return torch.where(std > 0, found / (std + _EPS), found) if scale else found


def _expanded(op: str, values: Tensor, like: Tensor, response_mask: Tensor | None) -> Advantages:
    """(B,), or that as (B, T) of stride 0, not masked."""
    found = values.to(like.dtype)
    if response_mask is not None:
        if not isinstance(response_mask, Tensor) or response_mask.dim() != 2 or response_mask.shape[0] != found.shape[0]:
            must = f"be ({found.shape[0]}, T)"
            raise check.fail(
                op, "response_mask", must, check.describe(response_mask), "It gives the shape alone; packed rows: leave it out."
            )
        found = found[:, None].expand(response_mask.shape)
    return Advantages(found, found)


def grpo(
    rewards: Tensor,
    index: Any = None,
    response_mask: Tensor | None = None,
    *,
    num_generations: int | None = None,
    use_leave_one_out_baseline: bool = True,
    normalize_rewards: bool = True,
) -> Advantages:
    r"""GRPO against the others of the group: their mean, and their own deviation.

    A = (r - mean of the others) / (std of the others + 1e-6), the sample deviation; not divided where that is 0 or has fewer than
    two rows to come from. Without `use_leave_one_out_baseline` mean and deviation are the group's.

    Args:
        rewards: (B,), floating point; one reward a row.
        index: labels (B,), or their `rlkern.group_index`; or
        response_mask: (B, T), for the shape of the result alone, or None.
        num_generations: so many neighbouring rows are a prompt.
        use_leave_one_out_baseline: as above.
        normalize_rewards: divide by the deviation, or not.

    Returns:
        Advantages(advantages, returns), one tensor twice: (B,), or (B, T) of inner stride 0, not masked. 0 for a row alone.

    Gradient:
        None, as in NeMo-RL.

    Numerics:
        Means and deviations of the others in float64 by merged moments, O(B log B): equal others deviate by exactly 0. NeMo-RL takes
        E[r^2] - E[r]^2 in float32.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels that do not fit.

    Example:
        >>> rlkern.advantages.nemo.grpo(torch.tensor([1.0, 0.0, 2.0]), num_generations=3).advantages
        tensor([ 0.0000, -2.1213,  2.1213])

    Source:
        NeMo-RL GRPOAdvantageEstimator, calculate_baseline_and_std_per_prompt, of batches without invalid rows.
    """
    op = "advantages.nemo.grpo"
    given = per_row(op, "rewards", rewards)
    group = grouped(op, given, index, num_generations, "num_generations")
    found = _normalized(_wide(given), group, bool(use_leave_one_out_baseline), bool(normalize_rewards))
    return _expanded(op, found, given, response_mask)


def gdpo(
    rewards: Tensor,
    index: Any = None,
    response_mask: Tensor | None = None,
    *,
    num_generations: int | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    use_leave_one_out_baseline: bool = True,
    normalize_rewards: bool = True,
) -> Advantages:
    r"""GDPO: `grpo` of each of several rewards, their weighted sum normalized over the batch.

    a = sum over k of w_k grpo(r_k);  A = (a - mean a) / std a, the sample deviation; not divided where that is 0.

    Args:
        rewards: (B, K), floating point; K rewards a row, two or more.
        index, response_mask, num_generations, use_leave_one_out_baseline, normalize_rewards: as in `grpo`.
        reward_weights: (K,), a number a reward; 1 by default.

    Returns:
        Advantages(advantages, returns), one tensor twice, as `grpo`.

    Gradient:
        None, as in NeMo-RL.

    Numerics:
        As `grpo`.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels that do not fit.

    Example:
        >>> r = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
        >>> rlkern.advantages.nemo.gdpo(r, num_generations=2, normalize_rewards=False).advantages
        tensor([ 0.5477, -0.5477,  1.0954, -1.0954])

    Source:
        GDPO 2026 (arXiv 2601.05242); NeMo-RL GDPOAdvantageEstimator.
    """
    op = "advantages.nemo.gdpo"
    scores, weights = components(op, rewards, rewards, reward_weights, "rewards", "reward_weights")
    if scores.shape[1] < 2:
        raise check.fail(op, "rewards", "be (B, K) with K of 2 or more", check.describe(rewards), "One reward is grpo's.")
    wide = _wide(scores)
    group = grouped(op, wide, index, num_generations, "num_generations")
    parts = [
        w * _normalized(r, group, bool(use_leave_one_out_baseline), bool(normalize_rewards))
        for r, w in zip(wide.unbind(1), weights, strict=True)
    ]
    total = torch.stack(parts).sum(0)
    found = group_normalize(total, all_in_one(total), eps=0.0, singleton="zero")
    centred = group_normalize(total, all_in_one(total), scale_by_std=False, singleton="zero")
    return _expanded(op, torch.where(centred == 0, centred, found), scores, response_mask)


def gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float | Tensor | None = None,
    *,
    length_adaptive_alpha: float | None = None,
    returns_lam: float | None = None,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""GAE with a lambda a row, which may follow from its length, and another for the returns.

    As `rlkern.gae` with masked tokens skipped. length_adaptive_alpha: lam_b = clamp(1 - 1 / max(alpha n_b, 1), 0, 1), n_b valid tokens of
    the row. returns_lam: returns = A' + V with A' by that lambda.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        values: like token_level_rewards, the critic's value.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per step, a number.
        lam: trace decay per step, a number or (B,); not with length_adaptive_alpha.
        length_adaptive_alpha: a positive number, or None.
        returns_lam: trace decay of the returns, a number; None = that of the advantages.
        whiten: (A - mean) / sqrt(var + 1e-8) over all valid tokens, sample variance.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns); advantages 0 where masked, returns not masked.

    Gradient:
        None, as in NeMo-RL. `rlkern.gae` has one.

    Numerics:
        As `rlkern.gae`; one scan, or two with returns_lam.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; whiten with no valid token, or with one.

    Example:
        >>> r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.nemo.gae(r, v, m, 1.0, length_adaptive_alpha=1.0).advantages
        tensor([[0.1250, 0.0000, 0.7500]])

    Source:
        Schulman et al. 2016 (arXiv 1506.02438), Yue et al. 2025 (VAPO, arXiv 2504.05118); NeMo-RL GeneralizedAdvantageEstimator.
    """
    op = "advantages.nemo.gae"
    check.batch(op, "token_level_rewards", token_level_rewards, cu_seqlens)
    given = {"values": values, "response_mask": response_mask}
    check.tensors(op, token_level_rewards, token_level_rewards=token_level_rewards, **given)
    if (lam is None) == (length_adaptive_alpha is None):
        raise check.fail(op, "lam", "be given, or else length_adaptive_alpha", "both or neither", "One of them sets the trace decay.")
    if length_adaptive_alpha is not None:
        alpha = check.number(op, "length_adaptive_alpha", length_adaptive_alpha, 0.0, open_low=True)
        lam = (1 - 1 / (alpha * _lengths(op, response_mask, cu_seqlens)).clamp(min=1.0)).clamp(0.0, 1.0).to(values.dtype)
    rewards, values = token_level_rewards.detach(), values.detach()
    options: dict[str, Any] = {"gamma": check.number(op, "gamma", gamma, 0.0), "cu_seqlens": cu_seqlens}
    found = scan.gae(rewards, values, response_mask, lam=lam, **options)  # type: ignore[arg-type]
    returns = found.returns
    if returns_lam is not None:
        returns = scan.gae(rewards, values, response_mask, lam=check.number(op, "returns_lam", returns_lam, 0.0), **options).returns
    if whiten:
        return Advantages(masked_whiten(found.advantages, response_mask != 0, mask_output=True), returns)
    return Advantages(torch.where(response_mask != 0, found.advantages, torch.zeros_like(found.advantages)), returns)


def _lengths(op: str, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Valid tokens of each row, float64 where the device has it."""
    valid = mask != 0
    cu = check.lengths(op, cu_seqlens, mask)
    if cu is None:
        return _wide(valid.sum(-1).reshape(-1))
    ends = torch.cat([torch.zeros_like(cu[:1]), valid.cumsum(0)])
    return _wide(ends[cu[1:]] - ends[cu[:-1]])
