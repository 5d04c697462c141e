# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF's functions and ours, 0.11.

RAY_RUNTIME_ENV_HOOK=rlkern.integrations.ray_runtime_env_hook python3 -m openrlhf.cli.train_ppo_ray ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import rlkern
from rlkern.integrations import hooks
from rlkern.integrations.site import Call, Site, Uncovered

_UTILS, _LOSS, _MAKER = "openrlhf.models.utils", "openrlhf.models.loss", "openrlhf.trainer.ppo_utils.experience_maker"
LEFT = {
    f"{_UTILS}.compute_reward": "it writes the KL at masked positions too",
    f"{_UTILS}.masked_normalize, compute_entropy, log_probs_from_logits": "no kernel yet, or not called in training",
    f"{_UTILS}.compute_approx_kl (k1 without unbiased_gradient)": "a subtraction and a clamp: torch's own is as fast",
    f"{_LOSS}.PolicyLoss.forward (0.11.0's importance-sampling correction)": "its options have other names; such calls stay its own",
    f"{_MAKER}: rloo, group_norm, dr_grpo, reinforce_baseline, flash_reinforce": "their group statistics are a few numbers a prompt",
}
_WHITENED = {"gae": "", "reinforce": "", "reinforce_baseline": "dr_grpo"}  # the same shaping of rewards, without whitening behind it


# ---- models -----------------------------------------------------------------------------------------------------------
def _plain(*tensors: Tensor) -> None:
    if any(x.dtype not in (torch.float32, torch.float64) for x in tensors):
        raise Uncovered("half precision: OpenRLHF rounds each step to it")


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Of no valid token: NaN, as OpenRLHF's."""
    if mask is None or mask.shape != tensor.shape:
        raise Uncovered("no mask of the tensor's shape")
    _plain(tensor)
    return rlkern.masked_sum(tensor, mask, dim) / mask.sum(dim=dim)


def _approx_kl(log_probs: Tensor, log_probs_base: Tensor, old: Tensor | None, kl_estimator: str, unbiased_gradient: bool) -> Tensor:
    if kl_estimator not in ("k1", "k2", "k3"):
        raise Uncovered("an estimator that OpenRLHF does not have")
    if kl_estimator == "k1" and not unbiased_gradient:
        raise Uncovered("one subtraction and a clamp: torch's own is as fast")
    weights: dict[str, Any] = {}
    if unbiased_gradient and old is not None:
        weights = {"old_log_prob": old.detach().float(), "weight_max": 10.0}
    name: Any = f"{kl_estimator}+" if unbiased_gradient else kl_estimator
    ranges: dict[str, Any] = {"log_ratio_range": (float("-inf"), 10.0) if kl_estimator == "k3" else None, "value_range": (-10.0, 10.0)}
    return rlkern.kl_penalty(log_probs.float(), log_probs_base.float(), name, **ranges, **weights)


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, log_probs_old: Tensor | None = None, kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:  # fmt: skip
    return _approx_kl(log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient)


