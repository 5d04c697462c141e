# SPDX-License-Identifier: Apache-2.0
"""verl's functions and ours, from 0.7.0 to 0.9.1.

    VERL_USE_EXTERNAL_MODULES=rlkern.integrations.verl python3 -m verl.trainer.main_ppo ...

Imported so, by verl itself, this module patches; imported otherwise it does nothing until `patch` is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern import advantages
from rlkern.advantages.outcome import outcome
from rlkern.integrations import hooks
from rlkern.integrations.site import Call, Site, Uncovered, logger
from rlkern.testing import whitened_scale

_CORE, _MATH, _GROUPS = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional", "verl.utils.groupwise"
# What rlkern has no kernel for yet; where these call a patched function, they reach ours.
LEFT = {
    f"{_CORE}.{name}": "no kernel yet"
    for name in (
        "compute_grpo_passk_outcome_advantage", "compute_gdpo_outcome_advantage", "compute_gpg_outcome_advantage",
        "compute_optimal_token_baseline_advantage", "compute_multi_turn_optimal_token_baseline_advantage",
        "compute_policy_loss_gspo", "compute_policy_loss_sapo", "compute_policy_loss_gpg", "compute_policy_loss_clip_cov",
        "compute_policy_loss_kl_cov", "compute_policy_loss_geo_mean", "compute_policy_loss_dppo_tv", "compute_policy_loss_dppo_kl",
        "compute_policy_loss_dro", "compute_policy_loss_cispo", "compute_policy_loss_reinforce", "compute_policy_loss_bypass_mode",
    )
} | {
    f"{_CORE}.compute_policy_loss": "deprecated, and built of what is patched",
    f"{_GROUPS}.as_torch_index": "labels, no arithmetic",
    "verl.trainer.ppo.rollout_corr_helper": "no kernel yet",
    f"{_MATH}.logprobs_from_logits, entropy_from_logits": "no kernel yet",
}  # fmt: skip


# ---- torch_functional, groupwise --------------------------------------------------------------------------------------
def masked_sum(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    return rlkern.masked_sum(values, mask, axis)


def masked_mean(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    return rlkern.masked_mean(values, mask, axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    return rlkern.masked_var(values, mask, unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return rlkern.masked_whiten(values, mask, shift_mean=shift_mean)


def group_mean_std(scores: Tensor, gidx: Tensor, eps: float = 1e-6, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """One slot per id, as ids are there: an id without a row has mean 0 and deviation 1."""
    on_cpu = device in ("cpu", torch.device("cpu")) or (device is None and not torch.cuda.is_available())
    if not (on_cpu and scores.is_cpu and gidx.is_cpu and gidx.numel()):
        raise Uncovered("its device is resolved by verl")
    slots = int(gidx.max()) + 1
    if gidx.shape != scores.shape or int(gidx.min()) < 0 or gidx.is_floating_point():
        raise Uncovered("ids that verl refuses or casts")
    index = rlkern.group_index(gidx)
    found = rlkern.group_mean_std(scores.float(), index, eps=eps)
    mean, std, count = torch.zeros(slots), torch.ones(slots), torch.zeros(slots)
    mean[gidx], std[gidx] = found.mean[index.ids], found.std[index.ids]
    count[gidx] = index.counts.float()[index.ids]
    return mean, std, count


def _exact_stats(scores: Tensor, gidx: Tensor, eps: float = 1e-6, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, which verl's own function leaves for float32."""
    wide, slots = scores.double(), int(gidx.max()) + 1
    count = torch.zeros(slots, dtype=torch.float64).index_add(0, gidx, torch.ones_like(wide))
    mean = torch.zeros_like(count).index_add(0, gidx, wide) / count.clamp(min=1)
    squares = torch.zeros_like(count).index_add(0, gidx, (wide - mean[gidx]).square())
    std, alone = (squares / (count - 1).clamp(min=1)).clamp(min=eps).sqrt(), count <= 1
    return mean.masked_fill(alone, 0), std.masked_fill(alone, 1), count


def _exact_grpo(*args: Any, **kwargs: Any) -> Any:
    """verl's loop, which keeps float64 where its vectorized form does not."""
    return sys.modules[_CORE].compute_grpo_outcome_advantage(*args, **kwargs)


# ---- advantages -------------------------------------------------------------------------------------------------------
def gae(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any) -> tuple[Tensor, ...]:
    return tuple(advantages.gae(token_level_rewards, values, response_mask, float(gamma), float(lam)))


def grpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(advantages.grpo(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo))


