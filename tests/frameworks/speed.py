# SPDX-License-Identifier: Apache-2.0
"""verl patched against unpatched on the CPU, one thread: `make bench-frameworks`. Calls take turns in one process."""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import verl.trainer.ppo.core_algos as core_algos
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import ray_trainer, rollout_corr_helper
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

from rlkern import integrations
from rlkern.bench import machine
from rlkern.testing import ragged_mask

torch.set_num_threads(1)
VARIANTS = ("gspo", "sapo", "cispo", "geo_mean", "clip_cov", "kl_cov", "dppo_kl", "bypass_mode")


def batch(rows, tokens):
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(rows, tokens, generator=g) for n in ("rewards", "values", "old", "ref", "advantages", "entropy")}
    x["new"], x["mask"] = x["old"] + 0.1 * x["ref"], ragged_mask(rows, tokens)
    x["logs"] = -x["old"].abs()
    x["rollout"] = (x["logs"] + 0.05 * x["ref"]).clamp(max=0)
    x["squares"] = x["values"].square()
    x["uid"] = [f"prompt-{i // 8:05d}-with-a-label-as-long-as-a-uuid" for i in range(rows)]
    x["bool"] = x["mask"].bool()
    x["config"] = ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8)
    x["config"].policy_loss.__dict__["rollout_correction"] = {
        "rollout_is": "token",
        "rollout_rs": "token_k3",
        "rollout_rs_threshold": "0.1",
    }
    x["config"].global_batch_info.update(dp_size=1, batch_num_tokens=int(x["mask"].sum()), global_batch_size=rows)
    return x


def advantage(estimator):
    def call(x):
        import numpy as np

        data = DataProto.from_dict(
            tensors={"token_level_rewards": x["rewards"], "values": x["values"], "response_mask": x["mask"]},
            non_tensors={"uid": np.array(x["uid"], dtype=object)},
        )
        ray_trainer.compute_advantage(data, estimator, gamma=0.99, lam=0.95, config=AlgoConfig(gamma=0.99, lam=0.95))

    return call


def loss_step(x):
    """What ppo_loss does for a micro-batch: policy loss, entropy, KL, metrics, and backward."""
    config, mask = x["config"], x["bool"]
    new, entropy = x["new"].detach().requires_grad_(), x["entropy"].detach().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn("vanilla")(
        old_log_prob=x["old"], log_prob=new, advantages=x["advantages"], response_mask=mask, loss_agg_mode="token-mean", config=config
    )
    loss = loss - 0.01 * core_algos.agg_loss(entropy, mask, "token-mean", **config.global_batch_info)
    loss = loss + 0.01 * core_algos.agg_loss(
        core_algos.kl_penalty(new, x["ref"], "low_var_kl"), mask, "token-mean", **config.global_batch_info
    )
    loss.backward()
    return metrics


def vanilla(x):
    new = x["new"].detach().requires_grad_()
    core_algos.get_policy_loss_fn("vanilla")(
        old_log_prob=x["old"], log_prob=new, advantages=x["advantages"], response_mask=x["bool"], config=x["config"]
    )[0].backward()


def value(x):
    new = x["values"].detach().requires_grad_()
    core_algos.compute_value_loss(new, x["rewards"], x["old"], x["bool"], 0.5)[0].backward()


def variant(name):
    def call(x):
        new = x["logs"].detach().requires_grad_()
        core_algos.get_policy_loss_fn(name)(
            old_log_prob=x["rollout"], log_prob=new, advantages=x["advantages"], response_mask=x["bool"], config=x["config"]
        )[0].backward()

    return call


def correction(x):
    rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        x["logs"], x["rollout"], x["mask"], rollout_is="token", rollout_rs="seq_mean_k3", rollout_rs_threshold="0.1"
    )


def token_baseline(x):
    core_algos.compute_optimal_token_baseline_advantage(x["rewards"], x["mask"], x["uid"], x["logs"], x["squares"])


CASES = {
    "compute_advantage gae": (advantage("gae"), (1024, 8192), 50),
    "compute_advantage reinforce_plus_plus": (advantage("reinforce_plus_plus"), (1024, 8192), 30),
    "compute_advantage grpo": (advantage("grpo"), (1024, 8192), None),
    "rollout correction": (correction, (1024, 8192), None),
    "optimal token baseline": (token_baseline, (1024, 8192), None),
    "policy loss, forward and backward": (vanilla, (8, 8192), None),
    **{f"policy loss {name}, forward and backward": (variant(name), (8, 8192), None) for name in VARIANTS},
    "losses of a micro-batch, forward and backward": (loss_step, (8, 8192), 15),
}
SMALL = {
    "compute_advantage gae": advantage("gae"),
    "compute_advantage reinforce_plus_plus": advantage("reinforce_plus_plus"),
    "compute_advantage grpo": advantage("grpo"),
    "compute_advantage rloo": advantage("rloo"),
    "policy loss, forward and backward": vanilla,
    "losses of a micro-batch, forward and backward": loss_step,
    "value loss, forward and backward": value,
    "rollout correction": correction,
    "optimal token baseline": token_baseline,
    **{f"policy loss {name}, forward and backward": variant(name) for name in VARIANTS},
    "masked_mean": lambda x: torch_functional.masked_mean(x["values"], x["mask"]),
    "masked_mean by row": lambda x: torch_functional.masked_mean(x["values"], x["mask"], -1),
    "masked_sum": lambda x: torch_functional.masked_sum(x["values"], x["mask"]),
    "masked_whiten": lambda x: torch_functional.masked_whiten(x["values"], x["mask"]),
    "kl_penalty k1": lambda x: core_algos.kl_penalty(x["new"], x["ref"], "kl"),
    "kl_penalty k3": lambda x: core_algos.kl_penalty(x["new"], x["ref"], "low_var_kl"),
    **{
        f"agg_loss {mode}": lambda x, mode=mode: core_algos.agg_loss(x["values"], x["mask"], mode)
        for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
    },
}


def seconds(call, x, repeat):
    start = time.perf_counter()
    for _ in range(repeat):
        call(x)
    return (time.perf_counter() - start) / repeat


def measure(call, shape, aim=None):
    """Medians of turns: unpatched, patched, unpatched, ..."""
    x = batch(*shape)
    big = shape[0] * shape[1] > 1 << 20
    found = {"off": [], "on": []}
    for _ in range(3 if big else 9):
        for mode in ("off", "on"):
            integrations.patch("verl", mode)
            call(x)
            found[mode].append(seconds(call, x, 1 if big else 40))
    integrations.unpatch()
    off, on = (statistics.median(found[mode]) for mode in ("off", "on"))
    return {"shape": shape, "unpatched_s": off, "patched_s": on, "times_faster": off / on, "aim": aim}


def main():
    rows = {name: measure(*given) for name, given in CASES.items()}
    rows |= {f"{name} (8, 64)": measure(call, (8, 64), 1 / 1.2) for name, call in SMALL.items()}
    for name, row in rows.items():
        aim = "" if row["aim"] is None else f"aim {row['aim']:.3g}{'' if row['times_faster'] >= row['aim'] else '  MISSED'}"
        print(f"{name:62} {row['unpatched_s'] * 1e6:12.1f} us {row['patched_s'] * 1e6:10.1f} us {row['times_faster']:8.2f}x {aim}")
    about = machine.describe() | {
        "allocator": os.environ.get("LD_PRELOAD") or "glibc",
        "MALLOC": {k: v for k, v in os.environ.items() if "MALLOC" in k},
    }
    print(json.dumps(about))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
