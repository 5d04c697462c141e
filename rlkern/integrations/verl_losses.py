# SPDX-License-Identifier: Apache-2.0
"""verl's policy losses, each by a variant of ours, their metrics by one transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlkern
from rlkern.integrations.site import Site, Uncovered
from rlkern.integrations.verl_common import ALL, CORE, core, counts_of, of_loss, of_variant, policy_metrics


# ---- the clipped loss -------------------------------------------------------------------------------------------------
def vanilla_of(
    by_rows: bool, config: Any, mode: Any, old: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, weights: Any
) -> rlkern.PolicyLoss:
    low, high = (x if x is not None else config.clip_ratio for x in (config.clip_ratio_low, config.clip_ratio_high))
    mode, counts = counts_of(mode, by_rows, dict(getattr(config, "global_batch_info", None) or {}), log_prob.shape[-1])
    return rlkern.policy_loss(
        old, log_prob, advantages, mask, cliprange_low=low, cliprange_high=high, clip_ratio_c=config.get("clip_ratio_c", 3.0),
        loss_agg_mode=mode, rollout_is_weights=weights, **counts,
    )  # fmt: skip


def _vanilla(by_rows: bool) -> Callable[..., Any]:
    def compute_policy_loss_vanilla(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean",
        config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        tensors = (old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
        found = vanilla_of(by_rows, config, loss_agg_mode, *tensors)
        return found.loss, policy_metrics(found.metrics)

    return compute_policy_loss_vanilla


# ---- what the variants read of verl's config --------------------------------------------------------------------------
def _or(x: Any, default: float) -> Any:
    return default if x is None else x


def _clip(config: Any) -> dict[str, Any]:
    return {
        "cliprange_low": _or(config.clip_ratio_low, config.clip_ratio),
        "cliprange_high": _or(config.clip_ratio_high, config.clip_ratio),
    }


def _dual(config: Any) -> dict[str, Any]:
    return _clip(config) | {"clip_ratio_c": config.get("clip_ratio_c", 20.0)}


def _clip_cov(config: Any) -> dict[str, Any]:
    own = config.policy_loss
    cov = {"clip_cov_ratio": _or(own.clip_cov_ratio, 2e-4), "clip_cov_lb": _or(own.clip_cov_lb, 1.0)}
    return _clip(config) | cov | {"clip_cov_ub": _or(own.clip_cov_ub, 5.0)}


def _kl_cov(config: Any) -> dict[str, Any]:
    share = _or(config.policy_loss.kl_cov_ratio, 2e-4)
    if share > 1:
        raise Uncovered("more tokens than there are")
    return {"kl_cov_ratio": share, "ppo_kl_coef": _or(config.policy_loss.ppo_kl_coef, 1.0)}


def _dro(config: Any) -> dict[str, Any]:
    if config.policy_loss.dro_beta is None:
        raise Uncovered("dro_beta must be set")
    return {"dro_beta": config.policy_loss.dro_beta}


class Form(NamedTuple):
    """A loss of verl's: our variant, what it reads of the config, its metrics, its default mode; `fixed`: its only mode; `wide`:
    its loss is float32 for half-precision log-probs."""

    variant: Any
    own: Callable[[Any], dict[str, Any]] = lambda config: {}
    names: tuple[str, ...] = ALL
    mode: str = "token-mean"
    fixed: bool = False
    wide: bool = False


_SEQ = "seq-mean-token-mean"
GSPO = Form("gspo", _clip, mode=_SEQ)
REINFORCE = Form("reinforce", names=ALL[1:2], mode="seq-mean-token-sum")
FORMS = {
    "sapo": Form("sapo", lambda config: {"tau_pos": config.tau_pos, "tau_neg": config.tau_neg}, mode=_SEQ, fixed=True),
    "gpg": Form("gpg", names=()),
    "clip_cov": Form("clip_cov", _clip_cov, ALL[:2]),
    "kl_cov": Form("kl_cov", _kl_cov, ALL[1:2]),
    "geo_mean": Form("geo_mean", _clip, fixed=True),
    "dppo_tv": Form("dppo_tv", _dual, wide=True),
    "dppo_kl": Form("dppo_kl", _dual, wide=True),
    "dro": Form("dro", _dro, ALL[1:2]),
    "cispo": Form("cispo", _clip),
}


# ---- calls ------------------------------------------------------------------------------------------------------------
def check(config: Any, log_prob: Tensor, *others: Tensor | None) -> None:
    """What verl's own function is left to judge."""
    if not isinstance(config, core().ActorConfig):
        raise Uncovered("its config is no ActorConfig")
    if log_prob.dim() != 2 or log_prob.numel() == 0 or any(x is not None and x.shape != log_prob.shape for x in others):
        raise Uncovered("tensors of different shapes, or empty ones")