def grpo_vectorized(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _wide(token_level_rewards)
    return tuple(advantages.grpo(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo))


def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None, **unused: Any
) -> tuple[Tensor, ...]:
    return tuple(advantages.rloo(token_level_rewards, response_mask, index))


def rloo_vectorized(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None, **unused: Any
) -> tuple[Tensor, ...]:
    """A group of one gets 0 here."""
    _wide(token_level_rewards)
    found = outcome("rloo", token_level_rewards, response_mask, index, None, None, "leave_one_out", singleton="zero")
    return tuple(found)


def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None, **unused: Any
) -> tuple[Tensor, ...]:
    return tuple(advantages.opo(token_level_rewards, response_mask, index))


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None, **unused: Any
) -> tuple[Tensor, ...]:
    return tuple(advantages.reinforce_plus_plus_baseline(token_level_rewards, response_mask, index))


def reinforce_plus_plus(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **unused: Any) -> tuple[Tensor, ...]:
    return tuple(advantages.reinforce_plus_plus(token_level_rewards, response_mask, float(config.gamma)))


def reinforce_plus_plus_reset(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **unused: Any) -> tuple[Tensor, ...]:
    found = advantages.reinforce_plus_plus(token_level_rewards, response_mask, float(config.gamma), masked="reset")
    return tuple(found)


def remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **unused: Any
) -> tuple[Tensor, ...]:
    return tuple(advantages.remax(token_level_rewards, reward_baselines, response_mask))


def _gae_scale(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any) -> tuple[Tensor, Tensor]:
    """The absolute terms of each sum; what enters at masked tokens counts too, which is more than enough."""
    terms = rlkern.affine_scan(torch.full_like(values, gamma * lam), token_level_rewards.abs() + 2 * values.abs()) + values.abs()
    found = rlkern.gae(token_level_rewards, values, response_mask, gamma=float(gamma), lam=float(lam)).advantages
    return whitened_scale(found, terms, response_mask), terms


def _returns_scale(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **unused: Any) -> tuple[Tensor, Tensor]:
    terms = rlkern.affine_scan(torch.full_like(token_level_rewards, config.gamma), token_level_rewards.abs())
    found = rlkern.discounted_returns(token_level_rewards, response_mask, gamma=float(config.gamma))
    return whitened_scale(found, terms, response_mask), terms


def _wide(rewards: Tensor) -> None:
    if rewards.dtype not in (torch.float32, torch.float64):
        raise Uncovered("verl gives float64 for half-precision rewards")


# ---- KL, aggregation, losses ------------------------------------------------------------------------------------------
def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: Any) -> Tensor:
    if kl_penalty not in ("low_var_kl", "k3"):
        raise Uncovered("one subtraction and at most one product: torch's own is as fast")
    return rlkern.kl_penalty(logprob, ref_logprob, kl_penalty)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: Any) -> Tensor:
    if kl_penalty not in ("low_var_kl", "k3", "low_var_kl+", "k3+", "k1+", "abs+"):
        raise Uncovered("one subtraction and at most one product: torch's own is as fast")
    return rlkern.kl_penalty(logprob, ref_logprob, kl_penalty)


