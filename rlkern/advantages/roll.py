# SPDX-License-Identifier: Apache-2.0
"""ROLL's returns by token and by turn, and its normalization of rewards. No autograd, as in ROLL."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlkern import check, scan
from rlkern.advantages.outcome import batch, plain
from rlkern.advantages.rows import all_in_one, grouped, per_row
from rlkern.group import group_mean_std, group_normalize
from rlkern.types import Advantages, GroupIndex

__all__ = ["agentic_reinforce", "reinforce"]

_EPS = 1e-6
Scope = Literal["batch", "group"]


def _returns(op: str, rewards: Tensor, mask: Tensor, gamma: float, cu_seqlens: Tensor | None, masked: Any) -> Advantages:
    cu = batch(op, rewards, cu_seqlens, response_mask=mask)
    gamma = check.number(op, "gamma", gamma, 0.0)
    returns = scan.discounted_returns(plain(rewards), plain(mask), gamma=gamma, masked=masked, cu_seqlens=cu)
    return Advantages(torch.where(mask != 0, returns, torch.zeros_like(returns)), returns)


def reinforce(token_level_rewards: Tensor, response_mask: Tensor, gamma: float = 1.0, *, cu_seqlens: Tensor | None = None) -> Advantages:
    r"""REINFORCE: discounted returns, a masked token being a step without a reward.

    returns_t = R_t + gamma returns_{t+1}, R 0 where masked;  A = returns at valid tokens, 0 elsewhere.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; reward per token, not read where masked.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per step, a number.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like the rewards; returns are not masked.

    Gradient:
        None, as in ROLL. `rlkern.discounted_returns` has one.

    Numerics:
        As `rlkern.discounted_returns` with masked="zero".

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Example:
        >>> r, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1]])
        >>> rlkern.advantages.roll.reinforce(r, m, 0.5).advantages
        tensor([[0.2500, 0.0000, 1.0000]])

    Source:
        Williams 1992; ROLL compute_reinforce_return.
    """
    return _returns("advantages.roll.reinforce", token_level_rewards, response_mask, gamma, cu_seqlens, "zero")


def agentic_reinforce(
    token_level_rewards: Tensor, response_mask: Tensor, gamma: float = 1.0, *, cu_seqlens: Tensor | None = None
) -> Advantages:
    r"""REINFORCE by turns: each run of valid tokens is one step, on the reward of its last token.

    c = R of the turn's last token + gamma c of the next turn;  A = returns = c at the turn's tokens, 0 elsewhere.

    Args:
        token_level_rewards: (B, T) or packed (N,), floating point; read at the last token of each turn.
        response_mask: like token_level_rewards, bool, integer or float; nonzero = trainable token.
        gamma: discount per turn, a number.
        cu_seqlens: (rows + 1,) offsets of packed rows, int32 or int64.

    Returns:
        Advantages(advantages, returns), like the rewards, 0 where masked.

    Gradient:
        None, as in ROLL. `rlkern.discounted_returns` has one.

    Numerics:
        As `rlkern.discounted_returns` with masked="turn".

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Example:
        >>> r, m = torch.tensor([[9.0, 1.0, 0.0, 2.0]]), torch.tensor([[1, 1, 0, 1]])
        >>> rlkern.advantages.roll.agentic_reinforce(r, m, 0.5).advantages
        tensor([[2., 2., 0., 2.]])

    Source:
        ROLL compute_agentic_reinforce_return.
    """
    return _returns("advantages.roll.agentic_reinforce", token_level_rewards, response_mask, gamma, cu_seqlens, "turn")


def reward_norm(
    rewards: Tensor,
    index: Any = None,
    *,
    n_sample: int | None = None,
    norm_mean_type: Scope | None = "group",
    norm_std_type: Scope | None = "group",
) -> Tensor:
    r"""Rewards less the mean of their group or batch, over its standard deviation.

    (r - mean) / (std + 1e-6), the sample deviation of the rewards; None leaves that step out.

    Args:
        rewards: (B,), floating point; one reward a row.
        index: labels (B,), or their `rlkern.group_index`; or
        n_sample: so many neighbouring rows are a prompt.
        norm_mean_type, norm_std_type: "group", "batch" or None.

    Returns:
        Tensor (B,) in the dtype of the rewards. A group, or batch, of one row is not divided (ROLL: NaN).

    Gradient:
        None, as in ROLL. `rlkern.group_normalize` has one.

    Numerics:
        Statistics in float64.

    Raises:
        ValueError: norm_std_type "group" with another mean, which gives a (G, B) tensor in ROLL; "running", whose state is the trainer's.
            ValueError, TypeError: shapes, dtypes or labels that do not fit.

    Example:
        >>> rlkern.advantages.roll.reward_norm(torch.tensor([1.0, 0.0, 3.0, 1.0]), n_sample=2, norm_std_type=None)
        tensor([ 0.5000, -0.5000,  1.0000, -1.0000])

    Source:
        ROLL reward_norm.
    """
    op = "advantages.roll.reward_norm"
    x = per_row(op, "rewards", rewards)
    check.word(op, "norm_mean_type", norm_mean_type, ("group", "batch", None))
    check.word(op, "norm_std_type", norm_std_type, ("group", "batch", None))
    if norm_std_type == "group" and norm_mean_type != "group":
        raise check.fail(op, "norm_std_type", 'be "batch" or None with this mean', "'group'", 'Take norm_mean_type="group" too.')
    wide = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    scopes: dict[str, GroupIndex] = {"batch": all_in_one(wide)}
    if "group" in (norm_mean_type, norm_std_type):
        scopes["group"] = grouped(op, wide, index, n_sample, "n_sample")
    found = wide
    if norm_mean_type is not None:
        found = group_normalize(wide, scopes[norm_mean_type], scale_by_std=False, singleton="zero")
    if norm_std_type is not None and x.shape[0]:
        scope = scopes[norm_std_type]
        std = group_mean_std(wide, scope, eps=0.0).std[scope.ids]
        alone = scope.counts[scope.ids] == 1
        found = torch.where(alone, found, found / (std + _EPS))
    result: Tensor = found.to(x.dtype)
    return result
