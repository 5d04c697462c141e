# SPDX-License-Identifier: Apache-2.0
"""What `rlkern verify` compares: for each op its call, the framework's formula, and the scale of its sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.cli import framework
from rlkern.cli.against import Formulas, plain
from rlkern.data import RolloutBatch

GAMMA, LAM = 0.99, 0.95
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """The batch in one dtype and one mask kind. What a captured batch lacks is None."""

    rewards: Tensor
    mask: Tensor
    uid: Any
    old: Tensor
    advantages: Tensor
    new: Tensor | None = None
    ref: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    vpreds: Tensor | None = None
    baselines: Tensor | None = None

    def to(self, dtype: torch.dtype, mask: torch.dtype) -> Data:
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        return replace(self, **{n: getattr(self, n).to(mask if n == "mask" else dtype) for n in names})


def data_of(batch: RolloutBatch) -> Data:
    """The batch, with advantages and returns for the losses made by the formulas in float64."""
    exact = batch.to(torch.float64, torch.int64)
    rewards, values, mask = exact.token_level_rewards, exact.values, exact.response_mask
    returns = vpreds = None
    if values is not None:
        returns = framework.gae(rewards, values, mask, GAMMA, LAM)[1]
        # a critic after a step: moved by up to 0.6, so that some predictions leave the clip range
        vpreds = values + 0.6 * torch.sin(torch.arange(values.numel())).reshape(values.shape)
    advantages = plain()["reinforce_plus_plus_baseline"](rewards, mask, batch.uid)
    critic = (values, returns, vpreds)
    logs = (exact.log_prob, exact.ref_log_prob)
    return Data(rewards, mask, batch.uid, exact.old_log_prob, advantages, *logs, *critic, exact.reward_baselines)


@dataclass(frozen=True)
class Check:
    """`scale(exact)` is the largest sum of absolute terms in each output (one number for all, or one by name).

    `near` marks tokens so close to a clip bound that rounding decides the side: gradients are compared outside them, and
    each may move a fraction by one token.
    """

    op: str
    ours: Callable[[Data], Outputs]
    theirs: Callable[[Formulas, Data], Outputs]
    scale: Callable[[Data], float | dict[str, float]]
    needs: tuple[str, ...] = ()
    near: Callable[[Data, float], Tensor] | None = None


# ---- scales ---------------------------------------------------------------------------------------------------------
def top(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def rstd(x: Tensor, mask: Tensor) -> float:
    return float(torch.rsqrt(framework.masked_var(x, mask) + 1e-8))


def wanted(x: Tensor | None) -> Tensor:
    """A field that `Check.needs` has made sure of."""
    if x is None:
        raise ValueError("rlkern.verify: the batch must have the field; got None. Name it in Check.needs.")
    return x


def valid(x: Tensor | None, d: Data) -> Tensor:
    return torch.where(d.mask != 0, wanted(x), 0.0)


def _sum_scale(d: Data) -> float:
    return float(valid(d.old, d).abs().sum())


def _mean_scale(d: Data) -> float:
    return _sum_scale(d) / max(float((d.mask != 0).sum()), 1.0)


def _whiten_scale(d: Data) -> float:
    return 2 * top(d.old) * rstd(d.old, d.mask)


def _normalize_scale(d: Data) -> float:
    """Rows whose values are all equal give 0 whatever the scale."""
    count = d.mask.sum(-1).clamp(min=1)
    mean = valid(d.old, d).sum(-1) / count
    variance = valid((d.old - mean[:, None]) ** 2, d).sum(-1) / count
    rows = variance > 1e-8
    return top(2 * valid(d.old, d).abs().amax(-1)[rows] * variance[rows].rsqrt())


def _gae_scale(d: Data) -> float:
    terms = d.rewards.abs() + 2 * wanted(d.values).abs()
    return top(framework.affine_scan(torch.full_like(terms, GAMMA * LAM), terms)) + top(wanted(d.values))


def _gae_whiten_scale(d: Data) -> dict[str, float]:
    advantages = framework.gae(d.rewards, wanted(d.values), d.mask, GAMMA, LAM)[0]
    return {"advantages": 2 * _gae_scale(d) * rstd(advantages, d.mask), "returns": _gae_scale(d)}


def _returns_scale(d: Data) -> float:
    return top(framework.affine_scan(torch.full_like(d.rewards, GAMMA), d.rewards.abs()))


def _returns_whiten_scale(rule: str) -> Callable[[Data], dict[str, float]]:
    def scale(d: Data) -> dict[str, float]:
        returns = framework.discounted_returns(d.rewards, d.mask, GAMMA, rule)
        return {"advantages": 2 * _returns_scale(d) * rstd(returns, d.mask), "returns": _returns_scale(d)}

    return scale


def _score_scale(d: Data) -> float:
    return 4 * top(d.rewards.abs().sum(-1))


def _grpo_scale(d: Data) -> float:
    scores = d.rewards.sum(-1)
    groups = framework.rows_by_label(d.uid).values()
    return max(
        2 * top(scores[rows]) / ((float(scores[rows].std()) if len(rows) > 1 else 1.0) + 1e-6) for rows in groups
    )


def _baseline_scale(d: Data) -> float:
    centred = plain()["grpo"](d.rewards, torch.ones_like(d.mask), d.uid, norm_by_std=False)
    return _score_scale(d) * rstd(centred, d.mask)


def _kl_scale(d: Data) -> float:
    x = valid(d.old, d) - valid(d.ref, d)
    return top(x.abs().clamp(max=20).exp().clamp(max=20)) + 2 * top(x)


# ---- rlkern's side --------------------------------------------------------------------------------------------------
def _merged_whiten(d: Data) -> Outputs:
    half = d.old.shape[0] // 2
    parts = [rlkern.masked_moments(d.old[rows], d.mask[rows]) for rows in (slice(half), slice(half, None))]
    return {"whitened": rlkern.whiten_apply(d.old, rlkern.merge_moments(parts), d.mask)}


def _same_group(ids: Tensor) -> Tensor:
    """For each row the first row of its group: the same for every numbering of the groups."""
    groups = framework.rows_by_label(ids.tolist())
    return torch.tensor([groups[i][0] for i in ids.tolist()], dtype=torch.float64)


def _kl_with_grad(kl: Callable[..., Tensor], d: Data, name: str) -> Outputs:
    leaf = d.old.detach().clone().requires_grad_()
    value = kl(leaf, d.ref, name)
    value.sum().backward()  # type: ignore[no-untyped-call,unused-ignore]
    return {"kl": valid(value.detach(), d), "d_log_prob": valid(leaf.grad, d)}


def pair(result: Any) -> Outputs:
    """(advantages, returns) under their names."""
    return {"advantages": result[0], "returns": result[1]}


def _advantages(name: str, *inputs: str, theirs: str | None = None, **options: Any) -> tuple[Any, Any]:
    """rlkern.advantages.<name> and the formula, called with the same fields."""

    def ours(d: Data) -> Outputs:
        return {"advantages": getattr(rlkern.advantages, name)(*[getattr(d, i) for i in inputs], **options)[0]}

    def formula(f: Formulas, d: Data) -> Outputs:
        passed = {} if options.get("norm_adv_by_std_in_grpo", True) else {"norm_by_std": False}
        return {"advantages": f[theirs or name](*[getattr(d, i) for i in inputs], **passed)}

    return ours, formula


BY_PROMPT = ("rewards", "mask", "uid")
FIRST = [
    Check(
        "REINFORCE++, reset rule (verl <= 0.8)",
        lambda d: pair(rlkern.advantages.reinforce_plus_plus(d.rewards, d.mask, GAMMA, masked="reset")),
        lambda f, d: pair(f["reinforce_plus_plus_reset"](d.rewards, d.mask, GAMMA)),
        _returns_whiten_scale("reset"),
    ),
    Check("GRPO, dict over prompts, std", *_advantages("grpo", *BY_PROMPT), _grpo_scale),
    Check(
        "REINFORCE++-baseline, batch whitening",
        *_advantages("reinforce_plus_plus_baseline", *BY_PROMPT),
        _baseline_scale,
    ),
]



def _whiten_check(what: str, scale: Callable[[Data], float]) -> Check:
    name = f"masked_{what}"
    return Check(
        name,
        lambda d: {what: getattr(rlkern, name)(d.old, d.mask)},
        lambda f, d: {what: f[name](d.old, d.mask)},
        scale,
    )


WHITEN = [
    _whiten_check("sum", _sum_scale),
    _whiten_check("mean", _mean_scale),
    _whiten_check("var", lambda d: 4 * top(d.old) ** 2),
    _whiten_check("whiten", _whiten_scale),
    _whiten_check("normalize", _normalize_scale),
    Check(
        "masked_moments, merge, whiten_apply",
        _merged_whiten,
        lambda f, d: {"whitened": f["masked_whiten"](d.old, d.mask)},
        _whiten_scale,
    ),
]

GROUP = [
    Check(
        "group_index",
        lambda d: {"partition": _same_group(rlkern.group_index(d.uid).ids)},
        lambda f, d: {"partition": _same_group(f["group_ids"](d.uid))},
        lambda d: 0.0,
    ),
    Check(
        "group_mean_std",
        lambda d: dict(
            zip(("mean", "std"), rlkern.group_mean_std(d.rewards.sum(-1), rlkern.group_index(d.uid))[:2], strict=True)
        ),
        lambda f, d: dict(zip(("mean", "std"), f["group_mean_std"](d.rewards.sum(-1), d.uid), strict=True)),
        _score_scale,
    ),
    Check("advantages.grpo, no std", *_advantages("grpo", *BY_PROMPT, norm_adv_by_std_in_grpo=False), _score_scale),
    Check("advantages.rloo", *_advantages("rloo", *BY_PROMPT), _score_scale),
    Check("advantages.opo", *_advantages("opo", *BY_PROMPT), _score_scale),
]


# ---- scans ----------------------------------------------------------------------------------------------------------
def _returns_check(rule: Any) -> Check:
    return Check(
        f"discounted_returns, {rule}",
        lambda d: {"returns": rlkern.discounted_returns(d.rewards, d.mask, gamma=GAMMA, masked=rule)},
        lambda f, d: {"returns": f["discounted_returns"](d.rewards, d.mask, GAMMA, rule)},
        _returns_scale,
    )


def _gae_check(rule: Any) -> Check:
    return Check(
        f"gae, {rule}",
        lambda d: pair(rlkern.gae(d.rewards, wanted(d.values), d.mask, gamma=GAMMA, lam=LAM, masked=rule)),
        lambda f, d: pair(f["gae"](d.rewards, d.values, d.mask, GAMMA, LAM, rule)),
        _gae_scale,
        ("values",),
    )


SCAN = [
    *[_returns_check(rule) for rule in ("skip", "reset", "zero", "turn", None)],
    *[_gae_check(rule) for rule in ("skip", "zero", None)],
    Check(
        "affine_scan, decay by token",
        lambda d: {"y": rlkern.affine_scan(d.old.exp(), d.rewards)},
        lambda f, d: {"y": f["affine_scan"](d.old.exp(), d.rewards)},
        lambda d: top(framework.affine_scan(d.old.exp(), d.rewards.abs())),
    ),
    Check(
        "advantages.gae (whitened)",
        lambda d: pair(rlkern.advantages.gae(d.rewards, wanted(d.values), d.mask, GAMMA, LAM)),
        lambda f, d: pair(f["gae_whitened"](d.rewards, d.values, d.mask, GAMMA, LAM)),
        _gae_whiten_scale,
        ("values",),
    ),
    Check(
        "advantages.reinforce_plus_plus",
        lambda d: pair(rlkern.advantages.reinforce_plus_plus(d.rewards, d.mask, GAMMA)),
        lambda f, d: pair(f["reinforce_plus_plus"](d.rewards, d.mask, GAMMA)),
        _returns_whiten_scale("skip"),
    ),
    Check(
        "advantages.remax",
        lambda d: pair(rlkern.advantages.remax(d.rewards, wanted(d.baselines), d.mask)),
        lambda f, d: pair(f["remax"](d.rewards, d.baselines, d.mask)),
        lambda d: 2 * top(d.rewards.abs().sum(-1)) + top(wanted(d.baselines)),
        ("baselines",),
    ),
]



def _kl_check(name: Any) -> Check:
    return Check(
        f"kl_penalty, {name}",
        lambda d: _kl_with_grad(rlkern.kl_penalty, d, name),
        lambda f, d: _kl_with_grad(f["kl_penalty"], d, name),
        _kl_scale,
        ("ref",),
    )


KL = [
    *[_kl_check(name) for name in ("k1", "abs", "k2", "k3", "k3+")],
    Check(
        "shape_rewards",
        lambda d: {"rewards": rlkern.shape_rewards(d.rewards, d.old, wanted(d.ref), d.mask, kl_coef=0.05)},
        lambda f, d: {"rewards": f["shape_rewards"](d.rewards, d.old, d.ref, d.mask, 0.05)},
        lambda d: top(d.rewards) + 0.05 * (top(d.old) + top(wanted(d.ref))),
        ("ref",),
    ),
]
