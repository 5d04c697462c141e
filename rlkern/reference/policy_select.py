# SPDX-License-Identifier: Apache-2.0
"""Which tokens clip-cov and kl-cov treat apart, by the covariance of advantage and log-prob."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkern.reference.kl import wide
from rlkern.reference.loss import row_ids, select, spread, wide_on


def policy_select(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor | None,
    advantages_row: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kind: str,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """The raw op `_policy_select_fwd`: (a byte per token, (how many are set, valid tokens)).

    "clip_cov", numbers = (above, below, low, high): the candidates, whose covariance lies in (above, below) and whose ratio is
    not clipped. "kl_cov", numbers = (share,): the tokens of the largest covariances, the first of equal ones.
    """
    ids, valid = row_ids(log_prob, cu_seqlens), mask != 0
    adv = advantages if advantages is not None else spread(advantages_row, log_prob, ids)  # type: ignore[arg-type]
    dtype, double = wide(old_log_prob, log_prob, adv), wide_on(log_prob.device)
    a, lp = (select(valid, x, dtype).to(double) for x in (adv, log_prob))
    n = valid.sum().to(double)
    cov = (a - a.sum() / n) * (lp - lp.sum() / n)
    if kind == "clip_cov":
        above, below, low, high = numbers
        ratio = torch.where(valid, log_prob.to(dtype) - old_log_prob.to(dtype), 0.0).exp()
        clipped = ((ratio > 1 + high) & (a > 0)) | ((ratio < 1 - low) & (a < 0))
        chosen = valid & ~clipped & ~ratio.isnan() & (cov > above) & (cov < below)  # a NaN stays in the loss
    else:
        most = torch.where(n > 0, (n * numbers[0]).floor().clamp(min=1), n)
        order = torch.where(valid, cov, -torch.inf).flatten().argsort(descending=True, stable=True)
        first = torch.arange(order.numel(), device=order.device) < most
        chosen = torch.zeros_like(first).scatter(0, order, first).view_as(valid) & valid
    return chosen.to(torch.uint8), torch.stack([chosen.sum().to(double), n])
