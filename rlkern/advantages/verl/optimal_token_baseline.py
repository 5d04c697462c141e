# SPDX-License-Identifier: Apache-2.0
"""verl's optimal token baselines: a baseline per group and column, weighted by the accumulated path variance of each row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlkern import check, library
from rlkern.advantages.outcome import batch, plain
from rlkern.backends import pick
from rlkern.group import index_for
from rlkern.types import Advantages


def _optimal(
    name: str,
    by_token: bool,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    given: tuple[Tensor, Tensor, Tensor | None],
    cu_seqlens: Tensor | None,
    out: Any,
    zero_tail: bool,
    epsilon: float,
) -> Advantages:
    op = f"advantages.{name}"
    others: dict[str, Any] = dict(zip(("old_log_probs", "sum_pi_squared", "rollout_is_weights"), given, strict=True))
    if given[2] is None:
        del others["rollout_is_weights"]
    cu = batch(op, token_level_rewards, cu_seqlens, response_mask=response_mask, **others)
    eps = check.number(op, "epsilon", epsilon, 0.0)
    if out is not None:
        dtype = check.result_dtype(token_level_rewards, response_mask)
        out = check.out_tensors(op, out, token_level_rewards, [dtype, dtype], False)
    rewards, mask = plain(token_level_rewards), plain(response_mask)
    tensors = [x if x is None else plain(x) for x in given]
    group = index_for(op, index, rewards.shape[0] if cu is None else cu.shape[0] - 1, rewards)
    args = (rewards, mask, *tensors, group.ids, group.order, group.offsets, cu, by_token, bool(zero_tail), eps)
    raw = "_optimal_token_baseline_fwd"
    return Advantages(*library.call(raw, *args, backend=pick(raw, rewards), out=out))


def optimal_token_baseline(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = 1e-8,
    *,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    r"""The optimal token baseline: rewards to go, less their mean in the group and column, weighted by path variance.

    G_t = sum of R_u at valid tokens u >= t;  W_t = sum over valid u <= t of (1 - 2 exp(old_log_prob_u) + sum_pi_squared_u) rho_u^2;
    base_t = sum G_t W_t / (sum W_t + epsilon) over the rows of the group that are valid at column t;  A = G - base at valid
    tokens. A group of one row has baseline 0.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token, each counts 1.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        old_log_probs: like token_level_rewards, nats; not read where masked.
        sum_pi_squared: like token_level_rewards, sum over the vocabulary of squared probabilities; not read where masked.
        rollout_is_weights: like token_level_rewards, importance weights rho; not read where masked. None = 1.
        handle_zero_tail: the one row that is longer than all others of its group has baseline 0 from column n on, n being the second
            longest length; a length is a number of valid tokens.
        epsilon: added to the sum of weights.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: (advantages, returns) to write into.

    Returns:
        Advantages(advantages, returns), like the rewards, in the promoted dtype of rewards and a float mask. Advantages are exactly
        0 where masked; returns are the rewards to go there too.

    Gradient:
        None, as in verl.

    Numerics:
        Weights in float32 (float64 if an input is), their sums and the baseline in float64. verl multiplies by the mask, so there a
        NaN at a masked token reaches the rest of its row, and the group in those columns.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
        >>> old, squares = torch.full((2, 2), 0.25).log(), torch.tensor([[0.5, 0.5], [1.5, 1.5]])
        >>> rlkern.advantages.optimal_token_baseline(r, m, ["a", "a"], old, squares).advantages
        tensor([[ 0.6667,  0.6667],
                [-0.3333, -0.3333]])

    Source:
        verl compute_optimal_token_baseline_advantage (0.9.1; 0.8.0 of git has no zero tail by default).
    """
    given = (old_log_probs, sum_pi_squared, rollout_is_weights)
    more = (cu_seqlens, out, handle_zero_tail, epsilon)
    return _optimal("optimal_token_baseline", False, token_level_rewards, response_mask, index, given, *more)


def tir_optimal_token_baseline(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = 1e-8,
    *,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    r"""The optimal token baseline of turns with tools: columns count the valid tokens of a row alone.

    As `optimal_token_baseline`, but base_j is the mean over the j-th valid tokens of the rows of the group; rows without a valid
    token are not counted.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token, each counts 1.
        index: labels (B,), one a row, or their `rlkern.group_index`.
        old_log_probs: like token_level_rewards, nats; not read where masked.
        sum_pi_squared: like token_level_rewards, sum over the vocabulary of squared probabilities; not read where masked.
        rollout_is_weights: like token_level_rewards, importance weights rho; not read where masked. None = 1.
        handle_zero_tail: the one row that is longer than all others of its group has baseline 0 from column n on, n being the second
            longest length; a length is a number of valid tokens.
        epsilon: added to the sum of weights.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: (advantages, returns) to write into.

    Returns:
        Advantages(advantages, returns), like the rewards, in the promoted dtype of rewards and a float mask. Advantages are exactly
        0 where masked; returns are the rewards to go there too.

    Gradient:
        None, as in verl.

    Numerics:
        Weights in float32 (float64 if an input is), their sums and the baseline in float64. verl multiplies by the mask, so there a
        NaN at a masked token reaches the rest of its row, and the group in those columns.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
        >>> old, squares = torch.full((2, 2), 0.25).log(), torch.tensor([[0.5, 0.5], [1.5, 1.5]])
        >>> rlkern.advantages.tir_optimal_token_baseline(r, m, ["a", "a"], old, squares).advantages
        tensor([[ 0.6667,  0.6667],
                [-0.3333, -0.3333]])

    Source:
        verl compute_multi_turn_optimal_token_baseline_advantage.
    """
    given = (old_log_probs, sum_pi_squared, rollout_is_weights)
    more = (cu_seqlens, out, handle_zero_tail, epsilon)
    return _optimal("tir_optimal_token_baseline", True, token_level_rewards, response_mask, index, given, *more)
