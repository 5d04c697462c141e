# SPDX-License-Identifier: Apache-2.0
"""A real rollout through verl's own DataProto, compute_advantage and losses, patched against unpatched."""

import numpy as np
import pytest
import torch

import rlkern
from rlkern import integrations

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
from verl import DataProto  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo import ray_trainer  # noqa: E402
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch  # noqa: E402
from verl.utils.debug.metrics import calculate_debug_metrics  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL = ("kl", "abs", "mse", "low_var_kl", "k3+", "nonsense")
holes = pytest.mark.parametrize("holes", [False, True], ids=["as prompted", "tool turns"])


def rollout(holes, dtype=torch.float32):
    """The batch that rlkern carries, sampled from a model trained on the spot; tool turns are holes in its masks."""
    found = rlkern.load_batch().to(dtype=dtype, mask_dtype=torch.int64)
    mask = found.response_mask
    if not holes:
        mask = (mask.flip(1).cummax(1).values.flip(1) > 0).long()
    return found, mask


def proto(holes, dtype):
    x, mask = rollout(holes, dtype)
    tensors = {
        "token_level_rewards": x.token_level_rewards, "token_level_scores": x.token_level_rewards, "response_mask": mask,
        "attention_mask": mask, "prompts": torch.zeros(len(mask), 0, dtype=torch.long), "responses": torch.zeros_like(mask),
        "values": x.values, "old_log_probs": x.old_log_prob, "ref_log_prob": x.ref_log_prob,
        "sum_pi_squared": (2 * x.old_log_prob).exp(), "reward_baselines": x.reward_baselines,
        "rollout_log_probs": x.rollout_log_prob,
    }  # fmt: skip
    rewards = x.token_level_rewards.sum(-1).float().numpy()
    parts = {"correct": rewards.round(), "short": rewards - rewards.round() / 2}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.asarray(x.uid, dtype=object), **parts})


@holes
@pytest.mark.parametrize("estimator", sorted(core_algos.ADV_ESTIMATOR_REGISTRY))
def test_verl_rollout_advantages(compared, estimator, holes):
    def call(dtype):
        data = proto(holes, dtype)
        if estimator in ("grpo_vectorized",):
            data.batch.pop("reward_baselines")  # which it does not take
        config = AlgoConfig(gamma=0.99, lam=0.95, adv_estimator=estimator, gdpo_reward_keys=["correct", "short"])
        found = ray_trainer.compute_advantage(data, estimator, gamma=0.99, lam=0.95, config=config)
        return {key: found.batch[key] for key in ("advantages", "returns")}

    found = compared("verl", call)
    assert found.check(estimator) == 2, found.own


@holes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(core_algos.POLICY_LOSS_REGISTRY))
def test_verl_rollout_losses(compared, name, mode, holes):
    x, mask = rollout(holes)
    for info in ({}, {"dp_size": 2, "batch_num_tokens": 9000, "global_batch_size": 256, "loss_scale_factor": 100}):

        def call(dtype, info=info):
            config = ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8, clip_ratio_high=0.28)
            config.policy_loss.__dict__.update(dro_beta=0.1, clip_cov_lb=0.1, clip_cov_ratio=0.01, kl_cov_ratio=0.01)
            config.global_batch_info.update(info)
            log_prob = x.log_prob.to(dtype, copy=True).requires_grad_()
            advantages = (x.values - x.values.mean()).to(dtype)
            loss, metrics = core_algos.get_policy_loss_fn(name)(
                old_log_prob=x.old_log_prob.to(dtype), log_prob=log_prob, advantages=advantages, response_mask=mask.bool(),
                loss_agg_mode=mode, config=config,
            )  # fmt: skip
            loss = loss * 1
            loss -= 0.01 * core_algos.agg_loss(x.entropy.to(dtype), mask.bool(), mode, **info)  # as its callers do: in place
            loss.backward()
            assert all(type(m) is float for m in metrics.values())
            return {"loss": loss, "grad": log_prob.grad, "metrics": metrics}

        compared("verl", call).check(f"{name} {mode}")


CORRECTIONS = {
    "metrics alone": {},
    "truncated": {"rollout_is": "token", "rollout_is_threshold": 1.05},
    "normalized": {"rollout_is": "sequence", "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True},
    "a band, rejection": {
        "rollout_is": "token",
        "rollout_is_threshold": "0.9_1.1",
        "rollout_rs": "seq_mean_k3",
        "rollout_rs_threshold": "0.01",
    },
    "a bad threshold": {"rollout_is": "token", "rollout_is_threshold": -1.0},
    "a bad option": {"rollout_rs": "token_k4", "rollout_rs_threshold": "0.1"},
}


@holes
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_verl_rollout_correction(compared, kind, holes):
    def call(dtype):
        data, metrics = compute_rollout_correction_and_add_to_batch(proto(holes, dtype), CORRECTIONS[kind])
        added = {key: data.batch[key] for key in ("response_mask", "rollout_is_weights") if key in data.batch}
        return {"added": added, "metrics": metrics}

    found = compared("verl", call)
    found.check(kind)
    compared("verl", lambda dtype: calculate_debug_metrics(proto(holes, dtype))).check(kind, 1.0)
    assert isinstance(found.own, type) == ("bad" in kind)


@holes
@pytest.mark.parametrize("kind", ["ppo_clip", "reinforce"])
def test_verl_rollout_bypass_mode(compared, kind, holes):
    x, mask = rollout(holes)

    def call(dtype):
        config = ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8)
        config.policy_loss.__dict__["rollout_correction"] = CORRECTIONS["a band, rejection"] | {"loss_type": kind}
        log_prob = x.log_prob.to(dtype, copy=True).requires_grad_()
        tensors = (x.rollout_log_prob.to(dtype), log_prob, x.values.to(dtype), mask.bool())
        loss, metrics = core_algos.compute_policy_loss_bypass_mode(*tensors, "token-mean", config)
        loss.backward()
        return {"loss": loss, "grad": log_prob.grad, "metrics": metrics}

    compared("verl", call).check(kind)


