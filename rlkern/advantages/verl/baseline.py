# SPDX-License-Identifier: Apache-2.0
"""verl's outcome estimators that subtract a baseline of the group, without a deviation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlkern import check
from rlkern.advantages.outcome import WHITEN_MASKED, outcome
from rlkern.types import Advantages


def rloo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""Leave-one-out advantages: the row's summed reward less the mean of the others in its group.

    A = s - mean of the group's other rows = (s - mean_g) k / (k - 1). A group of one row keeps s.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.advantages.rloo(r, m, ["a", "a"]).advantages
        tensor([[ 1.,  1.],
                [-1.,  0.]])

    Source:
        Ahmadian et al. 2024 (arXiv 2402.14740); verl compute_rloo_outcome_advantage (its vectorized form gives a lone row 0).
    """
    return outcome("rloo", token_level_rewards, response_mask, index, cu_seqlens, out, "leave_one_out")


def rloo_vectorized(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""`rloo` as verl's vectorized form has it: a group of one row gets 0.

    A = s - mean of the group's other rows; 0 where there is none.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`. verl's gives float64 for half-precision rewards.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.advantages.rloo_vectorized(r, m, ["a", "b"]).advantages
        tensor([[0., 0.],
                [0., 0.]])

    Source:
        Ahmadian et al. 2024 (arXiv 2402.14740); verl compute_rloo_vectorized_outcome_advantage.
    """
    return outcome("rloo_vectorized", token_level_rewards, response_mask, index, cu_seqlens, out, "leave_one_out", singleton="zero")


def opo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""Advantages on the optimal reward baseline: the group's mean weighted by length.

    A = s - sum n s / sum n over the group, n = valid tokens of a row. A group of one row keeps s.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token, each counts 1.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked (verl: NaN in all rows of a
        group that has no valid token).

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 3.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.advantages.opo(r, m, ["a", "a"]).advantages
        tensor([[ 1.,  1.],
                [-2.,  0.]])

    Source:
        Hao et al. 2025 (arXiv 2505.23585); verl compute_opo_outcome_advantage.
    """
    return outcome("opo", token_level_rewards, response_mask, index, cu_seqlens, out, "length_weighted")


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    f_norm: float = 1.0,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""GPG: rewards less their group's mean, stretched as if no row had a score of 0.

    A = alpha (s - mean_g) / f_norm, alpha = B / max(rows of the batch with s not 0, 1). A group of one row has mean 0.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        f_norm: a positive number to divide by; verl's trainer leaves it at 1.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`. A sum that float32 rounds to 0 may be another number in float64, and counts then.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> rlkern.advantages.gpg(r, m, ["a", "a"]).advantages
        tensor([[ 1.,  1.],
                [-1.,  0.]])

    Source:
        Chu et al. 2025 (arXiv 2504.02546); verl compute_gpg_outcome_advantage, which ignores its argument alpha.
    """
    f_norm = check.number("advantages.gpg", "f_norm", f_norm, 0.0, open_low=True)
    return outcome("gpg", token_level_rewards, response_mask, index, cu_seqlens, out, "mean", f_norm=f_norm)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    *,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Advantages:
    r"""REINFORCE++ with a group baseline: the summed reward less its group's mean, whitened over the batch's valid tokens.

    d = s - mean_g at every valid token; A = (d - mean) / sqrt(var + 1e-8) with mean and sample variance over all valid
    tokens. A group of one row has mean 0.

    Args:
        token_level_rewards: (B, T) or packed (N,), as in `grpo`: read everywhere.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token, each counts 1.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: a tensor like the result to write into.

    Returns:
        Advantages(advantages, returns), one tensor like the rewards twice, exactly 0 where masked.

    Gradient:
        None, as in verl.

    Numerics:
        As `grpo`; the moments over tokens come from one value and one count a row.

    Raises:
        ValueError: a mask with no valid token, or with one. ValueError, TypeError: shapes, dtypes, devices or labels that do
            not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 0], [1, 0]])
        >>> rlkern.advantages.reinforce_plus_plus_baseline(r, m, ["a", "a"]).advantages
        tensor([[ 0.7071,  0.0000],
                [-0.7071,  0.0000]])

    Source:
        Hu et al. 2025 (arXiv 2501.03262); verl compute_reinforce_plus_plus_baseline_outcome_advantage.
    """
    name = "reinforce_plus_plus_baseline"
    return outcome(name, token_level_rewards, response_mask, index, cu_seqlens, out, "mean", whiten=WHITEN_MASKED)
