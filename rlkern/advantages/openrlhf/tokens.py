# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF's estimators that leave rewards as they are: REINFORCE and GAE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlkern import check, scan
from rlkern.advantages.openrlhf.steps import CLIP, normalized, placed, returns_of, rewards_of
from rlkern.types import Advantages


def reinforce(
    rewards: Tensor,
    action_mask: Tensor,
    gamma: float = 1.0,
    *,
    no_std_norm: bool = False,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""REINFORCE: discounted returns, normalized over all action tokens.

    returns = the discounted sum of R_u, u >= t, R_t = -kl_coef kl_t, at the last valid token plus the clipped reward;
    A = (returns - mean) / sqrt(max(var, 1e-8)), mean and population variance over all valid tokens.

    Args:
        rewards: (B,), floating point; one reward a row.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        gamma: discount per step, a number; it decays over masked tokens too.
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
        >>> rlkern.advantages.openrlhf.reinforce(r, m).advantages
        tensor([[ 0.7071,  0.7071,  0.7071],
                [-1.4142, -1.4142, -1.4142]])

    Source:
        Williams 1992; OpenRLHF compute_advantages_and_returns, estimator "reinforce".
    """
    op = "advantages.openrlhf.reinforce"
    gamma = check.number(op, "gamma", gamma, 0.0)
    token_rewards = placed(op, rewards_of(op, rewards), action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)
    returns = returns_of(token_rewards, action_mask, gamma, cu_seqlens)
    return Advantages(normalized(returns, action_mask, no_std_norm), returns)


def gae(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    gamma: float,
    lambd: float,
    *,
    no_std_norm: bool = False,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    reward_clip_range: tuple[float, float] | None = CLIP,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    r"""Generalised advantage estimation, normalized over all action tokens.

    R_t = -kl_coef kl_t, at the last valid token plus the clipped reward;  A_t = R_t + gamma V_{t+1} - V_t + gamma lambd A_{t+1} over
    all tokens, rewards and values 0 where masked;  returns = A + V;  A = (A - mean) / sqrt(max(var, 1e-8)), population variance.

    Args:
        rewards: (B,), floating point; one reward a row.
        values: like action_mask, floating point; a masked one counts as 0.
        action_mask: (B, T) or packed (N,), bool, integer or float; nonzero = action token.
        gamma, lambd: discount and trace decay per step, numbers; both decay over masked tokens too.
        no_std_norm: only subtract the mean.
        kl: like action_mask, floating point; KL estimate per token, not read where masked. With kl_coef, its weight (0 or less: none).
        reward_clip_range: (low, high) for the shaped rewards, or None.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like action_mask, neither masked: a masked token holds what the scan carries there, normalized.

    Gradient:
        None, as in OpenRLHF.

    Numerics:
        As `rlkern.gae`; moments in float64, over this batch: of several batches merge `rlkern.masked_moments`.

    Raises:
        ValueError: a mask with no valid token (OpenRLHF: NaN). ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> r, m = torch.tensor([1.0, 0.0]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> rlkern.advantages.openrlhf.gae(r, torch.zeros(2, 3), m, 1.0, 1.0).returns
        tensor([[1., 1., 1.],
                [0., 0., 0.]])

    Source:
        Schulman et al. 2016 (arXiv 1506.02438); OpenRLHF get_advantages_and_returns and the normalization behind it.
    """
    op = "advantages.openrlhf.gae"
    numbers: dict[str, Any] = {"gamma": check.number(op, "gamma", gamma, 0.0), "lam": check.number(op, "lambd", lambd, 0.0)}
    token_rewards = placed(op, rewards_of(op, rewards), action_mask, kl, kl_coef, reward_clip_range, cu_seqlens)
    (values,) = check.tensors(op, action_mask, values=values)
    found = scan.gae(token_rewards, values.detach(), action_mask, **numbers, masked="zero", cu_seqlens=cu_seqlens)
    return Advantages(normalized(found.advantages, action_mask, no_std_norm), found.returns)
