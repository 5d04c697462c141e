# SPDX-License-Identifier: Apache-2.0
"""The three functions that started this project, as they stood in verl up to 0.8, restated as plain loops.

REINFORCE++ returns with the reset rule, GRPO with a dict over prompts and its std, REINFORCE++-baseline with whitening
over the batch. `rlkern verify` shows them first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from rlkern.cli.framework import arithmetic, masked_whiten


def reinforce_plus_plus_reset(rewards: Tensor, mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """A masked token resets the running return: what a tool span separates does not see each other."""
    keep = arithmetic(mask)
    running = torch.zeros_like(rewards[:, 0])
    returns = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
        running = running * keep[:, t]
    return masked_whiten(returns, mask) * mask, returns


def _scores_by_prompt(rewards: Tensor, index: Iterable[Hashable]) -> tuple[Tensor, dict[Hashable, list[Tensor]]]:
    scores = rewards.sum(-1)
    by_prompt: dict[Hashable, list[Tensor]] = {}
    for row, label in enumerate(index):
        by_prompt.setdefault(label, []).append(scores[row])
    return scores, by_prompt


def grpo(rewards: Tensor, mask: Tensor, index: Iterable[Hashable], epsilon: float = 1e-6, norm_by_std: bool = True) -> Tensor:
    """(score - group mean) / (group std + epsilon); a prompt with one response keeps its score."""
    index = list(index)
    scores, by_prompt = _scores_by_prompt(rewards, index)
    mean, std = {}, {}
    for label, group in by_prompt.items():
        stacked = torch.stack(group)
        mean[label] = stacked.mean() if len(group) > 1 else torch.zeros_like(stacked[0])
        std[label] = stacked.std() if len(group) > 1 else torch.ones_like(stacked[0])
    advantages = torch.empty_like(scores)
    for row, label in enumerate(index):
        centred = scores[row] - mean[label]
        advantages[row] = centred / (std[label] + epsilon) if norm_by_std else centred
    return advantages.unsqueeze(-1) * mask


def reinforce_plus_plus_baseline(rewards: Tensor, mask: Tensor, index: Iterable[Hashable]) -> Tensor:
    """Score minus group mean on every token, then whitened over the whole batch."""
    index = list(index)
    scores, by_prompt = _scores_by_prompt(rewards, index)
    mean = {label: torch.stack(group).mean() if len(group) > 1 else torch.zeros_like(group[0]) for label, group in by_prompt.items()}
    centred = torch.empty_like(scores)
    for row, label in enumerate(index):
        centred[row] = scores[row] - mean[label]
    spread = centred.unsqueeze(-1).expand(rewards.shape) * mask
    return masked_whiten(spread, mask) * mask
