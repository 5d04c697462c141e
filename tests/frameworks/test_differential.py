# SPDX-License-Identifier: Apache-2.0
"""Two thousand random calls of every patched function against the framework's own, in float64 by the one error budget; and the
same with faults put into ours, which must show."""

import copy
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkern
from rlkern import advantages, integrations
from rlkern.integrations import hooks, verl_losses
from rlkern.integrations.site import Worst, in_shadow

pytest.importorskip("verl")
sys.path.insert(0, str(Path(__file__).parent))
from verl_cases import VERL, Draw, log_probs

CASES = int(os.environ.get("RLKERN_TEST_CASES", "2000"))


def agree(site, args):
    """The same refusal, or inside the budget."""
    try:
        site.original(*args)
    except Exception as refusal:
        with pytest.raises(type(refusal)):
            site.replacement(*args)
        return
    site.worst = Worst()
    same_keys(site, args)
    try:
        with in_shadow() if site.target.startswith("verl") else nullcontext():  # what verl's function calls is verl's own
            site.judge(args, {})
    except integrations.site.Uncovered:
        return
    except (ValueError, TypeError):  # ours refuses; the call stays with the framework
        site.replacement(*args)
        return
    assert site.worst.share <= 1, f"{site.target}: {site.worst.line()}"


def same_keys(site, args):
    """Dicts in verl's order, of Python numbers."""
    dice = torch.get_rng_state()
    with in_shadow():
        own = site.original(*args)
    after = torch.get_rng_state()
    torch.set_rng_state(dice)
    ours = site.replacement(*args)
    assert torch.equal(torch.get_rng_state(), after), "the dice are elsewhere"
    for a, b in zip(*([x, *(x if isinstance(x, tuple) else ())] for x in (own, ours)), strict=True):
        if isinstance(a, dict):
            assert {k: type(v) for k, v in a.items()} == {k: type(v) for k, v in b.items()}


def site_of(framework, name):
    integrations.patch(framework)
    return next(s for s in hooks.sites()[framework] if s.name == name)


@pytest.mark.parametrize("name", VERL)
def test_differential_verl(name):
    import verl.trainer.ppo.core_algos
    import verl.trainer.ppo.rollout_corr_helper
    import verl.utils.debug.metrics  # noqa: F401

    site = site_of("verl", name)
    assert site.replacement is not None, site.why_left

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**40))
    def check(seed):
        agree(site, VERL[name](Draw(seed)))

    check()


# ---- OpenRLHF -------------------------------------------------------------------------------------------------------------
def openrlhf_cases(openrlhf):
    loss = openrlhf.models.loss
    scan = "RemoteExperienceMaker.get_"

    def single(d):  # log-probs come in float32
        d.dtype = torch.float32
        return d

    def policy(d):
        level, gating = d.choice(["off", "off", "token", "seq"]), d.choice(["ratio", "ratio", "tv"])
        made = loss.PolicyLoss(
            d.number(0.05, 0.5), d.number(0.05, 0.5), dual_clip=d.choice([None, 3.0]), token_level_loss=d.choice([True, False]),
            policy_loss_type=d.choice(["ppo", "ppo", "gspo"]), is_correction_level=level, is_correction_gating=gating,
            is_correction_mode=d.choice(["clip", "mask"]) if (level, gating) == ("token", "ratio") else "mask",
            is_correction_threshold=(d.number(0.3, 0.9), d.number(1.1, 3.0)) if gating == "ratio" else (0.0, d.number(0.001, 0.5)),
        )  # fmt: skip
        old, new = log_probs(d)
        rollout = old + d.tensor(d.choice([1e-3, 0.1, 0.3])).clamp(-20, 20)
        if made.policy_loss_type == "gspo":  # its ratio is not clamped, and overflows sooner in float32
            new = old + (new - old).clamp(-20, 20)
        return (
            made,
            new,
            old,
            d.tensor(),
            d.mask((torch.int64, torch.bool)),
            rollout,
            *d.choice([(), (2, torch.tensor(77.0), torch.tensor(9.0))]),
        )

    def value(d):
        made = loss.ValueLoss(d.choice([None, 0.5, 0.1]), d.choice([True, False]))
        return made, d.tensor(), d.tensor(), d.tensor(), d.mask((torch.int64, torch.bool))

    def mean(d):  # of a row without a token the mean is NaN in both, its gradient NaN in OpenRLHF alone
        return d.tensor(), d.mask(empty_rows=False), d.choice([None, -1])

    def aggregate(d):
        return d.tensor(), d.mask((torch.int64,)), d.choice([True, False]), *d.choice([(), (2, torch.tensor(77.0), torch.tensor(9.0))])

    def kl(d):
        old, new = log_probs(d)
        behind = d.choice([None, (new + d.tensor(d.choice([0.1, 1.0]))).to(new.dtype)])
        return new, old, behind, d.choice(["k1", "k2", "k3", "k3"]), d.choice([False, True])

    cases = {
        "masked_mean": mean, "aggregate_loss": aggregate, "compute_approx_kl": kl, "PolicyLoss.forward": policy, "ValueLoss.forward": value,
        f"{scan}advantages_and_returns": lambda d: (None, d.tensor(), d.tensor(), d.mask((torch.int64,)), d.number(0.5, 1), d.number(0, 1)),
        f"{scan}cumulative_returns": lambda d: (None, d.tensor(), d.mask((torch.int64,)), d.number(0.5, 1)),
    }  # fmt: skip
    return {name: (lambda d, case=case: case(single(d))) for name, case in cases.items()}


OPENRLHF = (
    "masked_mean", "aggregate_loss", "compute_approx_kl", "PolicyLoss.forward", "ValueLoss.forward",
    "RemoteExperienceMaker.get_advantages_and_returns", "RemoteExperienceMaker.get_cumulative_returns",
)  # fmt: skip


