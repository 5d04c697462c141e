# SPDX-License-Identifier: Apache-2.0
"""The branch-free forms on a GPU, eager or by torch.compile: what a trainer gets without kernels of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rlkern.bench.inputs import GAMMA, LAM

CHUNK = 128  # of the scan as matrix products


@lru_cache(maxsize=16)
def _powers(decay: float, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(size, size) matrix of c^(i-j) for i >= j, and the vector c^size ... c^1."""
    i = torch.arange(size, dtype=torch.float64, device=device)
    gap = i[:, None] - i[None, :]
    return torch.where(gap >= 0, decay ** gap.clamp(min=0), 0.0).to(dtype), (decay ** (size - i)).to(dtype)


def _scan(x: Tensor, local: tuple[Tensor, Tensor], across: Tensor) -> Tensor:
    """y_t = x_t + decay y_{t+1}: matrix products within chunks, then over their heads."""
    rows, tokens = x.shape
    matrix, reach = local
    y = (x.reshape(-1, CHUNK) @ matrix).reshape(rows, -1, CHUNK)
    carry = torch.nn.functional.pad((y[:, :, 0] @ across)[:, 1:], (0, 1))
    return torch.addcmul(y, carry.unsqueeze(-1), reach).reshape(rows, tokens)


def _tables(x: Tensor, decay: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
    if x.shape[1] % CHUNK:
        raise ValueError(f"the chunked scan needs a T that {CHUNK} divides")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _powers(decay, CHUNK, dtype, x.device), _powers(decay**CHUNK, x.shape[1] // CHUNK, dtype, x.device)[0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, local: Any, across: Tensor) -> tuple[Tensor, Tensor]:
    v = _wide(values) * mask
    delta = _wide(rewards) * mask + GAMMA * torch.nn.functional.pad(v[:, 1:], (0, 1)) - v
    advantages = _scan(delta, local, across)
    return advantages.to(rewards.dtype), (advantages + v).to(rewards.dtype)


def _returns(rewards: Tensor, mask: Tensor, local: Any, across: Tensor) -> Tensor:
    return _scan(_wide(rewards) * mask, local, across).to(rewards.dtype)


def _whiten(values: Tensor, mask: Tensor) -> Tensor:
    valid, v = mask != 0, _wide(values)
    count = valid.sum()
    mean = torch.where(valid, v, 0.0).sum() / count
    variance = torch.where(valid, (v - mean).square(), 0.0).sum() / (count - 1)
    return ((v - mean) * torch.rsqrt(variance + 1e-8)).to(values.dtype)


def _gae_whiten(rewards: Tensor, values: Tensor, mask: Tensor, local: Any, across: Tensor) -> tuple[Tensor, Tensor]:
    advantages, returns = _gae(rewards, values, mask, local, across)
    return _whiten(advantages, mask), returns


def _reinforce(rewards: Tensor, mask: Tensor, local: Any, across: Tensor) -> tuple[Tensor, Tensor]:
    returns = _returns(rewards, mask, local, across)
    return _whiten(returns, mask) * mask, returns * mask


def _loss(old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Value, metrics and gradient written out by hand: no autograd between them, one fused kernel if inductor finds it."""
    a, valid = _wide(advantages), mask != 0
    raw = _wide(new) - _wide(old)
    x = raw.clamp(-20.0, 20.0)
    ratio = x.exp()
    plain, clipped = -a * ratio, -a * ratio.clamp(0.8, 1.2)
    inner = torch.maximum(plain, clipped)
    bound = torch.where(a < 0, -3.0 * a, torch.inf)
    term = torch.where(valid, torch.minimum(inner, bound), 0.0)
    slope = torch.where((plain >= clipped) & (inner <= bound) & (raw.abs() <= 20.0), plain, 0.0)
    metrics = torch.stack(
        [
            torch.where(valid & (clipped > plain), 1.0, 0.0).sum(),
            torch.where(valid, -x, 0.0).sum(),
            torch.where(valid & (inner > bound), 1.0, 0.0).sum(),
            torch.where(valid, ratio, 0.0).max(),
        ]
    )
    loss = term.sum() / tokens + 0.0 * metrics[0]
    return loss, torch.where(valid, slope / tokens, 0.0).to(new.dtype)


def _centred(rewards: Tensor, ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    scores = _wide(rewards).sum(-1)
    zeros = torch.zeros(groups, device=scores.device, dtype=scores.dtype)
    count = zeros.index_add(0, ids, torch.ones_like(scores))
    mean = torch.where(count > 1, zeros.index_add(0, ids, scores) / count, 0.0)
    return count, scores - mean[ids]


def _grpo(rewards: Tensor, mask: Tensor, ids: Tensor, groups: int) -> Tensor:
    count, centred = _centred(rewards, ids, groups)
    square = torch.zeros_like(count).index_add(0, ids, centred.square())
    std = torch.where(count > 1, (square / (count - 1).clamp(min=1)).sqrt(), 1.0)
    return ((centred / (std[ids] + 1e-6)).unsqueeze(-1) * mask).to(rewards.dtype)


def _rloo(rewards: Tensor, mask: Tensor, ids: Tensor, groups: int) -> Tensor:
    count, centred = _centred(rewards, ids, groups)
    factor = torch.where(count > 1, count / (count - 1).clamp(min=1), 1.0)
    return ((centred * factor[ids]).unsqueeze(-1) * mask).to(rewards.dtype)


def _kl(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    gap = (_wide(ref_log_prob) - _wide(log_prob)).clamp(-20.0, 20.0)
    return (gap.exp() - gap - 1).clamp(-10.0, 10.0).to(log_prob.dtype)


def _value_loss(vpreds: Tensor, returns: Tensor, values: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    v, target, old = _wide(vpreds), _wide(returns), _wide(values)
    bounded = torch.minimum(torch.maximum(v, old - 0.5), old + 0.5)
    losses = torch.maximum((v - target).square(), (bounded - target).square())
    return 0.5 * torch.where(mask != 0, losses, 0.0).sum() / tokens


@lru_cache(maxsize=32)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, dynamic=False)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


# ---- of a batch, by `of`: compiled or eager ----------------------------------------------------------------------------
Of = Callable[[Callable[..., Any]], Callable[..., Any]]


def gae(x: Any, of: Of) -> Sequence[Tensor]:
    return tuple(of(_gae)(x.rewards, x.values, x.mask, *_tables(x.rewards, GAMMA * LAM)))


def discounted_returns(x: Any, of: Of) -> Sequence[Tensor]:
    return (of(_returns)(x.rewards, x.mask, *_tables(x.rewards, GAMMA)),)


def gae_whiten(x: Any, of: Of) -> Sequence[Tensor]:
    return tuple(of(_gae_whiten)(x.rewards, x.values, x.mask, *_tables(x.rewards, GAMMA * LAM)))


def reinforce_plus_plus(x: Any, of: Of) -> Sequence[Tensor]:
    return tuple(of(_reinforce)(x.rewards, x.mask, *_tables(x.rewards, GAMMA)))


def masked_whiten(x: Any, of: Of) -> Sequence[Tensor]:
    return (of(_whiten)(x.values, x.mask),)


def policy_loss(x: Any, of: Of) -> Sequence[Tensor]:
    return tuple(of(_loss)(x.old, x.new, x.advantages, x.mask, x.count))


def grpo(x: Any, of: Of) -> Sequence[Tensor]:
    return (of(_grpo)(x.rewards, x.mask, x.group.ids, x.group.offsets.shape[0] - 1),)


def rloo(x: Any, of: Of) -> Sequence[Tensor]:
    return (of(_rloo)(x.rewards, x.mask, x.group.ids, x.group.offsets.shape[0] - 1),)


def kl_penalty(x: Any, of: Of) -> Sequence[Tensor]:
    return (of(_kl)(x.new, x.old),)


def value_loss(x: Any, of: Of) -> Sequence[Tensor]:
    return (of(_value_loss)(x.values, x.rewards, x.old, x.mask, x.count),)