def _simple(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> bool:
    """One subtraction and at most one product: torch's own is as fast."""
    return kl_penalty not in ("low_var_kl", "k3", "low_var_kl+", "k3+", "k1+", "abs+")


def _few(values: Tensor, mask: Tensor, axis: Any = None) -> bool:
    """Some thousand numbers on a CPU: three calls of torch cost no more than one of ours."""
    return values.is_cpu and values.numel() < 1 << 12


def _small(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, *counts: Any, **more: Any) -> bool:
    """The token modes are verl's masked_sum, which is patched; below some 16,000 tokens torch's calls cost no more than ours."""
    return loss_agg_mode[:3] != "seq" or loss_mat.numel() < 1 << 14


def _counts(mode: str, by_rows: bool, counts: dict[str, Any], width: int) -> tuple[Any, dict[str, Any]]:
    """Mode and counts as rlkern takes them. verl 0.7.0 divides seq-mean-token-sum-norm by the factor alone: `by_rows` False."""
    known = {k: counts.get(k) for k in ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")}
    if counts.keys() - known.keys():
        raise Uncovered(f"it is given {', '.join(sorted(counts.keys() - known.keys()))}")
    known["dp_size"] = 1 if known["dp_size"] is None else known["dp_size"]
    if mode == "seq-mean-token-sum-norm" and not by_rows:
        factor = known["loss_scale_factor"]
        return "seq-mean-token-sum", {"dp_size": 1, "global_batch_size": width if factor is None else factor}
    return mode, known


def _agg_loss(by_rows: bool) -> Callable[..., Tensor]:
    def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, dp_size: Any = 1, **counts: Any) -> Tensor:
        mode, known = _counts(loss_agg_mode, by_rows, {"dp_size": dp_size, **counts}, loss_mask.shape[-1])
        if loss_mask.is_floating_point() or loss_mat.dim() != 2 or not mode.startswith("seq-mean"):
            raise Uncovered("token modes are verl's masked_sum, which is patched")
        rows, tokens = rlkern.masked_sum(loss_mat, loss_mask, -1), (loss_mask != 0).sum(-1)
        if mode == "seq-mean-token-mean":
            rows = rows / (tokens + 1e-8)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sequences = known["global_batch_size"]
        if sequences is None:
            if known["dp_size"] > 1:
                raise Uncovered("verl asks for the global count")
            sequences = (tokens > 0).sum()
        loss: Tensor = rows.sum() / sequences * known["dp_size"]
        if mode == "seq-mean-token-sum-norm":
            factor = known["loss_scale_factor"]
            loss = loss / (loss_mask.shape[-1] if factor is None else factor)
        return loss

    return agg_loss


def _vanilla(by_rows: bool) -> Callable[..., Any]:
    def compute_policy_loss_vanilla(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean",
        config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        low, high = (x if x is not None else config.clip_ratio for x in (config.clip_ratio_low, config.clip_ratio_high))
        mode, counts = _counts(loss_agg_mode, by_rows, dict(getattr(config, "global_batch_info", None) or {}), log_prob.shape[-1])
        found = rlkern.policy_loss(
            old_log_prob, log_prob, advantages, response_mask, cliprange_low=low, cliprange_high=high,
            clip_ratio_c=config.get("clip_ratio_c", 3.0), loss_agg_mode=mode, rollout_is_weights=rollout_is_weights, **counts,
        )  # fmt: skip
        return found.loss, policy_metrics(found.metrics)

    return compute_policy_loss_vanilla


def policy_metrics(metrics: rlkern.Metrics) -> dict[str, float]:
    """verl's three, by one transfer. A call with no valid token has 0, as verl's masked_mean."""
    tokens, _sequences, clipped, lower, kl = metrics.sums[:5].tolist()
    n = max(tokens, 1.0)
    return {"actor/pg_clipfrac": clipped / n, "actor/ppo_kl": kl / n, "actor/pg_clipfrac_lower": lower / n}


def _value_loss(by_rows: bool) -> Callable[..., Any]:
    def compute_value_loss(
        vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
        loss_agg_mode: str = "token-mean", **counts: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        mode, known = _counts(loss_agg_mode, by_rows, counts, vpreds.shape[-1])
        found = rlkern.value_loss(vpreds, returns, values, response_mask, cliprange_value=cliprange_value, loss_agg_mode=mode, **known)
        sums = found.metrics.sums
        return found.loss, (sums[2] / sums[0].clamp(min=1)).float()

    return compute_value_loss


# ---- what tells the versions apart -----------------------------------------------------------------------------------
class _Config:
    """What the probed functions read of verl's configs."""

    clip_ratio, clip_ratio_low, clip_ratio_high, gamma, lam = 0.2, 0.2, 0.3, 0.9, 0.8

    def __init__(self, **counts: Any) -> None:
        self.global_batch_info = counts

    def get(self, name: str, default: Any = None) -> Any:
        return {"clip_ratio_c": 3.0}.get(name, default)


def _batch() -> tuple[Tensor, ...]:
    """Six rows with holes, an empty one, and one that is whole: rewards, values, another of them, mask."""
    g = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 6, 9, generator=g).unbind(0)
    mask = (torch.rand(6, 9, generator=g) < 0.7).long()
    mask[0], mask[1] = 1, 0
    return x, y, z, mask


def _of_values(*more: dict[str, Any]) -> Callable[[Any], list[Call]]:
    return lambda original: [((_batch()[0], _batch()[3]), kwargs) for kwargs in more]


def _of_estimator(original: Any) -> list[Call]:
    rewards, _, _, mask = _batch()
    index = np.array(["a", "b", "a", "c", "b", "a"], dtype=object)
    given = {"response_mask": mask, "index": index}
    return [((), given | {"token_level_rewards": r}) for r in (rewards, rewards * 1e-4)]  # a floor under the deviation shows


def _of_returns(original: Any) -> list[Call]:
    rewards, baselines, _, mask = _batch()
    given = {"token_level_rewards": rewards, "response_mask": mask, "config": _Config()}
    return [((), given | ({"reward_baselines": baselines[:, 0]} if "remax" in original.__name__ else {}))]


def _of_loss(original: Any) -> list[Call]:
    x, y, z, mask = _batch()
    return [((x, y, z, mask, mode, _Config()), {}) for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")]


def sites() -> Iterable[Site]:
    """Every function that has a counterpart."""
    axes: tuple[dict[str, Any], ...] = ({}, {"axis": -1}, {"axis": 0})
    whole: tuple[dict[str, Any], ...] = ({}, {"unbiased": False})
    shifted: tuple[dict[str, Any], ...] = ({}, {"shift_mean": False})
    x, y, z, mask = _batch()
    sums = _of_values(*axes)
    yield Site(_MATH, "masked_sum", [masked_sum], sums, "_masked_sum_fwd", ("values",), terms=("values", 1.0), stays=_few)
    yield Site(_MATH, "masked_mean", [masked_mean], _of_values(*axes), "_masked_mean_fwd", ("values",), terms=("values", 1.0))
    yield Site(_MATH, "masked_var", [masked_var], _of_values(*whole), "_masked_var_fwd", ("values",), terms=("values", 1.0))
    yield Site(_MATH, "masked_whiten", [masked_whiten], _of_values(*shifted), "_masked_whiten_fwd")
    ids = torch.tensor([0, 3, 0, 0, 3, 4])
    close = torch.tensor([1e4, 1.0, 1e4 + 1, 1e4 + 3, 1.0, 7.0])
    yield Site(
        _GROUPS,
        "group_mean_std",
        [group_mean_std],
        lambda _: [((close, ids), {"device": "cpu"})],
        "_group_mean_std_fwd",
        exact=_exact_stats,
    )
    yield Site(_CORE, "compute_gae_advantage_return", [gae], lambda _: [((x, y, mask, 0.9, 0.8), {})], "_gae_fwd", scale=_gae_scale)
    for name, ours in (
        ("grpo", grpo), ("grpo_vectorized", grpo_vectorized), ("rloo", rloo), ("rloo_vectorized", rloo_vectorized), ("opo", opo),
        ("reinforce_plus_plus_baseline", reinforce_plus_plus_baseline),
    ):  # fmt: skip
        exact = _exact_grpo if name == "grpo_vectorized" else None
        yield Site(_CORE, f"compute_{name}_outcome_advantage", [ours], _of_estimator, "_group_advantage_fwd", exact=exact)
    two = [reinforce_plus_plus, reinforce_plus_plus_reset]
    yield Site(_CORE, "compute_reinforce_plus_plus_outcome_advantage", two, _of_returns, "_discounted_returns_fwd", scale=_returns_scale)
    yield Site(_CORE, "compute_remax_outcome_advantage", [remax], _of_returns, "_discounted_returns_fwd")
    pair = ("logprob", "ref_logprob")
    yield Site(_CORE, "kl_penalty_forward", [kl_penalty_forward], lambda _: [((x, y, "k3"), {})], "_kl_penalty_fwd", pair, stays=_simple)
    suffix: list[Call] = [((x, y, "k3"), {}), ((x, y, "k3+"), {})]
    yield Site(_CORE, "kl_penalty", [kl_penalty, kl_penalty_forward], lambda _: suffix, "_kl_penalty_fwd", pair, stays=_simple)
    modes = ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean")
    agg: list[Call] = [((x, mask, mode), {}) for mode in modes]
    yield Site(
        _CORE, "agg_loss", [_agg_loss(True), _agg_loss(False)], lambda _: agg, "_masked_sum_fwd", ("loss_mat",),
        terms=("loss_mat", 1.0), stays=_small,
    )  # fmt: skip
    both = [_vanilla(True), _vanilla(False)]
    yield Site(_CORE, "compute_policy_loss_vanilla", both, _of_loss, "_policy_loss_fwd", ("log_prob",), terms=("advantages", -1.0))
    value: list[Call] = [((x, y, z, mask, 0.5, mode), {}) for mode in modes]
    yield Site(_CORE, "compute_value_loss", [_value_loss(True), _value_loss(False)], lambda _: value, "_value_loss_fwd", ("vpreds",))


def patch(mode: str = "on") -> None:
    """`rlkern.integrations.patch("verl", mode)`."""
    hooks.patch("verl", sites, mode)


def unpatch() -> None:
    hooks.unpatch("verl")


def patch_safely(mode: str) -> None:
    """verl runs without us rather than not at all."""
    try:
        patch(mode)
    except Exception:
        logger.exception("rlkern: verl stays as it is")


def patch_if_named(module: str, mode: str) -> None:
    """Where verl's own switch names that module."""
    if module in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").replace(" ", "").split(","):
        patch_safely(mode)


patch_if_named(__name__, "on")
