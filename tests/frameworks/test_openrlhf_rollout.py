# SPDX-License-Identifier: Apache-2.0
"""A real rollout through OpenRLHF's own experience maker and losses, patched against unpatched."""

from types import SimpleNamespace

import pytest
import torch

import rlkern
from rlkern import integrations
from rlkern.testing import assert_within

pytest.importorskip("openrlhf")
ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")
holes = pytest.mark.parametrize("holes", [False, True], ids=["as prompted", "tool turns"])
EACH = 8


def rollout(holes, dtype):
    """Rows of one prompt side by side, as OpenRLHF has them."""
    x = rlkern.load_batch().to(dtype=dtype, mask_dtype=torch.int64)
    order = torch.tensor(sorted(range(len(x.uid)), key=lambda i: x.uid[i]))
    mask = x.response_mask if holes else (x.response_mask.flip(1).cummax(1).values.flip(1) > 0).long()
    return {name: t[order] for name, t in x.tensors().items()} | {"mask": mask[order]}


def experiences(openrlhf, holes, dtype):
    """Micro-batches of five rows, each as wide as its longest, in no order."""
    x = rollout(holes, dtype)
    made = openrlhf.trainer.ppo_utils.experience_maker.Experience
    order = torch.randperm(len(x["mask"]), generator=torch.Generator().manual_seed(0))
    found = []
    for i in order.split(5):
        width = int((x["mask"][i].sum(0) > 0).nonzero().max()) + 1
        mask = x["mask"][i, :width]
        kl = (x["old_log_prob"] - x["ref_log_prob"])[i, :width] * mask
        found.append(
            made(index=i.tolist(), rewards=x["token_level_rewards"][i].sum(1), values=x["values"][i, :width], kl=kl, action_mask=mask)
        )
    return found


def maker(openrlhf, estimator):
    found = object.__new__(openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker)
    advantage = SimpleNamespace(estimator=estimator, gamma=0.99 if estimator == "gae" else 1.0, lambd=0.95, no_std_norm=False)
    found.strategy = SimpleNamespace(
        args=SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage), rollout=SimpleNamespace(n_samples_per_prompt=EACH),
            reward=SimpleNamespace(clip_range=(-10, 10)),
        )
    )  # fmt: skip
    found.kl_ctl, found.advantage_estimator = SimpleNamespace(value=0.05), estimator
    return found


@holes
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_openrlhf_rollout_advantages(openrlhf, compared, estimator, holes):
    def call(dtype):
        found = maker(openrlhf, estimator).compute_advantages_and_returns(experiences(openrlhf, holes, dtype))
        return [{"advantages": e.advantages, "returns": e.returns} for e in found]

    assert compared("openrlhf", call).check(estimator) == 2 * 240 / 5


BAND = {"is_correction_threshold": (0.0, 0.002)}
POLICIES = [
    {}, {"dual_clip": 3.0}, {"token_level_loss": False}, {"policy_loss_type": "gspo"}, {"is_correction_level": "token"},
    {"is_correction_level": "seq"}, {"clip_eps_low": 0.1, "clip_eps_high": 0.3},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.9, 1.1)},
    {"is_correction_level": "seq", "policy_loss_type": "gspo", "clip_eps_low": 0.01, "clip_eps_high": 0.01},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.05)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.02)},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", **BAND},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", **BAND},
]  # fmt: skip


@holes
@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_openrlhf_rollout_policy_loss(openrlhf, compared, caplog, options, holes):
    for counts in ({}, {"dp_size": 2, "batch_num_tokens": torch.tensor(9000.0), "global_batch_size": torch.tensor(256.0)}):

        def call(dtype, counts=counts):
            x = rollout(holes, dtype)
            log_prob = x["log_prob"].requires_grad_()
            advantages = x["values"] - x["values"].mean()
            found = openrlhf.models.loss.PolicyLoss(**options)(
                log_prob, x["old_log_prob"], advantages, x["mask"], x["rollout_log_prob"], **counts
            )
            found[0].backward()
            return {"results": found, "grad": log_prob.grad}

        of_both = compared("openrlhf", call)
        if options.get("is_correction_gating") == "binary_kl":  # near on-policy OpenRLHF's is noise in float32, and drops by its sign
            of_both.own = {k: v.to(of_both.own[k].dtype) for k, v in of_both.exact.items()}
        assert of_both.check(str(options)) >= 4
    assert not [r for r in caplog.records if "PolicyLoss" in r.message]  # none was left to OpenRLHF