@holes
@pytest.mark.parametrize("kind", KL)
def test_verl_rollout_kl(compared, kind, holes):
    def call(dtype):
        data, metrics = ray_trainer.apply_kl_penalty(proto(holes, dtype), core_algos.FixedKLController(0.05), kind)
        return {"rewards": data.batch["token_level_rewards"], "metrics": metrics}

    compared("verl", call).check(kind)


@holes
@pytest.mark.parametrize("mode", [*MODES, "nonsense"])
def test_verl_rollout_value_loss(compared, mode, holes):
    x, mask = rollout(holes)

    def call(dtype):
        vpreds = (x.values + 0.7 * x.entropy).to(dtype, copy=True).requires_grad_()
        returns = x.token_level_rewards.flip(1).cumsum(1).flip(1).to(dtype)
        loss, clipped = core_algos.compute_value_loss(
            vpreds, returns, x.values.to(dtype), mask.bool(), cliprange_value=0.5, loss_agg_mode=mode
        )
        loss.backward()
        return {"loss": loss, "clipped": clipped.float(), "grad": vpreds.grad}

    compared("verl", call).check(mode)


def test_verl_bad_config_raises_what_verl_raises(compared):
    x, mask = rollout(False)

    def call(config, mode="token-mean", info=None):
        def run(dtype):
            made = ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8, **config)
            made.global_batch_info.update(info or {})
            return core_algos.compute_policy_loss_vanilla(x.old_log_prob, x.log_prob, x.values, mask, mode, made)[0]

        return run

    for bad in (call({"clip_ratio_c": 0.5}), call({}, "token-median"), call({}, "token-mean", {"dp_size": 2})):
        found = compared("verl", bad)
        assert isinstance(found.own, type)
        assert found.ours is found.own
    empty = torch.zeros_like(mask)
    found = compared("verl", lambda dtype: core_algos.compute_gae_advantage_return(x.values, x.values, empty, 1.0, 1.0))
    assert found.own is found.ours is ValueError


def test_verl_unpatch_leaves_nothing():
    import sys

    def everything():
        return {
            (name, key): id(value)
            for name, module in list(sys.modules.items())
            if name.split(".")[0] == "verl"
            for key, value in vars(module).items()
            if callable(value)
        }

    import verl.workers.utils.losses as losses

    before, registry = everything(), dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    with integrations.patched("verl"):
        assert everything() != before
        assert losses.agg_loss is core_algos.agg_loss
        assert hasattr(losses.agg_loss, "__rlkern__")
        assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is core_algos.compute_gae_advantage_return
        integrations.patch("verl")  # again: nothing is wrapped twice
        assert not hasattr(core_algos.agg_loss.__rlkern__.original, "__rlkern__")
    assert everything() == before
    assert registry == core_algos.ADV_ESTIMATOR_REGISTRY


def test_verl_shadow_uses_verls_results():
    data = proto(True, torch.float32)
    own = ray_trainer.compute_advantage(data, "gae", 0.99, 0.95, config=AlgoConfig()).batch["advantages"]
    with integrations.patched("verl", "shadow"):
        found = ray_trainer.compute_advantage(proto(True, torch.float32), "gae", 0.99, 0.95, config=AlgoConfig())
        assert torch.equal(found.batch["advantages"], own)
        line = next(x for x in integrations.summary().splitlines() if "compute_gae" in x)
        assert "1 calls" in line
        assert "inside" in line


def test_verl_shadow_catches_a_fault(monkeypatch):
    from rlkern.integrations import verl

    def reset(token_level_rewards, values, response_mask, gamma, lam):
        return tuple(rlkern.advantages.gae(token_level_rewards, values, response_mask, gamma, lam * 0.999))

    with integrations.patched("verl", "shadow"):
        site = core_algos.compute_gae_advantage_return.__rlkern__
        monkeypatch.setattr(site, "chosen", reset)
        ray_trainer.compute_advantage(proto(True, torch.float32), "gae", 0.99, 0.95, config=AlgoConfig())
        assert "OVER" in integrations.summary()
    assert verl.sites


def test_verl_recording_is_read_by_verify(tmp_path):
    with integrations.capture(tmp_path / "run", steps=1) as recording:
        for _ in range(2):
            ray_trainer.compute_advantage(proto(True, torch.float32), "gae", 0.99, 0.95, config=AlgoConfig())
        assert recording.written == 1
    batch = rlkern.load_batch(tmp_path / "run" / "step-00000.safetensors")
    assert batch.meta["framework"] == "verl"
    assert torch.equal(batch.values, rollout(True)[0].values)


def test_verl_replacements_are_pickled_by_name():
    import pickle

    with integrations.patched("verl"):
        for function in (core_algos.agg_loss, core_algos.compute_value_loss, core_algos.compute_policy_loss_vanilla):
            assert len(pickle.dumps(function)) < 200
            assert pickle.loads(pickle.dumps(function)) is function
