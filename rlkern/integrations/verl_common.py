# SPDX-License-Identifier: Apache-2.0
"""What verl's drop-ins share: where its functions are, its counts and metrics as ours, what its configs hold, small batches that tell
its versions apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkern import Metrics
from rlkern.integrations.site import Call, Uncovered
from rlkern.metrics import POLICY_SUMS

CORE, MATH, GROUPS = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional", "verl.utils.groupwise"
CORRECTION, DEBUG = "verl.trainer.ppo.rollout_corr_helper", "verl.utils.debug.metrics"
ALL = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
_SUM_OF = dict(zip(ALL, ("clipped", "neg_log_ratio", "clipped_lower"), strict=True))


def core() -> Any:
    """verl's module of that name, which is imported where one of its functions is called."""
    return sys.modules[CORE]


# ---- a loss's counts and metrics --------------------------------------------------------------------------------------
def counts_of(mode: str, by_rows: bool, counts: dict[str, Any], width: int) -> tuple[Any, dict[str, Any]]:
    """Mode and counts as rlkern takes them. verl 0.7.0 divides seq-mean-token-sum-norm by the factor alone: `by_rows` False."""
    known = {k: counts.get(k) for k in ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")}
    if counts.keys() - known.keys():
        raise Uncovered(f"it is given {', '.join(sorted(counts.keys() - known.keys()))}")
    if mode == "token-sum" and not hasattr(core(), "compute_policy_loss_dro"):  # verl 0.9 has both
        raise Uncovered("this version does not have the mode")
    known["dp_size"] = 1 if known["dp_size"] is None else known["dp_size"]
    if mode == "seq-mean-token-sum-norm" and not by_rows:
        factor = known["loss_scale_factor"]
        return "seq-mean-token-sum", {"dp_size": 1, "global_batch_size": width if factor is None else factor}
    return mode, known


def read_metrics(sums: list[float], names: tuple[str, ...] = ALL) -> dict[str, float]:
    """verl's names, of sums that are on the host. A call with no valid token has 0, as verl's masked_mean."""
    n = max(sums[0], 1.0)
    return {name: sums[POLICY_SUMS.index(_SUM_OF[name])] / n for name in names}


def policy_metrics(metrics: Metrics, names: tuple[str, ...] = ALL) -> dict[str, float]:
    """verl's numbers of a loss, by one transfer."""
    return read_metrics(metrics.sums.tolist(), names) if names else {}


# ---- what tells the versions apart -----------------------------------------------------------------------------------
class Config:
    """What the probed functions read of verl's configs."""

    clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, gamma, lam = 0.2, 0.2, 0.3, 3.0, 0.9, 0.8
    tau_pos, tau_neg, clip_cov_ratio, clip_cov_lb, clip_cov_ub = 1.0, 1.1, 1.0, 0.1, 9.0  # clip-cov: every candidate, no dice
    kl_cov_ratio, ppo_kl_coef, dro_beta = 0.3, 0.2, 0.5

    def __init__(self, **more: Any) -> None:
        self.global_batch_info: dict[str, Any] = {}
        self.policy_loss = self
        self.__dict__.update(more)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def actor(**more: Any) -> Any:
    """The same as one of verl's ActorConfig, which some of its losses insist on."""
    made = object.__new__(core().ActorConfig)  # what its __init__ asks for differs by version
    own = {name: x for name, x in vars(Config).items() if isinstance(x, float)}
    made.__dict__.update(own | {"global_batch_info": {}, "policy_loss": Config(**more)})
    return made


def batch() -> tuple[Tensor, ...]:
    """Six rows with holes, an empty one, and one that is whole: rewards, values, another of them, mask."""
    g = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 6, 9, generator=g).unbind(0)
    mask = (torch.rand(6, 9, generator=g) < 0.7).long()
    mask[0], mask[1] = 1, 0
    return x, y, z, mask


def of_values(*more: dict[str, Any]) -> Callable[[Any], list[Call]]:
    return lambda original: [((batch()[0], batch()[3]), kwargs) for kwargs in more]


def of_estimator(original: Any) -> list[Call]:
    rewards, _, _, mask = batch()
    index = np.array(["a", "b", "a", "c", "b", "a"], dtype=object)
    given = {"response_mask": mask, "index": index}
    return [((), given | {"token_level_rewards": r}) for r in (rewards, rewards * 1e-4)]  # a floor under the deviation shows


def of_returns(original: Any) -> list[Call]:
    rewards, baselines, _, mask = batch()
    given = {"token_level_rewards": rewards, "response_mask": mask, "config": Config()}
    return [((), given | ({"reward_baselines": baselines[:, 0]} if "remax" in original.__name__ else {}))]


def of_loss(original: Any) -> list[Call]:
    x, y, z, mask = batch()
    return [((x, y, z, mask, mode, Config()), {}) for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")]


def of_variant(mode: str = "token-mean", **more: Any) -> Callable[[Any], list[Call]]:
    """Calls of a variant of the policy loss, without and with weights; `mode`: its own, by default."""

    def calls(original: Any) -> list[Call]:
        x, y, z, mask = batch()
        x, y = -x.abs(), -y.abs()
        modes = dict.fromkeys((mode, "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"))
        found: list[Call] = [((x, y, z, mask, m), {"config": actor(**more)}) for m in modes]
        return [*found, ((x, y, z, mask), {"config": actor(**more), "rollout_is_weights": z.exp()})]

    return calls
