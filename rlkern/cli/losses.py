# SPDX-License-Identifier: Apache-2.0
"""The variants of the policy loss as their frameworks write them: one elementwise kernel after another, differentiated by autograd.

Each takes (old, log_prob, advantages, mask, other), `other` a third log-prob that "decoupled" alone reads, and gives the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlkern.cli.framework import aggregate, masked_mean

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# The arguments of rlkern.policy_loss, beside its defaults; clip-cov has few candidates and takes them all, so that its choice
# is no draw.
OPTIONS: dict[str, dict[str, Any]] = {
    "decoupled": {}, "gspo": {}, "gspo_token": {}, "luspo": {}, "rloo": {}, "sapo": {}, "cispo": {}, "gpg": {}, "geo_mean": {},
    "clip_cov": {"clip_cov_ratio": 0.01, "clip_cov_lb": 4.0}, "kl_cov": {}, "dppo_tv": {}, "dppo_kl": {}, "dro": {"dro_beta": 0.1},
    "vespo": {},
}  # fmt: skip
CHOOSING = ("clip_cov", "kl_cov", "dppo_tv", "dppo_kl")  # a rounding may move a token over a threshold: the loss alone is compared


def clipped(ratio: Tensor, advantages: Tensor, cap: float | None = None, clip: float = 0.2) -> Tensor:
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return loss if cap is None else torch.where(advantages < 0, torch.minimum(loss, -advantages * cap), loss)


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def over_rows(loss: Tensor, mask: Tensor, mean: bool) -> Tensor:
    """All rows count, empty ones too."""
    return ((row_mean(loss, mask) if mean else (loss * mask).sum(-1, keepdim=True)).sum()) / loss.shape[0]


def decoupled(old: Tensor, new: Tensor, a: Tensor, m: Tensor, behave: Tensor) -> Tensor:
    loss = clipped((new - old).clamp(-20, 20).exp(), a, 3.0)
    return aggregate(loss * (old - behave).exp(), m, "token-mean")


def gspo(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    z = new - new.detach() + row_mean(new - old, m).detach()
    return aggregate(clipped(z.clamp(max=10).exp(), a), m, "token-mean")


def gspo_token(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    return aggregate(clipped((new - new.detach() + row_mean(new - old, m).detach()).exp(), a), m, "token-mean")


def luspo(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    return over_rows(clipped(row_mean(new - old, m).exp(), a), m, False)


def rloo(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    return over_rows(clipped(((new - old) * m).sum(-1, keepdim=True).exp(), a), m, True)


def sapo(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    ratio = (new - old).clamp(-20, 20).exp()
    tau = torch.where(a > 0, torch.full_like(a, 1.0), torch.full_like(a, 1.05))
    return aggregate(-a * (torch.sigmoid(tau * (ratio - 1)) * 4 / tau), m, "seq-mean-token-mean")


def cispo(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    ratio = (new - old).clamp(-20, 20).exp()
    return aggregate(-ratio.clamp(0.8, 1.2).detach() * a * new, m, "token-mean")


def gpg(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    return aggregate(-new * a, m, "token-mean")


def geo_mean(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    x, sign = new - old, a.sign()
    bounded = sign * torch.minimum(sign * x, sign * x.clamp(-0.2, 0.2))
    return (-row_mean(a, m) * row_mean(bounded, m).exp()).mean()


def _covariance(new: Tensor, a: Tensor, m: Tensor) -> Tensor:
    return (a - masked_mean(a, m)) * (new.detach() - masked_mean(new.detach(), m))


def clip_cov(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    ratio = (new - old).exp()
    plain, bounded = -a * ratio, -a * ratio.clamp(0.8, 1.2)
    cov = torch.where((m == 0) | (bounded > plain), -math.inf, _covariance(new, a, m))
    chosen = torch.nonzero((cov < 5.0) & (cov > 4.0))
    chosen = chosen[torch.randperm(len(chosen))[: max(int(0.01 * int(m.sum())), 1)]]
    keep = torch.ones_like(a)
    keep[chosen[:, 0], chosen[:, 1]] = 0
    return aggregate(torch.maximum(plain, bounded) * keep, m, "token-mean")


def kl_cov(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    x = new - old
    loss = -a * x.exp()
    valid = torch.nonzero(m.reshape(-1))[:, 0]
    cov = _covariance(new, a, m).reshape(-1)[valid]
    chosen = valid[torch.topk(cov, max(1, int(len(cov) * 2e-4))).indices]
    penalty = torch.zeros_like(a).reshape(-1)
    penalty[chosen] = 0.1
    return aggregate(loss + penalty.view_as(a) * x.abs(), m, "token-mean")


def _gated(old: Tensor, new: Tensor, a: Tensor, m: Tensor, opened: Tensor) -> Tensor:
    ratio = (new - old).clamp(-20, 20).exp().clamp(max=3.0).detach()
    return aggregate(-a * ratio * new * opened.to(new.dtype), m, "token-mean")


def dppo_tv(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    moved = new.detach().exp() - old.exp()
    return _gated(old, new, a, m, torch.where(a > 0, moved <= 0.2, moved >= -0.2))


def dppo_kl(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    p, q = new.detach().exp(), old.exp()
    divergence = q * (old - new.detach()) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    near = divergence <= 0.2
    return _gated(old, new, a, m, torch.where(a > 0, near | (p <= q), near | (p >= q)))


def dro(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    return aggregate(-(new * a - 0.05 * (new - old).square()), m, "token-mean")


def vespo(old: Tensor, new: Tensor, a: Tensor, m: Tensor, _: Tensor) -> Tensor:
    total = ((new - old).clamp(-20, 20) * m).sum(-1, keepdim=True).clamp(math.log(1e-8), 20)
    gain = a >= 0
    k, lam = torch.where(gain, 2.0, 3.0), torch.where(gain, 3.0, 2.0)
    weight = (lam + k * total - lam * total.exp()).exp().nan_to_num(0.0, 0.0).detach()
    return aggregate(-weight * a * new, m, "token-mean")


LOSSES: dict[str, Loss] = {name: globals()[name] for name in OPTIONS}