def compute_approx_kl_before_0_11_2(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    return _approx_kl(log_probs, log_probs_base, None, kl_estimator, False)


def _exact_kl(
    log_probs: Tensor, log_probs_base: Tensor, log_probs_old: Any = None, kl_estimator: str = "k1", unbiased_gradient: bool = False
) -> Tensor:
    """The formula in the dtype of its arguments: OpenRLHF's own is float32's."""
    kind, old = (log_probs_old, None) if isinstance(log_probs_old, str) else (kl_estimator, log_probs_old)
    d = log_probs_base - log_probs
    near = d.clamp(max=10)
    value = (-d if kind == "k1" else 0.5 * d * d if kind == "k2" else torch.expm1(near) - near).clamp(-10, 10)
    if not unbiased_gradient:
        return value
    w = 1.0 if old is None else (log_probs - old).exp().clamp(max=10).detach()
    slope = w * 0.5 * d * d
    return value.detach() + (slope - slope.detach())


def aggregate_loss(
    loss: Tensor, loss_mask: Tensor, token_level_loss: bool = True, dp_size: Any = 1, batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:  # fmt: skip
    _plain(loss)
    if loss_mask is None or loss_mask.shape != loss.shape:
        raise Uncovered("no mask of the loss's shape")
    if token_level_loss:
        total = rlkern.masked_sum(loss, loss_mask)
        return total / loss_mask.sum() if batch_num_tokens is None else total / batch_num_tokens * dp_size
    counts = loss_mask.sum(dim=-1)
    total = (rlkern.masked_sum(loss, loss_mask, -1) / (counts + 1e-8)).sum()
    return total / (counts > 0).float().sum() if global_batch_size is None else total / global_batch_size * dp_size


def _weights(self: Any, old: Tensor, rollout: Tensor | None, mask: Tensor) -> tuple[Tensor | None, ...]:
    """(coefficients, vllm_kl, is_filter_ratio) of the importance-sampling correction, None where it is off."""
    level = getattr(self, "is_correction_level", "off")
    if level == "off" or self.policy_loss_type == "gspo":
        return None, None, None
    if rollout is None:
        raise Uncovered("a correction without the rollout's log-probs")
    low, high = self.is_correction_threshold
    found = rlkern.importance_weights(
        old.detach(), rollout.detach(), mask, level="sequence" if level == "seq" else "token", mode=self.is_correction_mode,
        gating=self.is_correction_gating, low=float(low), high=float(high),
    )  # fmt: skip
    return found.weights, found.kl, found.filtered


def _policy_loss(results: int) -> Callable[..., Any]:
    """0.11.0 gives four results, 0.11.2 five."""

    def forward(
        self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None, dp_size: Any = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        if action_mask is None or self.policy_loss_type not in ("ppo", "gspo") or getattr(self, "enable_vllm_is_correction", False):
            raise Uncovered("no mask, a loss of another name, or the correction of 0.11.0")
        _plain(log_probs, old_log_probs, advantages, *([] if rollout_log_probs is None else [rollout_log_probs]))
        weights, vllm_kl, filtered = _weights(self, old_log_probs, rollout_log_probs, action_mask)
        base: Any = old_log_probs
        variant: dict[str, Any] = {}
        if self.policy_loss_type == "gspo":
            variant = {"variant": "gspo", "sequence_grad": "row", "log_ratio_clamp": None}
            base = old_log_probs if getattr(self, "is_correction_level", "off") == "off" else rollout_log_probs
        found = rlkern.policy_loss(
            base, log_probs, advantages, action_mask, cliprange_low=self.clip_eps_low, cliprange_high=self.clip_eps_high,
            clip_ratio_c=self.dual_clip, rollout_is_weights=weights, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size, loss_agg_mode="token-mean" if self.token_level_loss else "seq-mean-token-mean", **variant,
        )  # fmt: skip
        sums = found.metrics.sums
        drift = rlkern.masked_sum(old_log_probs.detach() - log_probs.detach(), action_mask)  # not clamped, unlike the loss
        clipped, kl = (sums[2] / sums[0]).to(torch.float32), (drift / sums[0]).to(drift.dtype)
        return (found.loss, clipped, kl, vllm_kl, filtered)[:results]

    return forward


def value_loss(
    self: Any, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None, dp_size: Any = 1,
    batch_num_tokens: Any = None, global_batch_size: Any = None,
) -> Tensor:  # fmt: skip
    if action_mask is None:
        raise Uncovered("no mask")
    _plain(values, old_values, returns)
    return rlkern.value_loss(
        values, returns, old_values, action_mask, cliprange_value=self.clip_eps, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size, loss_agg_mode="token-mean" if self.token_level_loss else "seq-mean-token-mean",
    ).loss  # fmt: skip


# ---- experience maker ---------------------------------------------------------------------------------------------------
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    if action_mask is None:
        raise Uncovered("no mask")
    found = rlkern.gae(rewards.detach(), values.detach(), action_mask, gamma=float(gamma), lam=float(lambd), masked="zero")
    return found.advantages, found.returns


def _gae_scale(self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    terms = rlkern.affine_scan(torch.full_like(values, gamma * lambd), rewards.abs() + 2 * values.abs()) + values.abs()
    return terms, terms


def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
    if action_mask is None:
        raise Uncovered("no mask")
    return rlkern.discounted_returns(rewards.detach(), action_mask, gamma=float(gamma), masked="zero")


class _Renamed:
    """OpenRLHF's arguments while its own method runs, with another name for the estimator: one without whitening."""

    def __init__(self, advantage: Any, name: str) -> None:
        self.advantage, self.name, self.given = advantage, name, advantage.estimator

    def __enter__(self) -> None:
        self.advantage.estimator = self.name

    def __exit__(self, *error: object) -> None:
        self.advantage.estimator = self.given


def _whitened(site: list[Site]) -> Callable[..., Any]:
    def compute_advantages_and_returns(self: Any, experiences: list[Any]) -> list[Any]:
        """OpenRLHF's own method without its last step, the whitening over all experiences, which is ours."""
        args = self.strategy.args
        renamed = _WHITENED.get(args.algo.advantage.estimator)
        masks = [e.action_mask for e in experiences]
        if renamed is None or any(m is None or not m.is_cpu for m in masks) or not any(m.any() for m in masks):
            raise Uncovered("an estimator without whitening, no mask, or no valid token")
        with _Renamed(args.algo.advantage, renamed):
            experiences = site[0].of_framework(self, experiences)
        moments = rlkern.merge_moments([rlkern.masked_moments(e.advantages.float(), e.action_mask) for e in experiences])
        for e in experiences:
            e.advantages = rlkern.whiten_apply(
                e.advantages, moments, unbiased=False, eps_mode="floor", scale_by_std=not args.algo.advantage.no_std_norm
            )
        return experiences

    return compute_advantages_and_returns


# ---- probes -------------------------------------------------------------------------------------------------------------
def _batch() -> tuple[Tensor, ...]:
    """Five rows with holes; each has a valid token."""
    g = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 5, 9, generator=g).unbind(0)
    mask = (torch.rand(5, 9, generator=g) < 0.7).long()
    mask[0], mask[:, 4] = 1, 1
    return x, y, z, mask


_COUNTS = {"dp_size": 2, "batch_num_tokens": 99, "global_batch_size": 7}


def _of_value(original: Any) -> list[Call]:
    x, y, z, mask = _batch()
    made = [
        inspect.unwrap(original).__globals__["ValueLoss"](**o) for o in ({"clip_eps": 0.5}, {"clip_eps": None, "token_level_loss": False})
    ]
    return [((m, x, y, z, mask), more) for m in made for more in ({}, _COUNTS)]


def _of_policy(original: Any) -> list[Call]:
    """Both losses, and each correction where the class has one: 0.11.0 has another, which stays its own."""
    x, y, z, mask = _batch()
    make = inspect.unwrap(original).__globals__["PolicyLoss"]
    options: list[dict[str, Any]] = [
        {}, {"dual_clip": 3.0, "token_level_loss": False, "clip_eps_high": 0.3}, {"policy_loss_type": "gspo"},
    ]  # fmt: skip
    if "is_correction_gating" in inspect.signature(make).parameters:
        options += [{"is_correction_level": "token", "is_correction_mode": "clip"}, {"is_correction_level": "token"}]
        options += [{"is_correction_level": "seq"}, {"is_correction_level": "seq", "policy_loss_type": "gspo"}]
        for level, gating in (("token", "tv"), ("seq", "tv"), ("token", "binary_kl"), ("seq", "binary_kl")):
            options += [{"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": (0.0, 0.1)}]
    x, y = -x.abs(), -y.abs()
    return [((make(**o), x, y, z, mask, 0.8 * x + 0.2 * y), more) for o in options for more in ({}, _COUNTS)]


def _of_kl(original: Any) -> list[Call]:
    x, y, z, _ = _batch()
    calls: list[Call] = [((9 * x, y), {"kl_estimator": kind}) for kind in ("k2", "k3")]
    if "unbiased_gradient" in inspect.signature(original).parameters:
        calls += [((9 * x, y, old, kind, True), {}) for kind in ("k1", "k2", "k3") for old in (None, z)]
        calls += [((9 * x, y, z, "k3"), {})]
    return calls


def _of_maker(original: Any) -> list[Call]:
    """Two experiences of two samples each, with what the method reads of its arguments."""
    x, y, _, mask = _batch()
    calls: list[Call] = []
    for estimator, plain in (("gae", False), ("reinforce", True), ("reinforce_baseline", False)):
        advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.9, no_std_norm=plain)
        args = SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage), rollout=SimpleNamespace(n_samples_per_prompt=2),
            reward=SimpleNamespace(clip_range=(-10, 10)),
        )  # fmt: skip
        maker = SimpleNamespace(strategy=SimpleNamespace(args=args), kl_ctl=SimpleNamespace(value=0.1), advantage_estimator=estimator)
        for method in ("get_advantages_and_returns", "get_cumulative_returns"):
            setattr(maker, method, getattr(inspect.unwrap(original).__globals__["RemoteExperienceMaker"], method).__get__(maker))
        made = inspect.unwrap(original).__globals__["Experience"]
        experiences = [
            made(index=list(i), rewards=x[i, 0], values=y[i, :], kl=x[i, :], action_mask=mask[i, :]) for i in ((2, 0), (1, 3))
        ]  # fmt: skip
        calls.append(((maker, experiences), {}))
    return calls


