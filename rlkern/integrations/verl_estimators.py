# SPDX-License-Identifier: Apache-2.0
"""verl's advantage estimators, each by the one of ours that has its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rlkern
from rlkern import advantages
from rlkern.integrations.site import Call, Site, Uncovered
from rlkern.integrations.verl_common import CORE, Config, batch, core, of_estimator, of_returns
from rlkern.testing import whitened_scale

_FLOATS = (torch.float32, torch.float64)


def _exact_grpo(*args: Any, **kwargs: Any) -> Any:
    """verl's loop, which keeps float64 where its vectorized form does not."""
    return core().compute_grpo_outcome_advantage(*args, **kwargs)


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
    return tuple(advantages.rloo_vectorized(token_level_rewards, response_mask, index))


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
    if rewards.dtype not in _FLOATS:
        raise Uncovered("verl gives float64 for half-precision rewards")


# ---- several rewards, pass@k, GPG ---------------------------------------------------------------------------------------
def grpo_passk(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, norm_adv_by_std_in_grpo: bool = True,
    config: Any = None, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    if config is None:
        raise Uncovered("verl asks for a config")
    if not token_level_rewards.is_cpu:  # there a group of one row is not seen by the host
        index = rlkern.group_index(index)
        if index.counts.numel() and int(index.counts.min()) < 2:
            raise Uncovered("a group of one row")
    scale = config.get("norm_adv_by_std_in_grpo", True)
    return tuple(advantages.grpo_passk(token_level_rewards, response_mask, index, epsilon, scale))


def gpg(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, f_norm: float = 1.0, alpha: float = 1.0,
    config: Any = None, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(advantages.gpg(token_level_rewards, response_mask, index, f_norm))


def _components(rewards: Tensor, mask: Tensor, config: Any, non_tensor_batch: Any, batch: Any) -> dict[str, Any]:
    """verl puts each component at the last token of its row, and sums the row."""
    keys = config.get("gdpo_reward_keys", None)
    if not keys or any(key not in non_tensor_batch for key in keys):
        raise Uncovered("a component is missing")
    if rewards.dtype != torch.float32 or mask.is_floating_point():
        raise Uncovered("verl takes components in float32")
    if batch["attention_mask"].shape[1] - batch["prompts"].shape[1] != mask.shape[1]:
        raise Uncovered("responses of another width")
    parts = [np.asarray(non_tensor_batch[key], dtype=np.float32) for key in keys]
    weights = config.get("gdpo_reward_weights", None)
    if any(part.shape != (len(rewards),) for part in parts) or (weights is not None and len(weights) != len(keys)):
        raise Uncovered("components or weights of another number")
    scores = torch.from_numpy(np.stack(parts, 1)).to(rewards.device)
    return {"component_scores": scores, "component_weights": None if weights is None else [float(np.float32(w)) for w in weights]}


def gdpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, norm_adv_by_std_in_grpo: bool = True,
    config: Any = None, non_tensor_batch: Any = None, batch: Any = None, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = (config, non_tensor_batch, batch)
    parts = {} if any(x is None for x in given) else _components(token_level_rewards, response_mask, *given)
    return tuple(advantages.gdpo(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, **parts))


def _summed(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, norm_adv_by_std_in_grpo: bool = True,
    config: Any = None, non_tensor_batch: Any = None, batch: Any = None, **unused: Any,
) -> Tensor:  # fmt: skip
    """What GDPO whitens, in float64, in which verl does not keep components."""
    scores, weights = [token_level_rewards.sum(-1)], [1.0]
    if config is not None and non_tensor_batch is not None and batch is not None:
        keys = config.get("gdpo_reward_keys", None)
        scores = [torch.from_numpy(np.asarray(non_tensor_batch[key], dtype=np.float32)).double() for key in keys]
        weights = config.get("gdpo_reward_weights", None) or [1.0] * len(keys)
    found = torch.zeros_like(token_level_rewards)
    for w, s in zip(weights, scores, strict=True):
        given = (s[:, None], torch.ones_like(s)[:, None], index, epsilon, norm_adv_by_std_in_grpo)
        found = found + float(np.float32(w)) * core().compute_grpo_outcome_advantage(*given)[0]
    return found


def _exact_gdpo(token_level_rewards: Tensor, response_mask: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, ...]:
    summed = _summed(token_level_rewards, response_mask, *rest, **more)
    return (core().verl_F.masked_whiten(summed, response_mask) * response_mask,) * 2


def _gdpo_scale(token_level_rewards: Tensor, response_mask: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, ...]:
    summed = _summed(token_level_rewards, response_mask, *rest, **more)
    return (whitened_scale(summed, summed.abs(), response_mask),) * 2


# ---- optimal token baselines --------------------------------------------------------------------------------------------
def _token_baseline(ours: Callable[..., Any], tail: bool, open_: bool) -> Callable[..., Any]:
    """`tail`: the default of handle_zero_tail; `open_`: does it take arguments that it does not know?"""

    def optimal(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, old_log_probs: Tensor, sum_pi_squared: Tensor,
        rollout_is_weights: Tensor | None = None, handle_zero_tail: bool = tail, epsilon: float = 1e-8, **unused: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if unused and not open_:
            raise Uncovered("arguments that this version does not know")
        others = (old_log_probs, sum_pi_squared, *(() if rollout_is_weights is None else (rollout_is_weights,)))
        if any(x.dtype != token_level_rewards.dtype for x in others) or response_mask.is_floating_point():
            raise Uncovered("tensors of several dtypes")
        tensors = (old_log_probs, sum_pi_squared, rollout_is_weights)
        return tuple(ours(token_level_rewards, response_mask, index, *tensors, handle_zero_tail, epsilon))

    return optimal


def _token_scale(token_level_rewards: Tensor, response_mask: Tensor, **unused: Any) -> tuple[Tensor, Tensor]:
    """The absolute terms of the rewards to go; a baseline is a mean of them."""
    terms = (token_level_rewards.abs() * response_mask).flip(-1).cumsum(-1)
    return 2 * terms, terms


# ---- what tells the versions apart -----------------------------------------------------------------------------------
def _of_pairs(original: Any) -> list[Call]:
    given = {"index": np.array(["a", "b", "a", "c", "b", "c"], dtype=object), "response_mask": batch()[3]}
    return [((), given | {"token_level_rewards": batch()[0], "config": Config(norm_adv_by_std_in_grpo=x)}) for x in (True, False)]


def _of_components(original: Any) -> list[Call]:
    rewards, scores, _, mask = batch()
    own = {"one": scores[:, 0].numpy(), "two": scores[:, 1].tolist()}
    width = {"prompts": mask[:, :2], "attention_mask": torch.cat((mask[:, :2], mask), 1)}
    given = {"token_level_rewards": rewards, "response_mask": mask, "index": np.array(["a", "b", "a", "c", "b", "a"], dtype=object)}
    more = {"config": Config(gdpo_reward_keys=["one", "two"], gdpo_reward_weights=[1.0, 0.5]), "non_tensor_batch": own, "batch": width}
    return [((), given), ((), given | more)]


def _of_tokens(original: Any) -> list[Call]:
    rewards, x, y, mask = batch()
    mask = mask.clone()
    mask[:, 3] = 0  # a tool's turn
    given = {"token_level_rewards": rewards, "response_mask": mask, "index": np.array(["a", "b", "a", "a", "b", "b"], dtype=object)}
    given |= {"old_log_probs": -x.abs(), "sum_pi_squared": y.square()}
    return [((), given), ((), given | {"rollout_is_weights": y.exp(), "handle_zero_tail": False}), ((), given | {"config": Config()})]


# ---- sites ------------------------------------------------------------------------------------------------------------
def sites() -> Iterable[Site]:
    x, y, _, mask = batch()
    yield Site(CORE, "compute_gae_advantage_return", [gae], lambda _: [((x, y, mask, 0.9, 0.8), {})], "_gae_fwd", scale=_gae_scale)
    for name, ours in (
        ("grpo", grpo), ("grpo_vectorized", grpo_vectorized), ("rloo", rloo), ("rloo_vectorized", rloo_vectorized), ("opo", opo),
        ("reinforce_plus_plus_baseline", reinforce_plus_plus_baseline), ("gpg", gpg),
    ):  # fmt: skip
        exact = _exact_grpo if name == "grpo_vectorized" else None
        yield Site(CORE, f"compute_{name}_outcome_advantage", [ours], of_estimator, "_group_advantage_fwd", exact=exact)
    yield Site(CORE, "compute_grpo_passk_outcome_advantage", [grpo_passk], _of_pairs, "_group_advantage_fwd")
    yield Site(CORE, "compute_gdpo_outcome_advantage", [gdpo], _of_components, "_group_advantage_fwd", exact=_exact_gdpo, scale=_gdpo_scale)
    two = [reinforce_plus_plus, reinforce_plus_plus_reset]
    yield Site(CORE, "compute_reinforce_plus_plus_outcome_advantage", two, of_returns, "_discounted_returns_fwd", scale=_returns_scale)
    yield Site(CORE, "compute_remax_outcome_advantage", [remax], of_returns, "_discounted_returns_fwd")
    raw = "_optimal_token_baseline_fwd"
    for name, baseline in (
        ("optimal_token_baseline", advantages.optimal_token_baseline),
        ("multi_turn_optimal_token_baseline", advantages.tir_optimal_token_baseline),
    ):
        forms = [_token_baseline(baseline, tail, open_) for open_ in (True, False) for tail in (True, False)]
        yield Site(CORE, f"compute_{name}_advantage", forms, _of_tokens, raw, scale=_token_scale)