@holes
def test_openrlhf_rollout_values_and_kl(openrlhf, compared, holes):
    loss, utils = openrlhf.models.loss, openrlhf.models.utils

    def values(clip, level):
        def call(dtype):
            x = rollout(holes, dtype)
            new = (x["values"] + 0.7 * x["entropy"]).requires_grad_()
            found = loss.ValueLoss(clip, level)(new, x["values"], x["entropy"], x["mask"])
            found.backward()
            return {"loss": found, "grad": new.grad}

        return call

    def kl(kind, unbiased):
        def call(dtype):
            x = rollout(holes, dtype)
            log_prob = x["log_prob"].requires_grad_()
            found = utils.compute_approx_kl(log_prob, x["ref_log_prob"], x["old_log_prob"], kind, unbiased)
            mean = loss.aggregate_loss(found, x["mask"])
            mean.backward()
            return {"kl": found, "mean": mean, "grad": log_prob.grad}

        return call

    for clip in (0.5, None):
        for level in (True, False):
            compared("openrlhf", values(clip, level)).check(f"value loss {clip} {level}")
    compared("openrlhf", kl("k1", False)).check("k1")
    for kind in ("nonsense", "mse", "k1+"):
        compared("openrlhf", kl(kind, False)).check("an estimator that is none")


@holes
@pytest.mark.parametrize("unbiased", [False, True, "off-policy"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_openrlhf_rollout_kl_against_float64(openrlhf, holes, kind, unbiased):
    """Against the formula in float64: OpenRLHF's own function rounds to float32 whatever it is given."""
    x, wide = rollout(holes, torch.float32), rollout(holes, torch.float64)
    old = unbiased == "off-policy"
    d = wide["ref_log_prob"] - wide["log_prob"]
    near = d.clamp(max=10)
    value, slope = {"k1": (-d, torch.ones_like(d)), "k2": (d * d / 2, -d), "k3": (torch.expm1(near) - near, -torch.expm1(near))}[kind]
    grad = torch.where((value.abs() <= 10) & (d <= 10), slope, 0)
    if unbiased:
        grad = -d * ((wide["log_prob"] - wide["old_log_prob"]).exp().clamp(max=10) if old else 1)
    found = {}
    for mode in ("off", "on"):
        integrations.patch("openrlhf", mode)
        log_prob = x["log_prob"].clone().requires_grad_()
        kl = openrlhf.models.utils.compute_approx_kl(
            log_prob, x["ref_log_prob"], x["old_log_prob"] if old else None, kind, unbiased_gradient=bool(unbiased)
        )
        kl.sum().backward()
        found[mode] = kl.detach(), log_prob.grad
    for ours, own, best in zip(found["on"], found["off"], (value.clamp(-10, 10), grad), strict=True):
        assert_within(ours, own, best, best.abs().max(), kind)


def test_openrlhf_shadow(openrlhf):
    x = rollout(True, torch.float32)
    with integrations.patched("openrlhf", "shadow"):
        for old, kind, unbiased in ((None, "k3", False), (x["old_log_prob"], "k1", True), (None, "k2", True)):
            openrlhf.models.utils.compute_approx_kl(x["log_prob"].requires_grad_(), x["ref_log_prob"], old, kind, unbiased)
        correction = {"is_correction_level": "seq"}
        openrlhf.models.loss.PolicyLoss(**correction)(x["log_prob"], x["old_log_prob"], x["values"], x["mask"], x["rollout_log_prob"])
        openrlhf.models.loss.PolicyLoss()(x["log_prob"], x["old_log_prob"], x["values"], x["mask"])
        maker(openrlhf, "gae").compute_advantages_and_returns(experiences(openrlhf, True, torch.float32))
        text = integrations.summary()
    for name in ("compute_approx_kl", "PolicyLoss.forward", "compute_advantages_and_returns"):
        assert any(name in line and "inside" in line for line in text.splitlines()), text


def test_openrlhf_read_only_experiences(openrlhf):
    """What Ray hands out may lie in memory that nobody may write."""

    def frozen(x):
        array = x.numpy().copy()
        array.flags.writeable = False
        return torch.from_numpy(array)

    def freeze(found):
        for e in found:
            e.values, e.kl, e.action_mask = frozen(e.values), frozen(e.kl), frozen(e.action_mask)

    found = experiences(openrlhf, True, torch.float32)
    with pytest.warns(UserWarning, match="not writable"):
        freeze(found)
    with integrations.patched("openrlhf"):
        maker(openrlhf, "gae").compute_advantages_and_returns(found)
    assert all(e.advantages.isfinite().all() for e in found)


def test_openrlhf_recording(openrlhf, tmp_path):
    with integrations.patched("openrlhf"), integrations.capture(tmp_path / "run", steps=1, framework="openrlhf"):
        found = experiences(openrlhf, True, torch.float32)
        for e in found:
            e.action_log_probs = -e.values.abs()
        maker(openrlhf, "rloo").compute_advantages_and_returns(found)
    batch = rlkern.load_batch(tmp_path / "run" / "step-00000.safetensors")
    assert len(set(batch.uid)) == 240 / EACH
    assert batch.meta["estimator"] == "rloo"
