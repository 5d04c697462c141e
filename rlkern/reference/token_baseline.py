# SPDX-License-Identifier: Apache-2.0
"""The optimal token baseline in plain torch. `advantage_loop` is the specification, group by group and column by column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkern.reference import affine_scan
from rlkern.reference.group import _per_group, _wide


# ---- the specification ----------------------------------------------------------------------------------------------
def _sums(rewards: Tensor, valid: Tensor, old_log_prob: Tensor, sum_pi_squared: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rewards to go, accumulated path variance), (B, T), of the valid tokens."""
    w = 1 - 2 * old_log_prob.exp() + sum_pi_squared
    w = w if weights is None else w * weights * weights
    reward, w = (torch.where(valid, x, torch.zeros_like(x)).to(_wide(x)) for x in (rewards, w))
    return reward.flip(1).cumsum(1).flip(1), w.cumsum(1)


def advantage_loop(
    rewards: Tensor, mask: Tensor, old_log_prob: Tensor, sum_pi_squared: Tensor, weights: Tensor | None, ids: Tensor,
    by_token: bool, zero_tail: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, returns). The column of a token is its place in the row, or, `by_token`, its number among the valid."""
    valid = mask != 0
    returns, w = _sums(rewards, valid, old_log_prob, sum_pi_squared, weights)
    base, column = torch.zeros_like(returns), valid.cumsum(1) - 1 if by_token else torch.arange(valid.shape[1]).expand_as(valid)
    for g in range(int(ids.max()) + 1 if len(ids) else 0):
        rows = [b for b in range(len(ids)) if ids[b] == g and (valid[b].any() or not by_token)]
        lengths = sorted(int(valid[b].sum()) for b in rows)
        for t in range(valid.shape[1] if len(rows) > 1 else 0):
            at = [(b, u) for b in rows for u in torch.nonzero(valid[b] & (column[b] == t))[:, 0].tolist()]
            mean = sum(returns[x] * w[x] for x in at) / (sum(w[x] for x in at) + eps)
            for x in at:
                tail = zero_tail and t >= lengths[-2] and int(valid[x[0]].sum()) == lengths[-1] != lengths[-2]
                base[x] = 0.0 if tail else mean
    return torch.where(valid, returns - base, torch.zeros_like(base)), returns


# ---- the torch backend ----------------------------------------------------------------------------------------------
def _tails(lengths: Tensor, ids: Tensor, groups: int) -> Tensor:
    """(B,): where the baseline of a row ends: at the second longest of its group if it alone is the longest."""
    least = torch.full((groups,), -1, dtype=lengths.dtype, device=lengths.device)
    longest = lengths == least.scatter_reduce(0, ids, lengths, "amax")[ids]
    shared = torch.zeros_like(least).index_add(0, ids, longest.to(lengths.dtype))[ids] > 1
    second = least.scatter_reduce(0, ids, torch.where(longest, -1, lengths), "amax")[ids]
    return torch.where(longest & ~shared & (second >= 0), second, torch.iinfo(lengths.dtype).max)


def advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    old_log_prob: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,
    by_token: bool,
    zero_tail: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The raw op `_optimal_token_baseline_fwd`: (advantages, returns)."""
    arithmetic = torch.promote_types(torch.promote_types(old_log_prob.dtype, sum_pi_squared.dtype), torch.float32)
    given = (token_level_rewards, old_log_prob, sum_pi_squared, rollout_is_weights)
    given_rows: list[Any] = [x if x is None else x.to(arithmetic) for x in affine_scan.rows(cu_seqlens, *given)]
    rewards, lp, squares, weights = given_rows
    (valid,) = affine_scan.rows(cu_seqlens, response_mask != 0)
    returns, w = _sums(rewards, valid, lp, squares, weights)
    lengths, groups, (B, T) = valid.sum(1), offsets.shape[0] - 1, valid.shape
    column = valid.cumsum(1) - 1 if by_token else torch.arange(T, device=ids.device).expand(B, T)
    place = torch.where(valid, column, T)  # what is masked goes behind the last column

    def columns(x: Tensor) -> Tensor:
        return x.new_zeros(B, T + 1).scatter(1, place, x)[:, :T]

    per_column = torch.zeros(groups, T, device=ids.device)
    total = _per_group(columns(w), ids, per_column) + eps
    base = _per_group(columns(torch.where(valid, returns * w, torch.zeros_like(w))), ids, per_column) / total
    members = torch.zeros_like(offsets[:-1]).index_add(0, ids, (lengths > 0).to(ids.dtype) if by_token else torch.ones_like(ids))
    base = torch.where((members > 1)[:, None], base, torch.zeros_like(base))
    taken = base[ids].gather(1, torch.where(valid, column, torch.zeros_like(column))) if T else base[ids]
    if zero_tail:
        tails = _tails(torch.where(lengths > 0, lengths, -1) if by_token else lengths, ids, groups)
        taken = torch.where(column >= tails[:, None], torch.zeros_like(taken), taken)
    advantages = torch.where(valid, returns - taken, torch.zeros_like(returns))
    dtype = token_level_rewards.dtype
    dtype = torch.promote_types(dtype, response_mask.dtype) if response_mask.is_floating_point() else dtype
    found = (affine_scan.unrows(cu_seqlens, x.to(dtype), token_level_rewards) for x in (advantages, returns))
    return next(found), next(found)
