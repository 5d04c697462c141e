# SPDX-License-Identifier: Apache-2.0
"""Log-probs, entropy and sum of squared probabilities from logits, in plain torch under its autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Of logits / temperature, in float32, or float64 for float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(dtype)
    return torch.log_softmax(x if temperature == 1 else x / temperature, -1)


def log_prob(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log p of each label."""
    return log_softmax(logits, temperature).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """-sum p log p; a logit of -infinity, whose p is 0, adds nothing, in value and gradient."""
    log_p = log_softmax(logits, temperature)
    p = log_p.exp()
    return -(p * torch.where(p == 0, torch.zeros_like(log_p), log_p)).sum(-1)


def sum_pi_squared(logits: Tensor, temperature: float) -> Tensor:
    """sum p^2."""
    return (2 * log_softmax(logits, temperature)).exp().sum(-1)
