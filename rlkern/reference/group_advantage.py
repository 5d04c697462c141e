# SPDX-License-Identifier: Apache-2.0
"""Outcome advantages in plain torch: a number a row, what its group makes of it, that broadcast over the row's mask."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern import check
from rlkern.reference import affine_scan, group
from rlkern.reference import whiten as whitening


# ---- the specification ----------------------------------------------------------------------------------------------
def best_loop(scores: Tensor, ids: Tensor, scale: bool, eps: float) -> Tensor:
    """The best row of a group gets its distance from the second best, over std + eps; the others get 0."""
    out = torch.zeros_like(scores)
    for g in range(int(ids.max()) + 1 if len(ids) else 0):
        rows = torch.nonzero(ids == g)[:, 0]
        if len(rows) == 1:
            out[rows] = float("nan")
            continue
        best, second = scores[rows].topk(2).values
        out[rows[scores[rows].argmax()]] = (best - second) / (scores[rows].std() + eps) if scale else best - second
    return out


# ---- the torch backend ----------------------------------------------------------------------------------------------
def best(scores: Tensor, ids: Tensor, order: Tensor, offsets: Tensor, scale: bool, eps: float) -> Tensor:
    """NaN counts as the best, and makes the distance NaN."""
    count, _, _, _, m2 = group._moments(scores, None, ids, order, offsets)
    lowest = torch.full_like(count, -torch.inf)
    key = torch.where(scores.isnan(), torch.inf, scores)
    most = lowest.scatter_reduce(0, ids, key, "amax")
    rows = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(offsets[:-1], len(ids)).scatter_reduce(0, ids, torch.where(key == most[ids], rows, len(ids)), "amin")
    winner = rows == first[ids]
    second = lowest.scatter_reduce(0, ids, torch.where(winner, -torch.inf, key), "amax")
    gap = (most - second) + group._per_group(torch.where(scores.isnan(), scores, 0.0), ids, count)
    gap = gap / (group._std(m2, count, True, 0.0) + eps) if scale else gap
    gap = torch.where(count <= 1, torch.nan, gap)
    return torch.where(winner, gap[ids], torch.zeros_like(scores))


def _values(
    rewards: Tensor,
    tokens: Tensor | None,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    baseline: str,
    scale: bool,
    eps: float,
    singleton: str,
    component_scores: Tensor | None,
    component_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(values, scores), one number a row."""
    wide = group._wide(rewards)
    if component_scores is not None and component_weights is not None:
        found = torch.zeros(len(ids), dtype=wide, device=ids.device)
        for score, weight in zip(component_scores.to(wide).unbind(1), component_weights.to(wide), strict=True):
            found = found + weight * group.normalize(score, None, ids, order, offsets, baseline, scale, True, eps, singleton)
        return found, found
    scores = rewards.sum(1, dtype=wide)
    if baseline == "second_best":
        return best(scores, ids, order, offsets, scale, eps), scores
    lengths = tokens if baseline == "length_weighted" else None
    return group.normalize(scores, lengths, ids, order, offsets, baseline, scale, True, eps, singleton), scores


def whitened_name(scale: bool, component_scores: Tensor | None) -> str:
    """The estimator that whitens: the one that errors name."""
    return "advantages.gdpo" if scale or component_scores is not None else "advantages.reinforce_plus_plus_baseline"


def advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,
    baseline: str,
    scale: bool,
    eps: float,
    singleton: str,
    whiten: list[bool] | None,
    whiten_eps: float,
    component_scores: Tensor | None = None,
    component_weights: Tensor | None = None,
    f_norm: float = 0.0,
) -> Tensor:
    """The raw op `_group_advantage_fwd`."""
    rewards, valid = affine_scan.rows(cu_seqlens, token_level_rewards, response_mask != 0)
    tokens = valid.sum(1) if whiten is not None or baseline == "length_weighted" else None
    index = (ids, order, offsets)
    values, scores = _values(rewards, tokens, *index, baseline, scale, eps, singleton, component_scores, component_weights)
    if baseline == "second_best" and ids.device.type == "cpu":
        check.pairs("advantages.grpo_passk", int((offsets.diff() == 1).sum()))
    if f_norm:
        values = values * (len(ids) / (scores != 0).sum().clamp(min=1).to(values.dtype) / f_norm)
    if whiten is not None and tokens is not None:  # a row's tokens are equal: its value, weighted by their number
        values = whitening.whiten(whitened_name(scale, component_scores), values, tokens, whiten, whiten_eps)
    dtype = torch.promote_types(rewards.dtype, response_mask.dtype) if response_mask.is_floating_point() else rewards.dtype
    values = values.to(dtype)[:, None]
    return affine_scan.unrows(cu_seqlens, torch.where(valid, values, torch.zeros_like(values)), token_level_rewards)
