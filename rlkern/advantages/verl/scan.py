# SPDX-License-Identifier: Apache-2.0
"""verl's estimators of token-level rewards: scans along each row."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

# the families' modules define the raw ops used here
from rlkern import check, library, scan  # noqa: F401
from rlkern.advantages.outcome import WHITEN_EPS, WHITEN_MASKED, batch, plain
from rlkern.backends import pick
from rlkern.types import Advantages

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
