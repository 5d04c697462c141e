# SPDX-License-Identifier: Apache-2.0
"""What `rlkern verify` compares: for each op its call, the framework's formula, and the scale of its sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.cli import framework, scales
from rlkern.cli.against import Formulas
from rlkern.cli.fields import GAMMA, LAM, Data, valid, wanted

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """`scale(exact)` is the sum of absolute terms behind each result; verify takes each row's largest.

    `near` marks tokens so close to a clip bound that rounding decides the side: gradients are compared outside them, and
    each may move a fraction by one token.
    """

    op: str
    ours: Callable[[Data], Outputs]
    theirs: Callable[[Formulas, Data], Outputs]
    scale: Callable[[Data], scales.Scale]
    needs: tuple[str, ...] = ()
    near: Callable[[Data, float], Tensor] | None = None


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
        scales.returns_whitened("reset"),
    ),
    Check("GRPO, dict over prompts, std", *_advantages("grpo", *BY_PROMPT), scales.grpo),
    Check(
        "REINFORCE++-baseline, batch whitening",
        *_advantages("reinforce_plus_plus_baseline", *BY_PROMPT),
        scales.baseline,
    ),
]


def _whiten_check(what: str, scale: Callable[[Data], scales.Scale]) -> Check:
    name = f"masked_{what}"
    return Check(
        name,
        lambda d: {what: getattr(rlkern, name)(d.old, d.mask)},
        lambda f, d: {what: f[name](d.old, d.mask)},
        scale,
    )


WHITEN = [
    _whiten_check("sum", scales.total),
    _whiten_check("mean", scales.mean),
    _whiten_check("var", scales.variance),
    _whiten_check("whiten", scales.whiten),
    _whiten_check("normalize", scales.normalize),
    Check(
        "masked_moments, merge, whiten_apply",
        _merged_whiten,
        lambda f, d: {"whitened": f["masked_whiten"](d.old, d.mask)},
        scales.whiten,
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
        lambda d: dict(zip(("mean", "std"), rlkern.group_mean_std(d.rewards.sum(-1), rlkern.group_index(d.uid))[:2], strict=True)),
        lambda f, d: dict(zip(("mean", "std"), f["group_mean_std"](d.rewards.sum(-1), d.uid), strict=True)),
        scales.group_statistics,
    ),
    Check("advantages.grpo, no std", *_advantages("grpo", *BY_PROMPT, norm_adv_by_std_in_grpo=False), scales.scores),
    Check("advantages.rloo", *_advantages("rloo", *BY_PROMPT), scales.scores),
    Check("advantages.opo", *_advantages("opo", *BY_PROMPT), scales.scores),
    Check("advantages.gpg", *_advantages("gpg", *BY_PROMPT), scales.gpg),
]


# ---- scans ----------------------------------------------------------------------------------------------------------
def _returns_check(rule: Any) -> Check:
    return Check(
        f"discounted_returns, {rule}",
        lambda d: {"returns": rlkern.discounted_returns(d.rewards, d.mask, gamma=GAMMA, masked=rule)},
        lambda f, d: {"returns": f["discounted_returns"](d.rewards, d.mask, GAMMA, rule)},
        scales.returns,
    )


def _gae_check(rule: Any) -> Check:
    return Check(
        f"gae, {rule}",
        lambda d: pair(rlkern.gae(d.rewards, wanted(d.values), d.mask, gamma=GAMMA, lam=LAM, masked=rule)),
        lambda f, d: pair(f["gae"](d.rewards, d.values, d.mask, GAMMA, LAM, rule)),
        scales.gae,
        ("values",),
    )


SCAN = [
    *[_returns_check(rule) for rule in ("skip", "reset", "zero", "turn", None)],
    *[_gae_check(rule) for rule in ("skip", "zero", None)],
    Check(
        "affine_scan, decay by token",
        lambda d: {"y": rlkern.affine_scan(d.old.exp(), d.rewards)},
        lambda f, d: {"y": f["affine_scan"](d.old.exp(), d.rewards)},
        scales.decayed,
    ),
    Check(
        "advantages.gae (whitened)",
        lambda d: pair(rlkern.advantages.gae(d.rewards, wanted(d.values), d.mask, GAMMA, LAM)),
        lambda f, d: pair(f["gae_whitened"](d.rewards, d.values, d.mask, GAMMA, LAM)),
        scales.gae_whitened,
        ("values",),
    ),
    Check(
        "advantages.reinforce_plus_plus",
        lambda d: pair(rlkern.advantages.reinforce_plus_plus(d.rewards, d.mask, GAMMA)),
        lambda f, d: pair(f["reinforce_plus_plus"](d.rewards, d.mask, GAMMA)),
        scales.returns_whitened("skip"),
    ),
    Check(
        "advantages.remax",
        lambda d: pair(rlkern.advantages.remax(d.rewards, wanted(d.baselines), d.mask)),
        lambda f, d: pair(f["remax"](d.rewards, d.baselines, d.mask)),
        scales.remax,
        ("baselines",),
    ),
]


def _kl_check(name: Any) -> Check:
    return Check(
        f"kl_penalty, {name}",
        lambda d: _kl_with_grad(rlkern.kl_penalty, d, name),
        lambda f, d: _kl_with_grad(f["kl_penalty"], d, name),
        scales.kl,
        ("ref",),
    )


KL = [
    *[_kl_check(name) for name in ("k1", "abs", "k2", "k3", "k3+")],
    Check(
        "shape_rewards",
        lambda d: {"rewards": rlkern.shape_rewards(d.rewards, d.old, wanted(d.ref), d.mask, kl_coef=0.05)},
        lambda f, d: {"rewards": f["shape_rewards"](d.rewards, d.old, d.ref, d.mask, 0.05)},
        scales.shaped,
        ("ref",),
    ),
]
