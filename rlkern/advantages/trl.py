# SPDX-License-Identifier: Apache-2.0
"""TRL's advantages (1.16): of rewards (B, F), one a row and reward function. A NaN is no reward. No autograd, no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlkern import check
from rlkern.advantages.rows import all_in_one, grouped
from rlkern.backends import VALUE_DTYPES
from rlkern.group import group_mean_std, group_normalize
from rlkern.moments import masked_sum
from rlkern.types import Advantages

__all__ = ["grpo", "rloo"]

_EPS = 1e-4
_OMIT: dict[str, Any] = {"singleton": "zero", "nan": "omit"}


def _rewards(op: str, rewards: Any) -> Any:
    """(B, F), in float64 where the device has it."""
    check.no_transforms(op, rewards)
    if not isinstance(rewards, Tensor) or rewards.dtype not in VALUE_DTYPES:
        raise check.fail(op, "rewards", "be a floating-point tensor", check.describe(rewards), "NaN marks a missing reward.", TypeError)
    if rewards.dim() not in (1, 2):
        raise check.fail(op, "rewards", "be (B, F) or (B,)", check.describe(rewards), "One column a reward function.")
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    return (rewards if rewards.dim() == 2 else rewards[:, None]).detach().to(wide)


def _weights(op: str, weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Tensor:
    F = rewards.shape[1]
    if weights is None:
        return torch.ones(F, dtype=rewards.dtype, device=rewards.device)
    found = torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device).detach()
    if found.shape != (F,):
        raise check.fail(op, "reward_weights", f"be ({F},), one a reward function", check.describe(found), "Leave it out for ones.")
    return found


def _total(rewards: Tensor, weights: Tensor, scorable: Tensor) -> Tensor:
    """The weighted sum of the rewards that are there; NaN where none is."""
    return torch.where(scorable, (rewards * weights).nansum(1), torch.nan)


def _result(advantages: Tensor, given: Tensor) -> Advantages:
    found = advantages.to(torch.promote_types(given.dtype, torch.float32)).nan_to_num(nan=0.0)
    return Advantages(found, found)


def grpo(
    rewards: Tensor,
    index: Any = None,
    *,
    num_generations: int | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    scale_rewards: Literal["group", "batch", "none"] | bool = "group",
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
) -> Advantages:
    r"""GRPO advantages of several reward functions.

    "sum_then_normalize": r = sum over f of w_f r_f;  A = (r - mean_g) / (std + 1e-4), std of the group or of the batch.
    "normalize_then_sum": a = sum over f of w_f (r_f - mean_g r_f) / (std_g r_f + 1e-4);  A = (a - mean a) / (std a + 1e-4) over
    the batch. Deviations are sample deviations; a NaN reward enters no sum, mean or deviation.

    Args:
        rewards: (B, F), or (B,) of one function, floating point; NaN = the function gave no reward.
        index: labels (B,), or their `rlkern.group_index`; or
        num_generations: so many neighbouring rows are a prompt.
        reward_weights: (F,), a number a function; 1 by default.
        scale_rewards: "group" (or True), "batch", "none" (or False): what "sum_then_normalize" divides by.
        multi_objective_aggregation: as above.

    Returns:
        Advantages(advantages, returns), one tensor (B,) twice, in float32 at least. 0 for a row without a reward, and for one that has no
        other in its group.

    Gradient:
        None, as in TRL.

    Numerics:
        Sums and statistics in float64. Equal rewards give exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or words that do not fit.

    Example:
        >>> r = torch.tensor([[1.0, 1.0], [0.0, float("nan")], [float("nan"), float("nan")]])
        >>> rlkern.advantages.trl.grpo(r, num_generations=3, scale_rewards="none").advantages
        tensor([ 1., -1.,  0.])

    Source:
        Shao et al. 2024 (arXiv 2402.03300); TRL GRPOTrainer._generate_and_score_completions.
    """
    op = "advantages.trl.grpo"
    check.word(op, "multi_objective_aggregation", multi_objective_aggregation, ("sum_then_normalize", "normalize_then_sum"))
    scale = {True: "group", False: "none"}[scale_rewards] if isinstance(scale_rewards, bool) else scale_rewards
    check.word(op, "scale_rewards", scale, ("group", "batch", "none"))
    wide = _rewards(op, rewards)
    group = grouped(op, wide, index, num_generations, "num_generations")
    weights, scorable = _weights(op, reward_weights, wide), ~wide.isnan().all(1)
    batch = all_in_one(wide)
    if multi_objective_aggregation == "normalize_then_sum":
        parts = [group_normalize(x, group, eps=_EPS, **_OMIT) for x in wide.unbind(1)]
        total = _total(torch.stack(parts, 1), weights, scorable) if parts else torch.zeros_like(wide.sum(1))
        return _result(group_normalize(total, batch, eps=_EPS, **_OMIT), rewards)
    total = _total(wide, weights, scorable)
    advantages = group_normalize(total, group, eps=_EPS, scale_by_std=scale == "group", **_OMIT)
    if scale == "batch" and wide.shape[0]:
        advantages = advantages / (group_mean_std(total, batch, eps=0.0, **_OMIT).std + _EPS)
    return _result(advantages, rewards)


def rloo(
    rewards: Tensor,
    index: Any = None,
    *,
    num_generations: int | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    reward_clip_range: tuple[float, float] | None = None,
    old_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    completion_mask: Tensor | None = None,
    beta: float = 0.0,
    normalize_advantages: bool = False,
) -> Advantages:
    r"""Leave-one-out advantages of several reward functions, with the row's KL in the reward.

    r = clip(sum over f of w_f r_f) - beta sum over valid t of (old_log_prob_t - ref_log_prob_t);  A = r - mean of the others of
    its group; normalized: (A - mean A) / (std A + 1e-4) over the batch. Rows without a reward enter nothing.

    Args:
        rewards: (B, F), or (B,) of one function, floating point; NaN = the function gave no reward.
        index: labels (B,), or their `rlkern.group_index`; or
        num_generations: so many neighbouring rows are a prompt.
        reward_weights: (F,), a number a function; 1 by default.
        reward_clip_range: (low, high), or None.
        old_log_prob, ref_log_prob, completion_mask: (B, T), nats, not read where masked; with beta only.
        beta: weight of the KL, a number.
        normalize_advantages: over the batch.

    Returns:
        Advantages(advantages, returns), one tensor (B,) twice, in float32 at least. 0 for a row without a reward, and for one that has no
        other in its group.

    Gradient:
        None, as in TRL.

    Numerics:
        As `grpo`.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or numbers that do not fit.

    Example:
        >>> rlkern.advantages.trl.rloo(torch.tensor([1.0, 0.0, float("nan"), 0.5]), num_generations=4).advantages
        tensor([ 0.7500, -0.7500,  0.0000,  0.0000])

    Source:
        Ahmadian et al. 2024 (arXiv 2402.14740); TRL RLOOTrainer._generate_and_score_completions.
    """
    op = "advantages.trl.rloo"
    wide, beta = _rewards(op, rewards), check.number(op, "beta", beta)
    group = grouped(op, wide, index, num_generations, "num_generations")
    total = _total(wide, _weights(op, reward_weights, wide), ~wide.isnan().all(1))
    if reward_clip_range is not None:
        low, high = (check.number(op, "reward_clip_range", x) for x in reward_clip_range)
        total = total.clamp(low, high)
    if beta:
        check.present(op, "beta", old_log_prob=old_log_prob, ref_log_prob=ref_log_prob, completion_mask=completion_mask)
        check.batch(op, "old_log_prob", old_log_prob)
        first: Any = old_log_prob
        old, ref, mask = check.tensors(op, first, old_log_prob=old_log_prob, ref_log_prob=ref_log_prob, completion_mask=completion_mask)
        total = total - beta * masked_sum(old.detach() - ref.detach(), mask != 0, -1).to(total.dtype)
    # NaN until the end: rows without a reward are not normalized with the others
    advantages = group_normalize(total, group, baseline="leave_one_out", scale_by_std=False, singleton="nan", nan="omit")
    if normalize_advantages:
        advantages = group_normalize(advantages, all_in_one(wide), eps=_EPS, singleton="nan", nan="omit")
    return _result(advantages, rewards)
