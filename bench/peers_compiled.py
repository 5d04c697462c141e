# SPDX-License-Identifier: Apache-2.0
"""torch.compile of the branch-free forms: what inductor makes of the formulas once the tests and `.item()`s are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlkern.bench.inputs import Inputs


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # static shapes: the stronger form. One graph per shape and thread count, hence the limit.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, dynamic=False)


def _whiten(values: Tensor, mask: Tensor) -> Tensor:
    valid = mask != 0
    count = valid.sum()
    mean = torch.where(valid, values, 0.0).sum() / count
    variance = torch.where(valid, (values - mean).square(), 0.0).sum() / (count - 1)
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def _whiten_masked(values: Tensor, mask: Tensor) -> Tensor:
    return _whiten(values, mask) * mask


def _k3(log_prob: Tensor, ref: Tensor) -> Tensor:
    d = (ref - log_prob).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def _loss(old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """The loss with the count given, and the three metrics left on the device.

    Of several forms the fastest: where the backward would need a saved bool tensor, inductor's CPU code is many times
    slower, so the dual clip is a minimum with infinity, the mask a factor, and the metrics stand outside autograd.
    """
    weight = mask.to(torch.float32)
    x = (new - old).clamp(-20.0, 20.0)
    ratio = x.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    bound = torch.where(advantages < 0, -3.0 * advantages, float("inf"))
    loss = (torch.minimum(torch.maximum(plain, clipped), bound) * weight).sum() / tokens
    with torch.no_grad():
        clipfrac = ((clipped > plain).float() * weight).sum() / tokens
        kl = (-x * weight).sum() / tokens
        dual = ((ratio > 3.0).float() * (advantages < 0).float() * weight).sum() / tokens
    return loss, clipfrac, kl, dual


def _grouped(scores: Tensor, ids: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.zeros(groups).index_add(0, ids, torch.ones_like(scores))
    total = torch.zeros(groups).index_add(0, ids, scores)
    mean = torch.where(count > 1, total / count, 0.0)
    return count, mean, scores - mean[ids]


def _grpo(rewards: Tensor, mask: Tensor, ids: Tensor, groups: int) -> Tensor:
    count, _, centred = _grouped(rewards.sum(-1), ids, groups)
    square = torch.zeros(groups).index_add(0, ids, centred.square())
    std = torch.where(count > 1, (square / (count - 1).clamp(min=1)).sqrt(), 1.0)
    return (centred / (std[ids] + 1e-6)).unsqueeze(-1) * mask


def _rloo(rewards: Tensor, mask: Tensor, ids: Tensor, groups: int) -> Tensor:
    count, _, centred = _grouped(rewards.sum(-1), ids, groups)
    factor = torch.where(count > 1, count / (count - 1).clamp(min=1), 1.0)
    return (centred * factor[ids]).unsqueeze(-1) * mask


def _baseline(rewards: Tensor, mask: Tensor, ids: Tensor, groups: int) -> Tensor:
    _, _, centred = _grouped(rewards.sum(-1), ids, groups)
    # whitening a value that is constant over each row needs only the rows' lengths
    lengths = mask.sum(-1).float()
    total = lengths.sum()
    mean = (lengths * centred).sum() / total
    variance = (lengths * (centred - mean).square()).sum() / (total - 1)
    return ((centred - mean) * torch.rsqrt(variance + 1e-8)).unsqueeze(-1) * mask


whiten, whiten_masked = compiled(_whiten), compiled(_whiten_masked)
_k3_compiled, _loss_compiled = compiled(_k3), compiled(_loss)
_ESTIMATORS = {"grpo": (_grpo, compiled(_grpo)), "rloo": (_rloo, compiled(_rloo))}
_ESTIMATORS["reinforce_plus_plus_baseline"] = (_baseline, compiled(_baseline))


def masked_whiten(x: Inputs) -> tuple[Tensor, ...]:
    return (whiten(x.values, x.mask),)


def kl(x: Inputs) -> tuple[Tensor, ...]:
    return (_k3_compiled(x.old, x.ref),)


def policy_loss(x: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward by autograd, both compiled."""
    leaf = x.leaf
    leaf.grad = None
    loss = _loss_compiled(x.old, leaf, x.advantages, x.mask, torch.tensor(float(x.tokens)))[0]
    loss.backward()
    return loss.detach(), leaf.grad  # type: ignore[return-value]


def estimator(name: str, number: Callable[[Any], tuple[Tensor, int]], eager: bool = False) -> Callable[[Inputs], Any]:
    """The group estimator on ids that `number(labels)` makes in the same call."""
    function = _ESTIMATORS[name][0 if eager else 1]

    def call(x: Inputs) -> tuple[Tensor, ...]:
        ids, groups = number(x.uid)
        return (function(x.rewards, x.mask, ids, groups),)

    return call
