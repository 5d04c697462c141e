# SPDX-License-Identifier: Apache-2.0
"""The formulas to compare with, by name: rlkern's restatement, or the installed verl's own functions in the same form."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern.cli import baselines, first_three, framework, losses, rollout

Formula = Callable[..., Any]
Formulas = dict[str, Formula]


def group_ids(labels: Sequence[Hashable]) -> Tensor:
    """What a vectorised estimator makes of labels: numbers if they are numbers, else their rank by np.unique."""
    array = np.asarray(labels)
    try:
        return torch.from_numpy(array.astype(np.int64))
    except (TypeError, ValueError):
        return torch.from_numpy(np.unique(array, return_inverse=True)[1])


def plain() -> Formulas:
    """The restated formulas."""
    names = (
        "masked_sum masked_mean masked_var masked_whiten masked_normalize gae gae_whitened discounted_returns affine_scan "
        "reinforce_plus_plus group_mean_std rloo opo remax kl_penalty shape_rewards policy_loss value_loss"
    )
    found: Formulas = {name: getattr(framework, name) for name in names.split()}
    for name in ("reinforce_plus_plus_reset", "grpo", "reinforce_plus_plus_baseline"):
        found[name] = getattr(first_three, name)
    for name in ("gpg", "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline"):
        found[name] = getattr(baselines, name)
    found |= {f"loss_{name}": loss for name, loss in losses.LOSSES.items()}
    found |= {"group_ids": group_ids, "rollout_correction": rollout.rollout_correction}
    return found


def verl_version() -> str | None:
    """The installed verl's version, None without one."""
    if importlib.util.find_spec("verl") is None:
        return None
    try:
        return importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _verl_modules() -> tuple[Any, Any, Any, Any, Any]:
    # verl and ray start OpenMP runtimes of their own and warn about it; neither the warning nor their logs say anything here.
    os.environ.setdefault("KMP_WARNINGS", "0")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from verl.trainer.config import AlgoConfig  # type: ignore[import-not-found,unused-ignore]
        from verl.trainer.ppo import core_algos  # type: ignore[import-not-found,unused-ignore]
        from verl.utils import groupwise, torch_functional  # type: ignore[import-not-found,unused-ignore]
        from verl.workers.config import ActorConfig  # type: ignore[import-not-found,unused-ignore]
    return core_algos, torch_functional, groupwise, ActorConfig, AlgoConfig


def verl() -> Formulas:
    """The restated formulas, replaced by the installed verl's own functions wherever it has one.

    verl refuses bool masks in its scans (`1 - mask`); its functions get every bool mask as int64.
    """
    core, masked, groupwise, ActorConfig, AlgoConfig = _verl_modules()
    number = framework.arithmetic
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)

    def reinforce_plus_plus(r: Tensor, m: Tensor, gamma: float) -> Any:
        return core.compute_reinforce_plus_plus_outcome_advantage(r, number(m), config=AlgoConfig(gamma=gamma))

    def by_prompt(name: str) -> Formula:
        function = getattr(core, f"compute_{name}_outcome_advantage")
        return lambda r, m, index, **options: function(r, number(m), np.asarray(index, object), **options)[0]

    grpo = by_prompt("grpo")

    def group_mean_std(scores: Tensor, index: Sequence[Hashable], eps: float = 1e-6) -> Any:
        ids = groupwise.as_torch_index(np.asarray(index, object), device="cpu")
        mean, std, _ = groupwise.group_mean_std(scores, ids, eps=eps, device="cpu")
        first = ids[[rows[0] for rows in framework.rows_by_label(index).values()]]
        return mean[first], std[first]

    def policy_loss(old: Tensor, new: Tensor, advantages: Tensor, m: Tensor, mode: str = "token-mean") -> Any:
        return core.compute_policy_loss_vanilla(old, new, advantages, m, mode, actor)

    def value_loss(vpreds: Tensor, returns: Tensor, values: Tensor, m: Tensor) -> Any:
        return core.compute_value_loss(vpreds, returns, values, m, 0.5)

    def rollout_correction(old: Tensor, sampled: Tensor, m: Tensor) -> Any:
        from verl.trainer.ppo import rollout_corr_helper as helper  # type: ignore[import-not-found,unused-ignore]

        proto, modified, metrics = helper.compute_rollout_correction_and_rejection_mask(old, sampled, m, **rollout.CONFIG)
        return proto.batch["rollout_is_weights"], modified, metrics

    def loss_variant(name: str) -> Formula:
        of = {"loss_mode": name, **{k: v for k, v in losses.OPTIONS[name].items() if k in ("clip_cov_ratio", "clip_cov_lb", "dro_beta")}}
        config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=of_config(**of))
        function = core.get_policy_loss_fn(name)
        mode = "seq-mean-token-mean" if name == "sapo" else "token-mean"
        return lambda old, new, a, m, _: function(old, new, a, m, mode, config)[0]

    found = plain()
    of_config: Any = importlib.import_module("verl.workers.config").PolicyLossConfig
    found |= {f"loss_{name}": loss_variant(name) for name in losses.LOSSES if name in core.POLICY_LOSS_REGISTRY}
    found["gpg"] = by_prompt("gpg")
    for name in ("masked_sum", "masked_mean", "masked_var", "masked_whiten"):
        found[name] = getattr(masked, name)
    for name in ("rloo", "opo", "reinforce_plus_plus_baseline"):
        found[name] = by_prompt(name)
    found["grpo"] = lambda r, m, index, norm_by_std=True: grpo(r, m, index, norm_adv_by_std_in_grpo=norm_by_std)
    found["remax"] = lambda r, b, m: core.compute_remax_outcome_advantage(r, b, number(m))
    found["gae_whitened"] = lambda r, v, m, gamma, lam: core.compute_gae_advantage_return(r, v, number(m), gamma, lam)
    found["group_ids"] = lambda labels: groupwise.as_torch_index(labels, device="cpu")
    found["rloo_vectorized"] = by_prompt("rloo_vectorized")
    found["grpo_vectorized"] = by_prompt("grpo_vectorized")
    found["kl_penalty"] = core.kl_penalty
    found |= {"reinforce_plus_plus": reinforce_plus_plus, "group_mean_std": group_mean_std}
    if importlib.util.find_spec("verl.trainer.ppo.rollout_corr_helper") is not None:
        found["rollout_correction"] = rollout_correction
    return found | {"policy_loss": policy_loss, "value_loss": value_loss}
