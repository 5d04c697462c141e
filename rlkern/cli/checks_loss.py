# SPDX-License-Identifier: Apache-2.0
"""The losses that `rlkern verify` compares: value, gradient and metrics. And the list of all checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.cli import framework, losses, rollout
from rlkern.cli.against import Formulas
from rlkern.cli.checks import FIRST, GROUP, KL, SCAN, WHITEN, Check, Outputs
from rlkern.cli.fields import Data, top, valid, wanted
from rlkern.cli.scales import Scale

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum")
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, CLAMP = 0.8, 1.2, 3.0, 20.0


def _near_clip(d: Data, eps: float) -> Tensor:
    x = wanted(d.new) - d.old
    near = (x.abs() - CLAMP).abs() < 8 * eps * CLAMP
    for bound in (CLIP_LOW, CLIP_HIGH, DUAL_CLIP):
        near |= (x.exp() - bound).abs() < 8 * eps * bound
    return near & (d.mask != 0)


def _near_value_clip(d: Data, eps: float) -> Tensor:
    vpreds, values = wanted(d.vpreds), wanted(d.values)
    scale = 1 + vpreds.abs() + values.abs() + wanted(d.returns).abs()
    inside = vpreds.clamp(values - 0.5, values + 0.5)
    tie = ((vpreds - wanted(d.returns)).abs() - (inside - wanted(d.returns)).abs()).abs() < 8 * eps * scale
    return tie & ((vpreds - values).abs() > 0.5 - 8 * eps * scale) & (d.mask != 0)


def _number(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _policy(result: tuple[Tensor, Any], leaf: Tensor, d: Data) -> Outputs:
    loss, metrics = result
    loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
    named = metrics if isinstance(metrics, dict) else metrics.as_dict()
    found = {"loss": loss.detach(), "d_log_prob": valid(leaf.grad, d)}
    for name in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"):
        found[name] = _number(named[name])
    return found


def _weights(d: Data, mode: str) -> Tensor:
    """Each token's weight in the loss, from the aggregation's definition."""
    one = torch.ones_like(d.old, requires_grad=True)
    framework.aggregate(one, d.mask, mode).backward()  # type: ignore[no-untyped-call,unused-ignore]
    return wanted(one.grad)


def _policy_scale(mode: str) -> Any:
    def scale(d: Data) -> dict[str, Scale]:
        x = valid(wanted(d.new) - d.old, d).clamp(-CLAMP, CLAMP)
        # an error in x is one in the ratio: relative eps * (|x| + the log-probs' own size is exact)
        terms = valid(d.advantages, d).abs() * x.exp().clamp(max=DUAL_CLIP * 2) * (1 + x.abs())
        weights = _weights(d, mode)
        size = 1 + top(x)
        found: dict[str, Scale] = dict.fromkeys(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), size)
        return found | {"loss": float((terms * weights).sum()), "d_log_prob": terms * weights}

    return scale


def _policy_check(mode: Any, fused: bool = False) -> Check:
    def leaf_of(d: Data) -> Tensor:
        return wanted(d.new).detach().clone().requires_grad_()

    def ours(d: Data) -> Outputs:
        if fused:
            both = rlkern.policy_loss_and_grad(d.old, wanted(d.new), d.advantages, d.mask, loss_agg_mode=mode)
            named = {k: _number(v) for k, v in both.metrics.as_dict().items() if k.startswith("actor/p")}
            return {"loss": both.loss, "d_log_prob": valid(both.d_log_prob, d)} | named
        leaf = leaf_of(d)
        result = rlkern.policy_loss(d.old, leaf, d.advantages, d.mask, loss_agg_mode=mode)
        return _policy((result.loss, result.metrics), leaf, d)

    def theirs(f: Formulas, d: Data) -> Outputs:
        leaf = leaf_of(d)
        return _policy(f["policy_loss"](d.old, leaf, d.advantages, d.mask, mode), leaf, d)

    name = "policy_loss_and_grad" if fused else f"policy_loss, {mode}"
    return Check(name, ours, theirs, _policy_scale(mode), ("new",), _near_clip)


def _variant_check(name: str) -> Check:
    """The loss of a variant. Its gradient jumps at thresholds, which rows share: the tests compare it away from them."""

    def ours(d: Data) -> Outputs:
        more: dict[str, Any] = {"rollout_log_prob": d.ref} if name == "decoupled" else {}
        found = rlkern.policy_loss(d.old, wanted(d.new), d.advantages, d.mask, variant=name, **losses.OPTIONS[name], **more)  # type: ignore[arg-type]
        return {"loss": found.loss}

    def theirs(f: Formulas, d: Data) -> Outputs:
        return {"loss": f[f"loss_{name}"](d.old, d.new, d.advantages, d.mask, d.ref).detach()}

    def scale(d: Data) -> Scale:
        new, ref = wanted(d.new), wanted(d.ref)
        x, moved = valid(new - d.old, d), valid(d.old - ref, d).exp() if name == "decoupled" else 1
        of_row = x.abs().sum(-1, keepdim=True) if name in ("rloo", "vespo") else x.abs().amax(-1, keepdim=True)
        terms = valid(d.advantages, d).abs() * 4 * x.exp() * moved * (1 + of_row) * (1 + valid(new, d).abs())
        return float((terms * _weights(d, "seq-mean-token-sum" if name == "luspo" else "token-mean")).sum())

    return Check(f"policy_loss, {name}", ours, theirs, scale, ("new", "ref"))


def _value(loss: Tensor, clipfrac: Any, leaf: Tensor, d: Data) -> Outputs:
    loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
    return {"loss": loss.detach(), "d_vpreds": valid(leaf.grad, d), "clipfrac": _number(clipfrac)}


def _our_value_loss(d: Data) -> Outputs:
    leaf = wanted(d.vpreds).detach().clone().requires_grad_()
    result = rlkern.value_loss(leaf, wanted(d.returns), wanted(d.values), d.mask)
    named = {name.rsplit("/", 1)[-1]: value for name, value in result.metrics.as_dict().items()}
    return _value(result.loss, next(v for k, v in named.items() if "clipfrac" in k), leaf, d)


def _their_value_loss(f: Formulas, d: Data) -> Outputs:
    leaf = wanted(d.vpreds).detach().clone().requires_grad_()
    loss, clipfrac = f["value_loss"](leaf, d.returns, d.values, d.mask)
    return _value(loss, clipfrac, leaf, d)


def _value_scale(d: Data) -> dict[str, Scale]:
    size = valid(wanted(d.vpreds).abs() + wanted(d.returns).abs() + wanted(d.values).abs() + 0.5, d)
    tokens = max(float((d.mask != 0).sum()), 1.0)
    return {"loss": float((size * size).sum()) / tokens, "d_vpreds": size / tokens, "clipfrac": 1.0}


def slack(check: Check, output: str, near: Tensor, d: Data) -> float:
    """How far a fraction over tokens may move because rounding decides the side of a bound."""
    if output.rsplit("/", 1)[-1] not in ("pg_clipfrac", "pg_clipfrac_lower", "clipfrac"):
        return 0.0
    tokens = float((d.mask != 0).sum())
    return float(near.sum()) / tokens if tokens else math.inf


LOSS = [
    *[_policy_check(mode) for mode in MODES],
    _policy_check("token-mean", fused=True),
    *[_variant_check(name) for name in losses.LOSSES if name not in losses.CHOOSING],
    Check("rollout_correction", rollout.ours, rollout.theirs, rollout.scale, ("new",)),
    Check("value_loss", _our_value_loss, _their_value_loss, _value_scale, ("values",), _near_value_clip),
]
CHECKS = [*FIRST, *WHITEN, *GROUP, *SCAN, *KL, *LOSS]
