# SPDX-License-Identifier: Apache-2.0
"""The scale of each check: the sum of the absolute terms behind each result, from float64 fields; a tensor or a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlkern.cli import framework
from rlkern.cli.fields import GAMMA, LAM, Data, valid, wanted
from rlkern.testing import whitened_scale

Scale = Any  # a number, a tensor that broadcasts over the result, or one of these per output


def whitened(x: Tensor, terms: Tensor, d: Data) -> Tensor:
    return whitened_scale(x, terms, d.mask)


def total(d: Data) -> float:
    return float(valid(d.old, d).abs().sum())


def mean(d: Data) -> float:
    return total(d) / max(float((d.mask != 0).sum()), 1.0)


def variance(d: Data) -> float:
    return 4 * float(framework.masked_mean(d.old**2, d.mask))


def whiten(d: Data) -> Tensor:
    return whitened(d.old, d.old.abs(), d)


def normalize(d: Data) -> Tensor:
    """By row; where all values are equal the result is 0 whatever the scale."""
    count = (d.mask != 0).sum(-1, keepdim=True).clamp(min=1)
    centre = valid(d.old, d).sum(-1, keepdim=True) / count
    spread = valid((d.old - centre) ** 2, d).sum(-1, keepdim=True) / count
    size = valid(d.old, d).abs().amax(-1, keepdim=True)
    return torch.where(spread > 1e-12, 2 * size * spread.clamp(min=1e-8).rsqrt(), size)


def gae(d: Data) -> Tensor:
    terms = d.rewards.abs() + 2 * wanted(d.values).abs()
    return framework.affine_scan(torch.full_like(terms, GAMMA * LAM), terms) + wanted(d.values).abs()


def gae_whitened(d: Data) -> dict[str, Tensor]:
    advantages = framework.gae(d.rewards, wanted(d.values), d.mask, GAMMA, LAM)[0]
    return {"advantages": whitened(advantages, gae(d), d), "returns": gae(d)}


def returns(d: Data) -> Tensor:
    return framework.affine_scan(torch.full_like(d.rewards, GAMMA), d.rewards.abs())


def returns_whitened(rule: str) -> Callable[[Data], dict[str, Tensor]]:
    def scale(d: Data) -> dict[str, Tensor]:
        exact = framework.discounted_returns(d.rewards, d.mask, GAMMA, rule)
        return {"advantages": whitened(exact, returns(d), d), "returns": returns(d)}

    return scale


def _scores(d: Data) -> tuple[Tensor, Tensor]:
    """By row: the sum of the row's |rewards| plus its group's mean of them, and the group's std."""
    scores, size = d.rewards.sum(-1), d.rewards.abs().sum(-1)
    terms, std = size.clone(), torch.ones_like(size)
    for rows in framework.rows_by_label(d.uid).values():
        if len(rows) > 1:
            terms[rows] = size[rows] + size[rows].mean()
            std[rows] = scores[rows].std()
    return terms.unsqueeze(-1), std.unsqueeze(-1)


def scores(d: Data) -> Tensor:
    return 2 * _scores(d)[0]


def group_statistics(d: Data) -> float:
    return float(scores(d).max())


def gpg(d: Data) -> Tensor:
    return scores(d) * len(d.rewards)


def grpo(d: Data) -> Tensor:
    terms, std = _scores(d)
    return 2 * terms / (std + 1e-6)


def baseline(d: Data) -> Tensor:
    from rlkern.cli.first_three import grpo as estimator

    centred = estimator(d.rewards, torch.ones_like(d.mask), d.uid, norm_by_std=False)
    return whitened(centred, scores(d).expand_as(d.rewards), d)


def remax(d: Data) -> Tensor:
    return framework.affine_scan(torch.ones_like(d.rewards), d.rewards.abs()) + wanted(d.baselines).abs().unsqueeze(-1)


def decayed(d: Data) -> Tensor:
    return framework.affine_scan(d.old.exp(), d.rewards.abs())


def kl(d: Data) -> Tensor:
    """exp(|d|), |d| and 1, where the clamp at 10 lets them through; k2 adds the square."""
    x = (valid(d.old, d) - valid(d.ref, d)).abs()
    return x.exp().clamp(max=12) + x + x * x


def shaped(d: Data) -> Tensor:
    return d.rewards.abs() + 0.05 * (d.old.abs() + wanted(d.ref).abs())
