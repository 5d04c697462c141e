# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF's estimators that shape rewards within a prompt, or the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlkern.advantages.openrlhf.steps import CLIP, by_group, normalized, outcome, rewards_of
from rlkern.advantages.rows import all_in_one
from rlkern.group import group_normalize
from rlkern.types import Advantages


def rloo(
    rewards: Tensor,
    action_mask: Tensor,
    index: Any = None,
    *,
    n_samples_per_prompt: int | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""Leave-one-out advantages: the reward less the mean of its prompt's others, at every token up to the last.

    r = reward - mean of the others of its prompt;  A_t = returns_t = the sum of R_u, u >= t, R_t = -kl_coef kl_t, at the last valid
    token plus the clipped r.

    Args:
        rewards: (B,), floating point; one reward a row.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        index: labels (B,), or their `rlkern.group_index`; or
        n_samples_per_prompt: so many neighbouring rows are a prompt, two or more.
        kl: like action_mask, floating point; KL estimate per token, not read where masked. With kl_coef, its weight (0 or less: none).
        reward_clip_range: (low, high) for the shaped rewards, or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), two tensors of the same numbers like action_mask. Not masked: a masked token holds the sum of what
        follows it.

    Gradient:
        None, as in OpenRLHF.

    Numerics:
        Group statistics in float64, the scan as `rlkern.discounted_returns`. A label of one row gives 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; prompts of one row.

    Example:
        >>> r, m = torch.tensor([1.0, 0.0]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> rlkern.advantages.openrlhf.rloo(r, m, n_samples_per_prompt=2).advantages
        tensor([[ 1.,  1.,  1.],
                [-1., -1.,  0.]])

    Source:
        Ahmadian et al. 2024 (arXiv 2402.14740); OpenRLHF, estimator "rloo".
    """
    op = "advantages.openrlhf.rloo"
    shaped = by_group(op, rewards, index, n_samples_per_prompt, "leave_one_out")
    return outcome(op, shaped, action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)


def reinforce_baseline(
    rewards: Tensor,
    action_mask: Tensor,
    index: Any = None,
    *,
    n_samples_per_prompt: int | None = None,
    no_std_norm: bool = False,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""REINFORCE++ with a baseline: the reward less its prompt's mean, summed to go, normalized over all action tokens.

    r = reward - mean of its prompt;  returns as in `rloo`;  A = (returns - mean) / sqrt(max(var, 1e-8)), population variance.

    Args:
        rewards: (B,), floating point; one reward a row.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        index: labels (B,), or their `rlkern.group_index`; or
        n_samples_per_prompt: so many neighbouring rows are a prompt, two or more.
        no_std_norm: only subtract the mean.
        kl: like action_mask, floating point; KL estimate per token, not read where masked. With kl_coef, its weight (0 or less: none).
        reward_clip_range: (low, high) for the shaped rewards, or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like action_mask, neither masked: a masked token holds what the scan carries there, normalized.

    Gradient:
        None, as in OpenRLHF.

    Numerics:
        As `rlkern.discounted_returns`; moments in float64, over this batch: of several batches merge `rlkern.masked_moments`.

    Raises:
        ValueError: a mask with no valid token (OpenRLHF: NaN). ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, m = torch.tensor([1.0, 0.0]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> rlkern.advantages.openrlhf.reinforce_baseline(r, m, n_samples_per_prompt=2).advantages
        tensor([[ 0.7071,  0.7071,  0.7071],
                [-1.4142, -1.4142, -0.3536]])

    Source:
        Hu et al. 2025 (arXiv 2501.03262); OpenRLHF, estimator "reinforce_baseline".
    """
    op = "advantages.openrlhf.reinforce_baseline"
    shaped = by_group(op, rewards, index, n_samples_per_prompt)
    found = outcome(op, shaped, action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)
    return Advantages(normalized(found.returns, action_mask, no_std_norm), found.returns)


def group_norm(
    rewards: Tensor,
    action_mask: Tensor,
    index: Any = None,
    *,
    n_samples_per_prompt: int | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""GRPO: the reward normalized in its prompt, at every token up to the last.

    r = (reward - mean of its prompt) / (std + 1e-9), the sample deviation;  A = returns as in `rloo`.

    Args:
        rewards: (B,), floating point; one reward a row.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        index: labels (B,), or their `rlkern.group_index`; or
        n_samples_per_prompt: so many neighbouring rows are a prompt, two or more.
        kl: like action_mask, floating point; KL estimate per token, not read where masked. With kl_coef, its weight (0 or less: none).
        reward_clip_range: (low, high) for the shaped rewards, or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), two tensors of the same numbers like action_mask. Not masked: a masked token holds the sum of what
        follows it.

    Gradient:
        None, as in OpenRLHF.

    Numerics:
        Group statistics in float64, the scan as `rlkern.discounted_returns`. A label of one row gives 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; prompts of one row.

    Example:
        >>> r, m = torch.tensor([1.0, 0.0]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> rlkern.advantages.openrlhf.group_norm(r, m, n_samples_per_prompt=2).advantages
        tensor([[ 0.7071,  0.7071,  0.7071],
                [-0.7071, -0.7071,  0.0000]])

    Source:
        Shao et al. 2024 (arXiv 2402.03300); OpenRLHF, estimator "group_norm".
    """
    op = "advantages.openrlhf.group_norm"
    shaped = by_group(op, rewards, index, n_samples_per_prompt, scale_by_std=True, eps=1e-9)
    return outcome(op, shaped, action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)


def dr_grpo(
    rewards: Tensor,
    action_mask: Tensor,
    index: Any = None,
    *,
    n_samples_per_prompt: int | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""Dr. GRPO: the reward less its prompt's mean, at every token up to the last.

    r = reward - mean of its prompt;  A = returns as in `rloo`.

    Args:
        rewards: (B,), floating point; one reward a row.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        index: labels (B,), or their `rlkern.group_index`; or
        n_samples_per_prompt: so many neighbouring rows are a prompt, two or more.
        kl: like action_mask, floating point; KL estimate per token, not read where masked. With kl_coef, its weight (0 or less: none).
        reward_clip_range: (low, high) for the shaped rewards, or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), two tensors of the same numbers like action_mask. Not masked: a masked token holds the sum of what
        follows it.

    Gradient:
        None, as in OpenRLHF.

    Numerics:
        Group statistics in float64, the scan as `rlkern.discounted_returns`. A label of one row gives 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; prompts of one row.

    Example:
        >>> r, m = torch.tensor([1.0, 0.0]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> rlkern.advantages.openrlhf.dr_grpo(r, m, n_samples_per_prompt=2).advantages
        tensor([[ 0.5000,  0.5000,  0.5000],
                [-0.5000, -0.5000,  0.0000]])

    Source:
        Liu et al. 2025 (arXiv 2503.20783); OpenRLHF, estimator "dr_grpo".
    """
    op = "advantages.openrlhf.dr_grpo"
    shaped = by_group(op, rewards, index, n_samples_per_prompt)
    return outcome(op, shaped, action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)


def flash_reinforce(
    rewards: Tensor,
    action_mask: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""FlashREINFORCE: the reward less the mean of the batch, at every token up to the last.

    r = reward - mean over all rows;  A = returns as in `rloo`.

    Args:
        rewards: (B,), floating point; one reward a row.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        kl: like action_mask, floating point; KL estimate per token, not read where masked. With kl_coef, its weight (0 or less: none).
        reward_clip_range: (low, high) for the shaped rewards, or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), two tensors of the same numbers like action_mask. Not masked: a masked token holds the sum of what
        follows it.

    Gradient:
        None, as in OpenRLHF.

    Numerics:
        Group statistics in float64, the scan as `rlkern.discounted_returns`. A label of one row gives 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, m = torch.tensor([1.0, 0.0]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> rlkern.advantages.openrlhf.flash_reinforce(r, m).advantages
        tensor([[ 0.5000,  0.5000,  0.5000],
                [-0.5000, -0.5000,  0.0000]])

    Source:
        OpenRLHF 0.11.2, estimator "flash_reinforce".
    """
    op = "advantages.openrlhf.flash_reinforce"
    found = rewards_of(op, rewards)
    shaped = group_normalize(found, all_in_one(found), scale_by_std=False, singleton="zero")
    return outcome(op, shaped, action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)
