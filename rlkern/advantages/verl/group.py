# SPDX-License-Identifier: Apache-2.0
"""verl's GRPO and its relatives: a row's summed rewards, normalized in its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlkern import check
from rlkern.advantages.outcome import WHITEN_MASKED, components, outcome
from rlkern.types import Advantages


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""Group relative advantages: the row's summed reward, normalized in its group, at every valid token.

    A = (s - mean_g) / (std_g + epsilon), s = sum of the row's rewards; s - mean_g without the deviation (Dr. GRPO). A group
    of one row has mean 0 and deviation 1.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; read everywhere: rewards on masked tokens count, and NaN
            anywhere in a row shows in its group.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token, whatever the number.
        index: labels (B,), one a row, or their `rlkern.group_index`; equal = same prompt.
        epsilon: added to the standard deviation, in units of the rewards.
        norm_adv_by_std_in_grpo: divide by the standard deviation, or not.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked, in the promoted dtype of
        rewards and a float mask.

    Gradient:
        None, as in verl. `rlkern.group_normalize` has one.

    Numerics:
        Sums and statistics in float64. Equal rewards give exactly 0; verl's rounding gives them up to 0.95.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
        >>> rlkern.advantages.grpo(r, m, ["a", "a", "b"]).advantages
        tensor([[ 0.7071,  0.7071],
                [-0.7071,  0.0000],
                [ 2.0000,  2.0000]])

    Source:
        Shao et al. 2024 (arXiv 2402.03300), Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783); verl compute_grpo_outcome_advantage.
    """
    eps = check.number("advantages.grpo", "epsilon", epsilon, 0.0)
    return outcome("grpo", token_level_rewards, response_mask, index, cu_seqlens, out, "mean", bool(norm_adv_by_std_in_grpo), eps)


def grpo_vectorized(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""`grpo` under the name of verl's vectorized form: the same numbers.

    A = (s - mean_g) / (std_g + epsilon); s - mean_g without the deviation. A group of one row has mean 0 and deviation 1.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        epsilon: added to the standard deviation, in units of the rewards.
        norm_adv_by_std_in_grpo: divide by the standard deviation, or not; verl's trainer does not pass it on.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`, for every dtype of rewards; verl's takes its statistics in float32, up to 0.7.1 in one pass, with the variance
        floored at epsilon.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.advantages.grpo_vectorized(r, m, ["a", "a"], norm_adv_by_std_in_grpo=False).advantages
        tensor([[ 0.5000,  0.5000],
                [-0.5000,  0.0000]])

    Source:
        Shao et al. 2024 (arXiv 2402.03300); verl compute_grpo_vectorized_outcome_advantage.
    """
    eps = check.number("advantages.grpo_vectorized", "epsilon", epsilon, 0.0)
    scale = bool(norm_adv_by_std_in_grpo)
    return outcome("grpo_vectorized", token_level_rewards, response_mask, index, cu_seqlens, out, "mean", scale, eps)


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""Pass@k advantages: the best row of a group gets its lead over the second best, all others 0.

    A = (s - second best) / (std_g + epsilon) for the row with the largest s of its group, 0 for the others; s - second best
    without the deviation. Where the best is shared all get 0.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        index: labels (B,), one a row, or their `rlkern.group_index`; two rows or more a label.
        epsilon: added to the standard deviation, in units of the rewards.
        norm_adv_by_std_in_grpo: divide by the standard deviation, or not.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`. A NaN score is the best of its group.

    Raises:
        ValueError: a label of one row; on a GPU that row is NaN instead. ValueError, TypeError: shapes, dtypes, devices or
            labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.advantages.grpo_passk(r, m, ["a", "a"], norm_adv_by_std_in_grpo=False).advantages
        tensor([[2., 2.],
                [0., 0.]])

    Source:
        Walder and Karkhanis 2025 (arXiv 2505.15201), Chen et al. 2025 (arXiv 2508.10751); verl
        compute_grpo_passk_outcome_advantage, which reads the flag from its config.
    """
    eps = check.number("advantages.grpo_passk", "epsilon", epsilon, 0.0)
    scale = bool(norm_adv_by_std_in_grpo)
    return outcome("grpo_passk", token_level_rewards, response_mask, index, cu_seqlens, out, "second_best", scale, eps)


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    *,
    component_scores: Tensor | None = None,
    component_weights: Tensor | Sequence[float] | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""Advantages of several rewards: each normalized in its group, their weighted sum whitened over the batch's valid tokens.

    a = sum over k of w_k (s_k - mean_g s_k) / (std_g s_k + epsilon);  A = (a - mean) / sqrt(var + 1e-8) with mean and sample
    variance of a over all valid tokens. A group of one row has mean 0 and deviation 1.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; without component_scores the one reward, its row sum read
            everywhere as in `grpo`; with them only its shape and dtype.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token, each counts 1.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        epsilon: added to the standard deviation, in units of the rewards.
        norm_adv_by_std_in_grpo: divide by the standard deviation, or not; verl's trainer does not pass it on.
        component_scores: (B, K), floating point, K rewards a row.
        component_weights: (K,), numbers or a floating-point tensor; all 1 by default.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `reinforce_plus_plus_baseline`.

    Raises:
        ValueError: a mask with no valid token, or with one. ValueError, TypeError: shapes, dtypes, devices or labels that do
            not fit.

    Example:
        >>> r, m = torch.zeros(2, 2), torch.tensor([[1, 0], [1, 0]])
        >>> scores = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
        >>> rlkern.advantages.gdpo(r, m, ["a", "a"], component_scores=scores, component_weights=[1.0, 0.5]).advantages
        tensor([[ 0.7071,  0.0000],
                [-0.7071,  0.0000]])

    Source:
        GDPO 2026 (arXiv 2601.05242); verl compute_gdpo_outcome_advantage, which finds the components by gdpo_reward_keys.
    """
    op = "advantages.gdpo"
    eps = check.number(op, "epsilon", epsilon, 0.0)
    weights = None
    if component_scores is not None:
        component_scores, weights = components(op, token_level_rewards, component_scores, component_weights)
    elif component_weights is not None:
        raise check.fail(op, "component_weights", "come with component_scores", "weights alone", "Give (B, K) scores too.")
    scale = bool(norm_adv_by_std_in_grpo)
    parts = (component_scores, weights)
    return outcome("gdpo", token_level_rewards, response_mask, index, cu_seqlens, out, "mean", scale, eps, WHITEN_MASKED, components=parts)
