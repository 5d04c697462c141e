# SPDX-License-Identifier: Apache-2.0
"""verl's advantage estimators under verl's names, positional order and defaults. No autograd, as in verl."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

# the families' modules define the raw ops used here
from rlkern import check, library, scan  # noqa: F401
from rlkern.advantages.outcome import WHITEN_EPS, WHITEN_MASKED, batch, outcome, plain
from rlkern.backends import pick
from rlkern.types import Advantages

__all__ = ["gae", "grpo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "rloo"]

_KL_OFF = ("none", [0.0, 0.0, 0.0, 0.0])
_WHITEN = [True, False, True, True, False]  # WHITEN_MASKED, but the output is not masked


def gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    *,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    r"""Generalised advantage estimation with whitened advantages.

    A_t = R_t + gamma V' - V_t + gamma lam A', V' and A' of the next valid token; returns = A + V; then
    A = (A - mean) / sqrt(var + 1e-8) with mean and sample variance over all valid tokens.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        values: like token_level_rewards, the critic's value; where masked, read for its own return only.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per step, a number.
        lam: trace decay per step, a number.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: (advantages, returns) to write into.

    Returns:
        Advantages(advantages, returns), like the rewards, in the promoted dtype of rewards, values and a float mask. A
        masked token carries the whitened advantage of the next valid one: apply the mask when you use it.

    Gradient:
        None, as in verl. `rlkern.gae` has one.

    Numerics:
        As `rlkern.gae`; moments in float64. verl multiplies by the mask, so there NaN in padding reaches the whole batch.

    Raises:
        ValueError: a mask with no valid token, or with one. ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Example:
        >>> r, v, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.25]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.gae(r, v, m, 1.0, 1.0).advantages
        tensor([[-0.7071,  0.7071,  0.7071]])

    Source:
        Schulman et al. 2016 (arXiv 1506.02438); verl compute_gae_advantage_return.
    """
    op = "advantages.gae"
    cu = batch(op, token_level_rewards, cu_seqlens, values=values, response_mask=response_mask)
    gamma, lam = check.number(op, "gamma", gamma, 0.0), check.number(op, "lam", lam, 0.0)
    if out is not None:
        dtype = check.result_dtype(token_level_rewards, values, response_mask)
        out = check.out_tensors(op, out, values, [dtype, dtype], False)
    rewards, values, mask = plain(token_level_rewards), plain(values), plain(response_mask)
    args = (rewards, values, mask, None, None, None, None, cu, "skip", gamma, lam, 0.0, *_KL_OFF, _WHITEN, WHITEN_EPS)
    return Advantages(*library.call("_gae_fwd", *args, backend=pick("_gae_fwd", values), out=out))


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


def reinforce_plus_plus(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    gamma: float,
    *,
    masked: Literal["skip", "reset"] = "skip",
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    r"""REINFORCE++: discounted returns, whitened over all valid tokens.

    c_t = R_t + gamma c of the next valid token; A = (c - mean) / sqrt(var + 1e-8) at valid tokens, 0 elsewhere.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token. "skip" does not read it where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per step, a number.
        masked: "skip" (verl >= 0.9) passes over masked tokens. "reset" (verl <= 0.8) emits a return there too and cuts the
            trace: a reward behind a tool turn does not reach the tokens before it.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: (advantages, returns) to write into.

    Returns:
        Advantages(advantages, returns), like the rewards; advantages 0 where masked, in the promoted dtype of rewards and a float mask;
        returns in the dtype of the rewards.

    Gradient:
        None, as in verl. `rlkern.discounted_returns` has one.

    Numerics:
        As `rlkern.discounted_returns`; moments in float64.

    Raises:
        ValueError: a mask with no valid token, or with one. ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Example:
        >>> r, m = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.reinforce_plus_plus(r, m, 1.0)
        Advantages(advantages=tensor([[ 0.7071,  0.0000, -0.7071]]), returns=tensor([[2., 0., 1.]]))

    Source:
        Hu et al. 2025 (arXiv 2501.03262); verl compute_reinforce_plus_plus_outcome_advantage.
    """
    op = "advantages.reinforce_plus_plus"
    cu = batch(op, token_level_rewards, cu_seqlens, response_mask=response_mask)
    gamma = check.number(op, "gamma", gamma, 0.0)
    check.word(op, "masked", masked, ("skip", "reset"))
    if out is not None:
        dtypes = [check.result_dtype(token_level_rewards, response_mask), token_level_rewards.dtype]
        out = check.out_tensors(op, out, token_level_rewards, dtypes, False)
    rewards, mask = plain(token_level_rewards), plain(response_mask)
    args = (rewards, mask, None, None, None, cu, masked, gamma, 0.0, *_KL_OFF, WHITEN_MASKED, WHITEN_EPS)
    found = library.call("_discounted_returns_fwd", *args, backend=pick("_discounted_returns_fwd", rewards), out=out)
    return Advantages(*found)


def remax(
    token_level_rewards: Tensor,
    reward_baselines: Tensor,
    response_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    r"""ReMax: the rewards to go, less the reward of the greedy response at every valid token.

    returns_t = sum of R_u at valid tokens u >= t;  A_t = returns_t - baseline at valid tokens, returns_t elsewhere.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        reward_baselines: (B,), summed reward of the greedy response to the same prompt.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.
        out: (advantages, returns) to write into.

    Returns:
        Advantages(advantages, returns), like the rewards, in the promoted dtypes of (rewards, baselines, float mask) and
        (rewards, float mask). At masked tokens inside a row both hold the rewards to go, as in verl; behind the last valid
        token 0.

    Gradient:
        None, as in verl.

    Numerics:
        As `rlkern.discounted_returns`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit. verl takes baselines of shape (B, 1) and gives (B, B, T).

    Example:
        >>> r, m = torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[1, 0, 1, 0]])
        >>> rlkern.advantages.remax(r, torch.tensor([0.25]), m).advantages
        tensor([[0.7500, 1.0000, 0.7500, 0.0000]])

    Source:
        Li et al. 2023 (arXiv 2310.10505); verl compute_remax_outcome_advantage.
    """
    op = "advantages.remax"
    cu = batch(op, token_level_rewards, cu_seqlens, response_mask=response_mask)
    rewards, mask = plain(token_level_rewards), plain(response_mask)
    rows = rewards.shape[0] if cu is None else cu.shape[0] - 1
    if isinstance(reward_baselines, Tensor) and reward_baselines.dim() == 2:  # (B, 1) is verl's trap
        must = f"have the shape ({rows},)"
        raise check.fail(op, "reward_baselines", must, check.describe(reward_baselines), "Flatten it: x.squeeze(1).")
    baselines: Any = check.per_row(op, "reward_baselines", reward_baselines, rows, rewards)
    baselines = baselines.detach()
    dtype = check.result_dtype(token_level_rewards, response_mask)
    dtypes = [torch.promote_types(dtype, baselines.dtype), dtype]
    if out is not None:
        out = check.out_tensors(op, out, token_level_rewards, dtypes, False)
    args = (rewards.to(dtype), mask, None, None, None, cu, "zero", 1.0, 0.0, *_KL_OFF, None, 0.0)
    sums = library.call("_discounted_returns_fwd", *args, backend=pick("_discounted_returns_fwd", rewards))[1]
    baselines = baselines[:, None] if cu is None else baselines.repeat_interleave(cu.diff(), output_size=rewards.shape[0])
    taken = torch.where(mask != 0, baselines, torch.zeros_like(baselines))
    if out is None:
        return Advantages(sums - taken.to(dtypes[0]), sums)
    torch.sub(sums, taken, out=out[0])
    out[1].copy_(sums)
    return Advantages(*out)
