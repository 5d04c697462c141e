# SPDX-License-Identifier: Apache-2.0
"""verl's rollout correction and what it reports, by one pass and one transfer; the loss that calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.integrations.site import Call, Site, Uncovered
from rlkern.integrations.verl_common import ALL, CORE, CORRECTION, DEBUG, actor, batch, read_metrics
from rlkern.integrations.verl_losses import REINFORCE, check, loss_of, vanilla_of

_OWN = "rollout_corr/"


# ---- numbers ----------------------------------------------------------------------------------------------------------
def _numbers(metrics: rlkern.RolloutMetrics, prefix: str = _OWN) -> dict[str, float]:
    found = metrics.as_dict(prefix)
    if found.get(f"{prefix}rollout_is_eff_sample_size") == 0:
        raise Uncovered("no weight is left: verl divides by 0")
    return found


def _together(metrics: rlkern.RolloutMetrics, sums: Tensor) -> tuple[dict[str, float], list[float]]:
    """The numbers of a correction and the sums of a loss, by one transfer."""
    table = metrics.table
    norm = () if metrics.norm is None else (metrics.norm.to(table).reshape(1),)
    host = torch.cat((sums.to(table), table.reshape(-1), *norm)).cpu()
    own, rest = host[: sums.numel()], host[sums.numel() :]
    metrics = metrics._replace(table=rest[: table.numel()].view_as(table), norm=rest[-1] if norm else None)
    return _numbers(metrics), own.tolist()


def _alike(old: Tensor, rollout: Any, mask: Tensor) -> None:
    if not isinstance(rollout, Tensor) or old.dim() != 2 or not old.shape == rollout.shape == mask.shape:
        raise Uncovered("no rollout, or other shapes")


# ---- weights, rejection -------------------------------------------------------------------------------------------------
def correction(
    old_log_prob: Tensor, rollout_log_prob: Tensor, response_mask: Tensor, rollout_is: Any = None,
    rollout_is_threshold: Any = 2.0, rollout_is_batch_normalize: bool = False, rollout_rs: str | None = None,
    rollout_rs_threshold: Any = None,
) -> tuple[Any, Tensor, dict[str, float]]:  # fmt: skip
    _alike(old_log_prob, rollout_log_prob, response_mask)
    found = rlkern.rollout_correction(
        old_log_prob.detach(), rollout_log_prob.detach(), response_mask, rollout_is=rollout_is, rollout_is_threshold=rollout_is_threshold,
        rollout_rs=rollout_rs, rollout_rs_threshold=rollout_rs_threshold, rollout_is_batch_normalize=rollout_is_batch_normalize,
    )  # fmt: skip
    numbers, weights = _numbers(found.metrics), None
    if found.weights is not None:
        weights = sys.modules[CORRECTION].DataProto.from_dict(tensors={"rollout_is_weights": found.weights})
    return weights, found.response_mask, numbers


def correction_weights(
    log_ratio: Tensor, response_mask: Tensor, rollout_is: Any = "token", rollout_is_threshold: Any = 2.0,
    rollout_is_batch_normalize: bool = False,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    if log_ratio.dim() != 2 or rollout_is is None or rollout_is_threshold is None:
        raise Uncovered("no weights")
    found = rlkern.rollout_correction(
        log_ratio.detach(), torch.zeros_like(log_ratio), response_mask, rollout_is=rollout_is,
        rollout_is_threshold=rollout_is_threshold, rollout_is_batch_normalize=rollout_is_batch_normalize,
    )  # fmt: skip
    return found.weights, _starting("rollout_is", found.metrics)  # type: ignore[return-value]


def rejection_mask(
    log_ratio: Tensor, response_mask: Tensor, rollout_rs: str = "token_k1", rollout_rs_threshold: Any = None
) -> tuple[Tensor, dict[str, float]]:
    if log_ratio.dim() != 2 or rollout_rs is None or log_ratio.requires_grad:
        raise Uncovered("no rejection")
    rest: Any = {"rollout_rs": rollout_rs, "rollout_rs_threshold": rollout_rs_threshold}
    found = rlkern.rollout_correction(log_ratio, torch.zeros_like(log_ratio), response_mask, **rest)
    return found.response_mask, _starting("rollout_rs", found.metrics)


def _starting(name: str, metrics: rlkern.RolloutMetrics) -> dict[str, float]:
    return {key: x for key, x in _numbers(metrics, "").items() if key.startswith(name)}


# ---- diagnostics --------------------------------------------------------------------------------------------------------
def offpolicy_metrics(old_log_prob: Tensor, rollout_log_prob: Tensor | None, response_mask: Tensor) -> dict[str, float]:
    _alike(old_log_prob, rollout_log_prob, response_mask)
    return rlkern.rollout_metrics(old_log_prob, rollout_log_prob, response_mask).as_dict("")  # type: ignore[arg-type]


def debug_metrics(data: Any) -> dict[str, Any]:
    tensors = data.batch
    mask = tensors["response_mask"] if "response_mask" in tensors else tensors["attention_mask"]
    mask, old, rollout = mask[:, -tensors["responses"].size(1) :], tensors["old_log_probs"], tensors["rollout_log_probs"]
    _alike(old, rollout, mask)
    found = rlkern.rollout_metrics(old, rollout, mask, probabilities=True).as_dict()
    return {"training/rollout_probs_diff_valid": 1} | {k: x for k, x in found.items() if k.startswith("training/") and "valid" not in k}


# ---- bypass mode ----------------------------------------------------------------------------------------------------------
def _bypass(by_rows: bool) -> Callable[..., Any]:
    def compute_policy_loss_bypass_mode(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean",
        config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        check(config, log_prob, old_log_prob, advantages, response_mask)
        own = config.policy_loss.get("rollout_correction", None)
        kind = None if own is None else own.get("loss_type", "ppo_clip")
        if kind not in ("ppo_clip", "reinforce"):
            raise Uncovered("its rollout_correction is not one of verl's")
        settings = {name: own.get(name, default) for name, default in _SETTINGS.items()}
        found = rlkern.rollout_correction(log_prob.detach(), old_log_prob, response_mask, **settings)
        tensors = (old_log_prob, log_prob, advantages, found.response_mask)
        if kind == "reinforce":
            loss = loss_of(REINFORCE, by_rows, config, loss_agg_mode, *tensors, found.weights)
        else:
            loss = vanilla_of(by_rows, config, loss_agg_mode, *tensors, None)
        numbers, sums = _together(found.metrics, loss.metrics.sums)
        return loss.loss, read_metrics(sums, REINFORCE.names if kind == "reinforce" else ALL) | numbers

    return compute_policy_loss_bypass_mode


_SETTINGS: dict[str, Any] = {
    "rollout_is": None,
    "rollout_is_threshold": 2.0,
    "rollout_is_batch_normalize": False,
    "rollout_rs": None,
    "rollout_rs_threshold": None,
}


# ---- the sizes of what is added up ----------------------------------------------------------------------------------------
def _size(old: Tensor, rollout: Tensor, mask: Tensor, bound: Any = None) -> Tensor:
    """Of all numbers of a batch: what a row sums up, weights up to their bound, and the 1 that chi-squared takes away."""
    a, b = (torch.where(mask != 0, x, 0.0).abs().sum(-1).max() for x in (old, rollout))
    most = float(str(bound).rpartition("_")[2]) if bound is not None else 0.0
    return 2 + most + a + b


def _offpolicy_size(old_log_prob: Tensor, rollout_log_prob: Tensor, response_mask: Tensor) -> Tensor:
    return _size(old_log_prob, rollout_log_prob, response_mask)


def _correction_size(
    old_log_prob: Tensor, rollout_log_prob: Tensor, response_mask: Tensor, rollout_is: Any = None, rollout_is_threshold: Any = 2.0,
    *unused: Any, **more: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return None, None, _size(old_log_prob, rollout_log_prob, response_mask, rollout_is_threshold)


def _ratio_size(
    log_ratio: Tensor, response_mask: Tensor, rollout_is: Any = None, rollout_is_threshold: Any = 2.0, **more: Any
) -> tuple[Any, ...]:
    return None, _size(log_ratio, torch.zeros_like(log_ratio), response_mask, rollout_is_threshold)


def _bypass_size(old_log_prob: Tensor, log_prob: Tensor, response_mask: Tensor, **more: Any) -> tuple[Any, ...]:
    return None, _size(old_log_prob, log_prob, response_mask, 3.0)


def _debug_size(data: Any) -> Tensor:
    """Of probabilities."""
    return torch.ones(())


# ---- what tells the versions apart -----------------------------------------------------------------------------------
def _logs() -> tuple[Tensor, Tensor, Tensor]:
    x, y, _, mask = batch()
    return -x.abs(), -x.abs() + 0.5 * y, mask


_IS: tuple[dict[str, Any], ...] = (
    {"rollout_is": "token", "rollout_is_threshold": 1.1},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.5, "rollout_is_batch_normalize": True},
    {"rollout_is": "token", "rollout_is_threshold": "0.5_1.2"},
)
_RS: tuple[dict[str, Any], ...] = (
    {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.5"},
    {"rollout_rs": "seq_sum_k2,seq_max_k3", "rollout_rs_threshold": "0.5,0.3"},
)


def _of_correction(original: Any) -> list[Call]:
    return [(_logs(), given) for given in ({}, *_IS, *_RS, _IS[0] | _RS[1])]


def _of_parts(*given: dict[str, Any]) -> Callable[[Any], list[Call]]:
    old, rollout, mask = _logs()
    return lambda original: [((old - rollout, mask), more) for more in given]


def _of_debug(original: Any) -> list[Call]:
    old, rollout, mask = _logs()
    wide = {"old_log_probs": old, "rollout_log_probs": rollout, "responses": mask, "attention_mask": torch.cat((mask, mask), 1)}
    return [((SimpleNamespace(batch=wide),), {}), ((SimpleNamespace(batch=wide | {"response_mask": mask}),), {})]


def _of_bypass(original: Any) -> list[Call]:
    rollout, log_prob, mask = _logs()
    found: list[Call] = []
    for own in (_IS[0] | _RS[0], _IS[0] | {"loss_type": "reinforce"}):
        for mode in ("token-mean", "seq-mean-token-sum-norm"):
            config = actor(rollout_correction=own)
            found.append(((rollout, log_prob, batch()[2], mask, mode), {"config": config}))
    return found


# ---- sites ------------------------------------------------------------------------------------------------------------
def sites() -> Iterable[Site]:
    op = "_rollout_correction_fwd"
    name = "compute_rollout_correction_and_rejection_mask"
    yield Site(CORRECTION, name, [correction], _of_correction, op, scale=_correction_size)
    yield Site(CORRECTION, "compute_rollout_correction_weights", [correction_weights], _of_parts(*_IS), op, scale=_ratio_size)
    yield Site(CORRECTION, "compute_rollout_rejection_mask", [rejection_mask], _of_parts(*_RS), op, scale=_ratio_size)
    both: list[Call] = [(_logs(), {})]
    yield Site(CORRECTION, "compute_offpolicy_metrics", [offpolicy_metrics], lambda _: both, op, scale=_offpolicy_size)
    yield Site(DEBUG, "calculate_debug_metrics", [debug_metrics], _of_debug, op, scale=_debug_size)
    forms = [_bypass(True), _bypass(False)]
    signed = ("advantages", -1.0)
    yield Site(CORE, "compute_policy_loss_bypass_mode", forms, _of_bypass, op, ("log_prob",), terms=signed, scale=_bypass_size)
