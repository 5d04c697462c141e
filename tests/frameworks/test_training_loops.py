# SPDX-License-Identifier: Apache-2.0
"""A tiny model trained by verl's and by OpenRLHF's own functions, patched against unpatched; and verl's real ppo_loss on the
tensors that its engine makes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlkern import integrations

pytest.importorskip("verl")
sys.path.insert(0, str(Path(__file__).parent))
import tiny_lm
import verl.trainer.ppo.core_algos as core_algos
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import ray_trainer
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils import losses

STEPS, PROMPTS, EACH, NEW = 25, 16, 8, 3
PROMPT = 4  # tokens of "3+4="


@pytest.fixture(scope="module")
def weights():
    return tiny_lm.warmed(tiny_lm.model(), tiny_lm.tokenizer()).state_dict()


def config():
    return ActorConfig(strategy="fsdp", rollout_n=EACH, ppo_micro_batch_size_per_gpu=8)


def log_probs(model, ids):
    logits = model(input_ids=ids, attention_mask=(ids != tiny_lm.PAD).long()).logits[:, PROMPT - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, PROMPT:, None])[..., 0]


@torch.no_grad()
def sample(model, tok, seed):
    """Prompts with EACH answers, the mask of what was generated, and the reward of each."""
    pairs = [p for p in tiny_lm.sums(PROMPTS, seed) for _ in range(EACH)]
    ids = tiny_lm.encoded([f"{a}+{b}=" for a, b in pairs], tok)
    g, done = torch.Generator().manual_seed(seed), torch.zeros(len(pairs), dtype=torch.bool)
    for _ in range(NEW):
        probabilities = torch.softmax(model(input_ids=ids, attention_mask=(ids != tiny_lm.PAD).long()).logits[:, -1].float(), -1)
        token = torch.where(done, tiny_lm.PAD, torch.multinomial(probabilities, 1, generator=g)[:, 0])
        done |= token == tiny_lm.EOS
        ids = torch.cat([ids, token[:, None]], 1)
    mask = (ids[:, PROMPT:] != tiny_lm.PAD).long()
    texts = tok.batch_decode([[t for t in row if t > 3] for row in ids[:, PROMPT:].tolist()])
    return ids, mask, torch.tensor([tiny_lm.reward(a, b, text) for (a, b), text in zip(pairs, texts, strict=True)])


def verl_loss(model, ids, mask, rewards, old, estimator, step):
    scores = torch.zeros(mask.shape).scatter_(1, mask.sum(1, keepdim=True) - 1, rewards[:, None])
    uid = np.array([f"{step}-{i // EACH}" for i in range(len(rewards))], dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": scores, "response_mask": mask, "values": torch.zeros_like(scores)}, non_tensors={"uid": uid}
    )
    data = ray_trainer.compute_advantage(data, estimator, gamma=1.0, lam=0.95, config=AlgoConfig(gamma=1.0, lam=0.95))
    new = log_probs(model, ids)
    loss, _ = core_algos.compute_policy_loss_vanilla(old, new, data.batch["advantages"], mask.bool(), config=config())
    return loss


def openrlhf_loss(openrlhf):
    maker_of = openrlhf.trainer.ppo_utils.experience_maker
    policy = openrlhf.models.loss.PolicyLoss()

    def loss(model, ids, mask, rewards, old, estimator, step):
        advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.95, no_std_norm=False)
        args = SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage), rollout=SimpleNamespace(n_samples_per_prompt=EACH),
            reward=SimpleNamespace(clip_range=(-10, 10)),
        )  # fmt: skip
        maker = object.__new__(maker_of.RemoteExperienceMaker)
        maker.strategy, maker.kl_ctl, maker.advantage_estimator = SimpleNamespace(args=args), SimpleNamespace(value=0.0), estimator
        made = [
            maker_of.Experience(
                index=i.tolist(), rewards=rewards[i], kl=torch.zeros(len(i), NEW), values=torch.zeros(len(i), NEW), action_mask=mask[i]
            )
            for i in torch.arange(len(rewards)).split(8)
        ]
        advantages = torch.cat([e.advantages for e in maker.compute_advantages_and_returns(made)])
        return policy(log_probs(model, ids), old, advantages * mask, mask)[0]

    return loss


def train(weights, loss_of, estimator, seed=0, steps=STEPS):
    """The rewards of each step, and the first loss."""
    tok, model = tiny_lm.tokenizer(), tiny_lm.model()
    model.load_state_dict(weights)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen, first = [], None
    for step in range(steps):
        ids, mask, rewards = sample(model, tok, 1000 * seed + step)
        old = log_probs(model, ids).detach()
        for _ in range(2):
            loss = loss_of(model, ids, mask, rewards, old, estimator, step)
            first = float(loss) if first is None else first
            adam.zero_grad()
            loss.backward()
            adam.step()
        seen.append(float(rewards.mean()))
    return seen, first


@pytest.mark.parametrize(("framework", "estimator"), [("verl", "grpo"), ("verl", "gae"), ("openrlhf", "reinforce"), ("openrlhf", "rloo")])
def test_training_loops(request, weights, framework, estimator):
    """The first step equal; the final reward within the spread of five seeds without us."""
    loss_of = verl_loss if framework == "verl" else openrlhf_loss(request.getfixturevalue("openrlhf"))
    spread = []
    for seed in range(5):
        seen, loss = train(weights, loss_of, estimator, seed)
        spread.append(sum(seen[-5:]) / 5)
        if seed == 0:
            own, first = seen, loss
    with integrations.patched(framework):
        seen, loss = train(weights, loss_of, estimator)
    assert seen[0] == own[0]
    assert loss == pytest.approx(first, rel=1e-4, abs=1e-6)
    final, margin = sum(seen[-5:]) / 5, max(spread) - min(spread)
    assert final > seen[0]
    assert min(spread) - margin <= final <= max(spread) + margin, (spread, final)


def test_training_loops_ppo_loss(compared):
    """verl's ppo_loss: nested log-probs and entropy, padded by verl itself, its own metrics, KL and entropy terms."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = [3, 5, 2, 4], [7, 9, 1, 6]

    def nested(rows, dtype=None):
        return torch.nested.as_nested_tensor([r.to(dtype) if dtype else r for r in rows], layout=torch.jagged)

    def rows(scale=1.0, sizes=responses):
        return [torch.randn(n, generator=g) * scale for n in sizes]

    old = [-r.abs() for r in rows()]
    whole = [
        torch.cat([torch.zeros(p - 1), o + 0.2 * torch.randn(len(o), generator=g), torch.zeros(1)])
        for p, o in zip(prompts, old, strict=True)
    ]
    fields = {"old_log_probs": old, "advantages": rows(), "ref_log_prob": [o + 0.1 for o in old]}
    mask = [(torch.rand(n, generator=g) < 0.8).long() for n in responses]
    entropy = [r.abs() for r in rows(1.0, [p + r for p, r in zip(prompts, responses, strict=True)])]

    def call(dtype):
        data = TensorDict({k: nested(v, dtype) for k, v in fields.items()} | {"response_mask": nested(mask)}, batch_size=4)
        data["prompts"] = nested([torch.zeros(p, dtype=torch.long) for p in prompts])
        data["responses"] = nested([torch.zeros(r, dtype=torch.long) for r in responses])
        for name, value in (("dp_size", 1), ("batch_num_tokens", 40), ("global_batch_size", 8)):
            tu.assign_non_tensor(data, **{name: value})
        actor = ActorConfig(
            strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8, use_kl_loss=True, kl_loss_type="low_var_kl", entropy_coeff=0.01
        )
        log_prob = torch.cat(whole).to(dtype).requires_grad_()
        loss, metrics = losses.ppo_loss(actor, {"log_probs": log_prob, "entropy": torch.cat(entropy).to(dtype)}, data)
        loss.backward()
        return {
            "loss": loss,
            "grad": log_prob.grad,
            "metrics": {k: float(v if isinstance(v, float) else v.values[0]) for k, v in metrics.items()},
        }

    assert compared("verl", call).check("ppo_loss") >= 8


def test_training_worker(tmp_path):
    """verl's TrainingWorker, FSDP2 on the CPU: the patch reaches the ppo_loss that it runs, and ten steps lose what they lose without."""
    tok = tiny_lm.tokenizer()
    tiny_lm.warmed(tiny_lm.model(), tok, 20).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    found = {}
    for mode, port in (("off", "29511"), ("on", "29512")):
        command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(tmp_path), mode]
        env = {**os.environ, "MASTER_PORT": port}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert "RESULT" in done.stdout, done.stderr[-3000:]
        values, weights, reached = json.loads(done.stdout.split("RESULT")[1])
        found[mode] = values, weights
    assert reached == ["agg_loss", "kl_penalty", "masked_sum", "vanilla"]
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-5)
    assert found["on"][1] == pytest.approx(found["off"][1], rel=1e-6)
    assert len(set(found["on"][0])) > 5