def loss_of(
    form: Form, by_rows: bool, config: Any, mode: str, old: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, weights: Any
) -> rlkern.PolicyLoss:
    """Our loss, its metrics still on the device."""
    check(config, log_prob, old, advantages, mask, weights)
    if form.wide and not {log_prob.dtype, old.dtype, advantages.dtype} <= {torch.float32, torch.float64}:
        raise Uncovered("verl's loss is float32")
    given = dict(config.global_batch_info or {})
    known, counts = (
        (None, {}) if form.variant == "geo_mean" else counts_of(form.mode if form.fixed else mode, by_rows, given, mask.shape[-1])
    )
    return rlkern.policy_loss(
        old, log_prob, advantages, mask, variant=form.variant, loss_agg_mode=known, rollout_is_weights=weights, **form.own(config), **counts
    )


def _loss(form: Form, by_rows: bool) -> Callable[..., Any]:
    def compute_policy_loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = form.mode,
        config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        tensors = (old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
        found = loss_of(form, by_rows, config, loss_agg_mode, *tensors)
        return found.loss, policy_metrics(found.metrics, form.names)

    return compute_policy_loss


def _reinforce(by_rows: bool) -> Callable[..., Any]:
    loss = _loss(REINFORCE, by_rows)

    def compute_policy_loss_reinforce(rollout_log_prob: Tensor, *rest: Any, **more: Any) -> Any:
        return loss(rollout_log_prob, *rest, **more)

    return compute_policy_loss_reinforce


# ---- the size of what a loss adds up ----------------------------------------------------------------------------------
def _metrics_size(log_prob: Tensor, response_mask: Tensor, old: Tensor) -> Tensor:
    """The mean of |log_prob - old_log_prob|, or the 1 of a share."""
    valid = response_mask != 0
    return torch.where(valid, (log_prob - old).abs(), 0.0).sum() / valid.sum().clamp(min=1)


def _only_metrics(log_prob: Tensor, response_mask: Tensor, old_log_prob: Tensor, **more: Any) -> tuple[Any, Tensor]:
    return None, _metrics_size(log_prob, response_mask, old_log_prob)


def _size_of(name: str) -> Callable[..., dict[str, Tensor]]:
    """The loss if each of its terms were positive."""

    def size(
        log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None, **logs: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        (old,) = logs.values()
        x = log_prob - old
        r, each = x.clamp(-20, 20).exp(), (advantages * log_prob).abs()
        if name == "cispo":
            each = each * r.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        elif name.startswith("dppo"):
            each = each * r.clamp(max=config.get("clip_ratio_c", 20.0))
        elif name == "dro":
            beta = config.policy_loss.dro_beta
            each, slope = each + 0.5 * beta * x.square(), advantages.abs() + beta * x.abs()
        elif name == "kl_cov":
            each = advantages.abs() * x.exp() + _or(config.policy_loss.ppo_kl_coef, 1.0) * x.abs()
        elif name == "sapo":
            tau = min(config.tau_pos, config.tau_neg)
            each = advantages.abs() * 4 / tau
            loss_agg_mode = _SEQ
        each = each if rollout_is_weights is None else each * rollout_is_weights.abs()
        with torch.enable_grad():
            each = each.detach().requires_grad_()
            loss = core().agg_loss(each, response_mask, loss_agg_mode, **config.global_batch_info)
            share = torch.autograd.grad(loss, each)[0]
        found = {"result[0]": loss.detach(), "result[1]": _metrics_size(log_prob, response_mask, old)}
        if name == "dro":  # its gradient cancels
            found["gradient of log_prob"] = share * slope * (1.0 if rollout_is_weights is None else rollout_is_weights.abs())
        return found

    return size


# ---- sites ------------------------------------------------------------------------------------------------------------
def sites() -> Iterable[Site]:
    name, op = "compute_policy_loss_", "_policy_variant_fwd"
    both: list[Callable[..., Any]] = [_vanilla(True), _vanilla(False)]
    yield Site(CORE, f"{name}vanilla", both, of_loss, "_policy_loss_fwd", ("log_prob",), terms=("advantages", -1.0), scale=_only_metrics)
    grads = ("log_prob",)
    forms = [_loss(GSPO, True), _loss(GSPO._replace(fixed=True), True)]
    yield Site(CORE, f"{name}gspo", forms, of_variant(_SEQ), op, grads, terms=("advantages", -1.0), scale=_only_metrics)
    for of, form in FORMS.items():
        both = [_loss(form, True), _loss(form, False)]
        signed = ("advantages", -1.0) if of in ("clip_cov", "geo_mean") else None
        size = _only_metrics if signed else _size_of(of)
        yield Site(CORE, f"{name}{of}", both, of_variant(form.mode), op, grads, terms=signed, scale=size, dice=of == "clip_cov")
    both = [_reinforce(True), _reinforce(False)]
    yield Site(CORE, f"{name}reinforce", both, of_variant(REINFORCE.mode), op, grads, scale=_size_of("reinforce"))
