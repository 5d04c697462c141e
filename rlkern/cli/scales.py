# SPDX-License-Identifier: Apache-2.0
"""The scale of each check: the largest sum of absolute terms that any one result adds up, from float64 fields."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlkern.cli import framework
from rlkern.cli.fields import GAMMA, LAM, Data, top, valid, wanted
from rlkern.cli.first_three import grpo


def rstd(x: Tensor, mask: Tensor) -> float:
    return float(torch.rsqrt(framework.masked_var(x, mask) + 1e-8))


def sum_scale(d: Data) -> float:
    return float(valid(d.old, d).abs().sum())


def mean_scale(d: Data) -> float:
    return sum_scale(d) / max(float((d.mask != 0).sum()), 1.0)


def whiten_scale(d: Data) -> float:
    return 2 * top(d.old) * rstd(d.old, d.mask)


def normalize_scale(d: Data) -> float:
    """Rows whose values are all equal give 0 whatever the scale."""
    count = d.mask.sum(-1).clamp(min=1)
    mean = valid(d.old, d).sum(-1) / count
    variance = valid((d.old - mean[:, None]) ** 2, d).sum(-1) / count
    rows = variance > 1e-8
    return top(2 * valid(d.old, d).abs().amax(-1)[rows] * variance[rows].rsqrt())


def gae_scale(d: Data) -> float:
    terms = d.rewards.abs() + 2 * wanted(d.values).abs()
    return top(framework.affine_scan(torch.full_like(terms, GAMMA * LAM), terms)) + top(wanted(d.values))


def gae_whiten_scale(d: Data) -> dict[str, float]:
    advantages = framework.gae(d.rewards, wanted(d.values), d.mask, GAMMA, LAM)[0]
    return {"advantages": 2 * gae_scale(d) * rstd(advantages, d.mask), "returns": gae_scale(d)}


def returns_scale(d: Data) -> float:
    return top(framework.affine_scan(torch.full_like(d.rewards, GAMMA), d.rewards.abs()))


def returns_whiten_scale(rule: str) -> Callable[[Data], dict[str, float]]:
    def scale(d: Data) -> dict[str, float]:
        returns = framework.discounted_returns(d.rewards, d.mask, GAMMA, rule)
        return {"advantages": 2 * returns_scale(d) * rstd(returns, d.mask), "returns": returns_scale(d)}

    return scale


def score_scale(d: Data) -> float:
    return 4 * top(d.rewards.abs().sum(-1))


def grpo_scale(d: Data) -> float:
    scores = d.rewards.sum(-1)
    groups = framework.rows_by_label(d.uid).values()
    return max(
        2 * top(scores[rows]) / ((float(scores[rows].std()) if len(rows) > 1 else 1.0) + 1e-6) for rows in groups
    )


def baseline_scale(d: Data) -> float:
    centred = grpo(d.rewards, torch.ones_like(d.mask), d.uid, norm_by_std=False)
    return score_scale(d) * rstd(centred, d.mask)


def kl_scale(d: Data) -> float:
    x = valid(d.old, d) - valid(d.ref, d)
    return top(x.abs().clamp(max=20).exp().clamp(max=20)) + 2 * top(x)