def sites() -> Iterable[Site]:
    """Every function that has a counterpart."""
    x, y, _, mask = _batch()
    means: list[Call] = [((x, mask), {}), ((x, mask, -1), {}), ((x, mask), {"dim": 0})]
    yield Site(_UTILS, "masked_mean", [masked_mean], lambda _: means, "_masked_sum_fwd", ("tensor",), terms=("tensor", 1.0))
    kls: list[Callable[..., Any]] = [compute_approx_kl, compute_approx_kl_before_0_11_2]
    yield Site(_UTILS, "compute_approx_kl", kls, _of_kl, "_kl_penalty_fwd", ("log_probs",), _exact_kl)
    ways: list[Call] = [
        ((x, mask, level), more) for level in (True, False) for more in ({}, {"batch_num_tokens": 9, "global_batch_size": 3})
    ]
    yield Site(_LOSS, "aggregate_loss", [aggregate_loss], lambda _: ways, "_masked_sum_fwd", ("loss",), terms=("loss", 1.0))
    yield Site(
        _LOSS,
        "PolicyLoss.forward",
        [_policy_loss(5), _policy_loss(4)],
        _of_policy,
        "_policy_loss_fwd",
        ("log_probs",),
        terms=("advantages", -1.0),
    )
    yield Site(_LOSS, "ValueLoss.forward", [value_loss], _of_value, "_value_loss_fwd", ("values",))
    scan: list[Call] = [((None, x, y, mask, 0.9, 0.8), {})]
    yield Site(
        _MAKER,
        "RemoteExperienceMaker.get_advantages_and_returns",
        [get_advantages_and_returns],
        lambda _: scan,
        "_gae_fwd",
        scale=_gae_scale,
    )
    returns: list[Call] = [((None, x, mask, 0.9), {})]
    name = "RemoteExperienceMaker.get_cumulative_returns"
    yield Site(_MAKER, name, [get_cumulative_returns], lambda _: returns, "_discounted_returns_fwd")
    own: list[Site] = []
    own.append(Site(_MAKER, "RemoteExperienceMaker.compute_advantages_and_returns", [_whitened(own)], _of_maker, "_whiten_apply_fwd"))
    yield own[0]


def patch(mode: str = "on") -> None:
    """`rlkern.integrations.patch("openrlhf", mode)`."""
    hooks.patch("openrlhf", sites, mode)


def unpatch() -> None:
    hooks.unpatch("openrlhf")