@pytest.mark.parametrize("name", OPENRLHF)
def test_differential_openrlhf(openrlhf, name):
    site, case = site_of("openrlhf", name), openrlhf_cases(openrlhf)[name]
    assert site.replacement is not None, site.why_left

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**40))
    def check(seed):
        agree(site, case(Draw(seed)))

    check()


# ---- faults -----------------------------------------------------------------------------------------------------------------
def _dropped(function):
    """The last token of each row is not seen."""

    def faulty(*args, **kwargs):
        found = []
        for x in args:
            if isinstance(x, torch.Tensor) and x.dim() == 2 and not x.is_floating_point():
                x = x.clone()
                x[:, -1] = 0
            found.append(x)
        return function(*found, **kwargs)

    return faulty


def _reset(rewards, mask, config):
    return tuple(advantages.reinforce_plus_plus(rewards, mask, config.gamma, masked="reset"))


def _small_eps(rewards, mask, index, epsilon=1e-6, scale=True):
    """eps under the root, not beside it."""
    s = rewards.sum(-1)
    group = rlkern.group_normalize(s, index, eps=0.0, scale_by_std=False)
    std = rlkern.group_mean_std(s, index, eps=1e-6).std[rlkern.group_index(index).ids]
    out = (group / std if scale else group)[:, None] * mask
    return out, out


def _population(values, mask, shift_mean=True):
    return rlkern.masked_whiten(values, mask, shift_mean=shift_mean, unbiased=False)


def _swapped(*args):
    low, high = args[5].tau_pos, args[5].tau_neg
    args[5].__dict__.update(tau_pos=high, tau_neg=low)
    try:
        return verl_losses._loss(verl_losses.FORMS["sapo"], True)(*args)
    finally:
        args[5].__dict__.update(tau_pos=low, tau_neg=high)


def _unrejected(own):
    def faulty(old, new, advantages, mask, mode, config):
        again = copy.deepcopy(config)
        again.policy_loss.rollout_correction.__dict__["rollout_rs"] = None
        return own(old, new, advantages, mask, mode, again)[0], own(old, new, advantages, mask, mode, config)[1]

    return faulty


FAULTS = {
    "a token dropped from a sum": ("masked_sum", lambda own: _dropped(own)),
    "a token dropped from a mean": ("masked_mean", lambda own: _dropped(own)),
    "a token dropped from a loss": ("compute_policy_loss_vanilla", lambda own: _dropped(own)),
    "a token dropped from a value loss": ("compute_value_loss", lambda own: _dropped(own)),
    "a token dropped from GAE": ("compute_gae_advantage_return", lambda own: _dropped(own)),
    "a token dropped from OPO's lengths": ("compute_opo_outcome_advantage", lambda own: _dropped(own)),
    "a token dropped from an aggregation": ("agg_loss", lambda own: _dropped(own)),
    "a reset for a skip": ("compute_reinforce_plus_plus_outcome_advantage", lambda own: _reset),
    "eps in another place": ("compute_grpo_outcome_advantage", lambda own: _small_eps),
    "population for Bessel": ("masked_whiten", lambda own: _population),
    "Bessel for population": ("masked_var", lambda own: lambda v, m, unbiased=True: own(v, m, not unbiased)),
    "a clamp left out": ("kl_penalty", lambda own: lambda a, b, k: rlkern.kl_penalty(a, b, k, value_range=None)),
    "raw for zero": ("compute_rloo_vectorized_outcome_advantage", lambda own: lambda r, m, i: tuple(advantages.rloo(r, m, i))),
    "lambda a little off": ("compute_gae_advantage_return", lambda own: lambda r, v, m, g, lam: own(r, v, m, g, lam * (1 - 1e-4))),
    "the last clip kept": ("compute_policy_loss_vanilla", lambda own: lambda *a: (own(*a)[0] * (1 + 1e-5), own(*a)[1])),
    "a token dropped from GSPO": ("compute_policy_loss_gspo", lambda own: _dropped(own)),
    "a token dropped from KL-cov": ("compute_policy_loss_kl_cov", lambda own: _dropped(own)),
    "a token dropped from a token baseline": ("compute_optimal_token_baseline_advantage", lambda own: _dropped(own)),
    "a tail that is kept": ("compute_multi_turn_optimal_token_baseline_advantage", lambda own: lambda *a: own(*a[:6], not a[6])),
    "SAPO's temperatures swapped": ("compute_policy_loss_sapo", lambda own: _swapped),
    "the dice thrown otherwise": ("compute_policy_loss_clip_cov", lambda own: lambda *a: (torch.randperm(3), own(*a))[1]),
    "raw for truncated": ("compute_rollout_correction_weights", lambda own: lambda q, m, level, u, n: own(q, m, level, 1e9, n)),
    "a token dropped from a KL": ("compute_offpolicy_metrics", lambda own: _dropped(own)),
    "rejection left out": ("compute_policy_loss_bypass_mode", lambda own: _unrejected(own)),
    "a weight left out": ("compute_gdpo_outcome_advantage", lambda own: lambda *a: own(*a[:5])),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_differential_catches(fault):
    import verl.trainer.ppo.core_algos
    import verl.trainer.ppo.rollout_corr_helper  # noqa: F401

    name, make = FAULTS[fault]
    site = site_of("verl", name)
    own, site.chosen = site.chosen, None
    site.chosen = make(own)
    try:
        for seed in range(400):
            try:
                agree(site, VERL[name](Draw(seed)))
            except AssertionError:
                return
        pytest.fail("400 cases did not show it")
    finally:
        site.chosen = own
