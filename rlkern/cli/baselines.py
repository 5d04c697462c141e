# SPDX-License-Identifier: Apache-2.0
"""More of verl's estimators as loops over prompts and columns: GPG, GDPO, and the optimal token baselines."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from rlkern.cli.first_three import grpo
from rlkern.cli.framework import masked_whiten, rows_by_label


def gpg(rewards: Tensor, mask: Tensor, index: Iterable[Hashable]) -> Tensor:
    """Less the group's mean, times rows over rows with a reward."""
    scores = rewards.sum(-1)
    alpha = len(scores) / torch.count_nonzero(scores).clamp(min=1).to(torch.promote_types(scores.dtype, torch.float32))
    advantages = scores.clone()
    for rows in rows_by_label(index).values():
        mean = scores[rows].mean() if len(rows) > 1 else scores[rows[0]] * 0
        for row in rows:
            advantages[row] = alpha * (scores[row] - mean)
    return advantages.unsqueeze(-1) * mask


def gdpo(rewards: Tensor, mask: Tensor, index: Iterable[Hashable], components: Tensor) -> Tensor:
    """Each component by GRPO, placed at the row's last token; their sum whitened."""
    index, total = list(index), torch.zeros_like(rewards)
    last = (mask.sum(-1) - 1).clamp(min=0)
    for scores in components.unbind(-1):
        placed = torch.zeros_like(rewards)
        placed[torch.arange(len(placed)), last] = scores
        total = total + grpo(placed, mask, index)
    return masked_whiten(total, mask) * mask


def _columns(togo: Tensor, weight: Tensor, mask: Tensor | None, lengths: list[int]) -> Tensor:
    """Of one prompt: the weighted mean of each column; 0 where only the longest row reaches."""
    kept = weight if mask is None else weight * mask
    baseline = (togo * kept).sum(0) / (kept.sum(0) + 1e-8)
    longest, second = sorted(lengths)[-1], sorted(lengths)[-2]
    if longest > second:
        baseline[second:] = 0
    return baseline


def optimal_token_baseline(rewards: Tensor, mask: Tensor, index: Iterable[Hashable], log_prob: Tensor, squares: Tensor) -> Tensor:
    togo = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    energy = ((1 - 2 * log_prob.exp() + squares) * mask).cumsum(-1)
    baseline = torch.zeros_like(rewards)
    for rows in rows_by_label(index).values():
        if len(rows) > 1:
            lengths = [int(mask[row].sum()) for row in rows]
            baseline[rows] = _columns(togo[rows], energy[rows], mask[rows].to(togo.dtype), lengths)
    return (togo - baseline) * mask


def tir_optimal_token_baseline(rewards: Tensor, mask: Tensor, index: Iterable[Hashable], log_prob: Tensor, squares: Tensor) -> Tensor:
    """The same, column by column of valid tokens."""
    advantages = torch.zeros_like(rewards)
    for rows in rows_by_label(index).values():
        valid = [mask[row] != 0 for row in rows]
        togo = [rewards[row][v].flip(-1).cumsum(-1).flip(-1) for row, v in zip(rows, valid, strict=True)]
        energy = [(1 - 2 * log_prob[row][v].exp() + squares[row][v]).cumsum(-1) for row, v in zip(rows, valid, strict=True)]
        baseline = torch.zeros(rewards.shape[1], dtype=rewards.dtype)
        if len(rows) > 1:
            first, second = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (togo, energy))
            found = _columns(first, second, None, [len(x) for x in togo])
            baseline[: len(found)] = found
        for row, v, x in zip(rows, valid, togo, strict=True):
            advantages[row, v] = x - baseline[: len(x)]
    return advantages
